"""A frozen language model that reads a prefix before every text."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from sklearn_relish.llm.fingerprint import prefixed_fingerprint
from sklearn_relish.llm.forward import ForwardPass
from sklearn_relish.llm.frozen import FrozenLLM
from sklearn_relish.llm.prefix_attention import Prefix
from sklearn_relish.llm.tokenize import TextTokenizer
from sklearn_relish.utils.locks import ForkSafeLock

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_lock = ForkSafeLock()
MAX_PREFIXES = 8  # of a model, whose keys and values are kept


class PrefixedLLM(FrozenLLM):
    r"""A `FrozenLLM` that reads a prefix before every text; the states are those of the text.

    The weights are shared with the model that reads no prefix. A causal model on a CPU computes
    the keys and values of the prefix once, others read it with every text.

    Parameters
    ----------
    llm : FrozenLLM
        The model without a prefix.
    prefix : str
        Its tokens count towards the model's context, not towards `max_length`.

    Raises
    ------
    ValueError
        On first use, if the prefix leaves no room for a text in the model's context.

    Examples
    --------
    >>> from sklearn_relish import FrozenLLM
    >>> from sklearn_relish.llm.prefix import PrefixedLLM
    >>> llm = PrefixedLLM(FrozenLLM("HuggingFaceTB/SmolLM2-135M"), "A review and its stars.\n\n")
    >>> [(rows, [states], lengths)] = llm.read(["a text"], layers=[2], max_length=512)
    >>> states.lengths.tolist() == lengths.tolist()
    True
    """

    def __init__(self, llm: FrozenLLM, prefix: str) -> None:
        super().__init__(
            llm.model, device=llm.device, dtype=llm.dtype, model_kwargs=llm.model_kwargs
        )
        self.llm = llm
        self.prefix = prefix

    def __repr__(self) -> str:
        return f"{self.llm!r} with the prefix {reprlib.repr(self.prefix)}"

    def __getstate__(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"llm": self.llm, "prefix": self.prefix}

    def __reduce__(self) -> tuple[Any, ...]:
        return with_prefix, (self.llm, self.prefix)

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Identifies weights, tokenizer and prefix."""
        return prefixed_fingerprint(self.llm.fingerprint, self.prefix)

    @property
    def revision(self) -> str | None:  # type: ignore[override]
        """The Hub's commit of the model; None for a local model."""
        return self.llm.revision

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        return self.llm.config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.llm.tokenizer

    @property
    def token_budget(self) -> int:
        """Tokens of a batch, see `FrozenLLM.token_budget`."""
        return self.llm.token_budget

    @token_budget.setter
    def token_budget(self, n_tokens: int) -> None:
        self.llm.token_budget = n_tokens

    @cached_property
    def _prefix(self) -> Prefix | None:  # type: ignore[override]
        tokenizer = self.llm._text_tokenizer
        special = tokenizer.special_ids
        ids = [*special, *tokenizer.content_ids(self.prefix)]
        prefix = Prefix(np.array(ids, dtype=np.int64), len(special))
        return prefix if prefix.n_tokens else None

    @cached_property
    def _text_tokenizer(self) -> TextTokenizer:
        same = self.llm._text_tokenizer
        n_before = 0 if self._prefix is None else self._prefix.n_tokens
        made = TextTokenizer(self.tokenizer, same.context_length, self.model, n_before=n_before)
        made._lock = same._lock  # there is one tokenizer
        return made

    def _n_prefix_tokens(self, layers: Sequence[int], longest: int) -> int:
        """Tokens that are read with every text of up to `longest` tokens in addition to its own."""
        prefix = self._prefix
        if prefix is None:
            return 0
        cache = self._with_layers(
            max(layers), lambda network: network.prefix_cache(prefix, layers, longest)
        )
        return prefix.n_tokens if cache is None else 0

    def _forward_pass_to(self, layer: int) -> ForwardPass:
        return self.llm._forward_pass_to(layer)

    def _with_layers(self, layer: int, use: Callable[[ForwardPass], Any]) -> Any:
        return self.llm._with_layers(layer, use)


def with_prefix(llm: FrozenLLM, prefix: str) -> FrozenLLM:
    """The model that reads `prefix` before every text, the same one in every call.

    Of each model the last MAX_PREFIXES are kept.
    """
    if not prefix:
        return llm
    with _lock:
        kept: dict[str, PrefixedLLM] = vars(llm).setdefault("_prefixed", {})
        found = kept.pop(prefix, None) or PrefixedLLM(llm, prefix)
        kept[prefix] = found  # the latest is the last
        while len(kept) > MAX_PREFIXES:
            del kept[next(iter(kept))]
    return found

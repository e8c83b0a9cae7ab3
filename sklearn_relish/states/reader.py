"""What the store and the estimators need of a language model: an interface of one method.

`FrozenLLM` is one reader. An inference server that returns hidden states can be another.
"""

from __future__ import annotations

import inspect
import numbers
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.utils.devices import resolve_device

REQUIRED = ("model", "fingerprint", "n_layers", "hidden_size")
FINGERPRINT = re.compile("[0-9a-f]{32}")

Batches = Iterator[tuple[np.ndarray, list[TokenStates], np.ndarray]]  # see `TokenStateReader.read`


class TokenStateReader(ABC):
    """Base class of language models that the estimators can use as `model`.

    :class:`FrozenLLM` is one. A subclass has the method `read` and the first four attributes below,
    as attributes of the class or of the object, or as properties. The rest has defaults. States are
    kept under `fingerprint` and `torch_dtype`, and `read` is called only for texts whose states
    are not kept. Several threads may call it at once.

    `sklearn.base.clone` and `copy.deepcopy` do not copy a reader. A pickle of an estimator holds a
    pickle of it. `save_pretrained` saves only its name: pass the reader as `model` to
    `from_pretrained`.

    Attributes
    ----------
    model : str
        Name of the model, which `StateStore.info` lists and `StateStore.clear` takes.
    fingerprint : str
        32 hexadecimal digits that differ between models whose states differ, in the weights or in
        the tokenizer.
    n_layers : int
        Number of layers.
    hidden_size : int
        Size D of a token's state.
    revision : str or None, default=None
        Version of the model, for messages and model cards.
    torch_dtype : torch.dtype, default=torch.float32
        Floating-point dtype of the states that `read` yields.
    torch_device : torch.device
        Where the heads are trained and evaluated. The default is ``"cuda"`` if available, else
        ``"mps"`` if available, else ``"cpu"``.

    See Also
    --------
    FrozenLLM : Reads texts with a model of the Transformers library.

    Examples
    --------
    A reader without a language model: each word has a random vector, which its hash determines.

    >>> import hashlib
    >>> import numpy as np
    >>> import torch
    >>> from sklearn_relish import LLMEncoder, TokenStateReader, TokenStates
    >>> def digest(text):
    ...     return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    >>> class HashedWords(TokenStateReader):
    ...     model, n_layers, hidden_size = "hashed-words", 1, 8
    ...     fingerprint = digest("hashed-words, version 1")
    ...
    ...     def read(self, texts, *, layers, max_length, windows=False):
    ...         for start in range(0, len(texts), 100):  # a server would get 100 texts at once
    ...             words = [text.split() or [""] for text in texts[start : start + 100]]
    ...             full_lengths = np.array([len(text) for text in words])
    ...             if not windows:
    ...                 words = [text[:max_length] for text in words]
    ...             vectors = [
    ...                 np.random.default_rng(int(digest(word), 16)).normal(size=self.hidden_size)
    ...                 for text in words
    ...                 for word in text
    ...             ]
    ...             states = TokenStates.from_lengths(
    ...                 torch.tensor(np.array(vectors), dtype=self.torch_dtype),
    ...                 torch.tensor([len(text) for text in words]),
    ...             )
    ...             rows = start + np.arange(len(words))
    ...             yield rows, [states for _ in layers], full_lengths
    >>> encoder = LLMEncoder(HashedWords())
    >>> encoder.fit_transform(["good film", "film good", "bad film"]).shape
    (3, 8)
    """

    model: str
    fingerprint: str
    n_layers: int
    hidden_size: int
    revision: str | None = None
    torch_dtype: torch.dtype = torch.float32

    @cached_property
    def torch_device(self) -> torch.device:
        """Where the heads are trained and evaluated."""
        return resolve_device(None)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({getattr(self, 'model', '')!r})"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __sklearn_clone__(self) -> Self:
        return self

    @abstractmethod
    def read(
        self, texts: list[str], *, layers: Sequence[int], max_length: int, windows: bool = False
    ) -> Batches:
        """Compute the states of texts, batch by batch and in any order.

        With several prompts, another call begins before all batches of this one have been taken,
        in the same thread: hold no lock between batches.

        Parameters
        ----------
        texts : list of str
        layers : sequence of int
            Layers whose states are wanted, each from 1 to `n_layers`, in any order; one pass
            computes all.
        max_length : int
            Number of tokens after which a text is cut, special tokens included.
        windows : bool, default=False
            If True, a longer text is read completely, in windows of `max_length` tokens. A reader
            that can't do this raises a ValueError.

        Yields
        ------
        rows : int64 ndarray of shape (B,)
            Positions in `texts` of the B texts of this batch. Each position is yielded once.
        states : list of TokenStates
            One for each of `layers`: the states of the B texts, in one CPU array of shape
            (n_tokens, D) in `torch_dtype`. All of them have the same lengths, at least 1.
        full_lengths : int64 ndarray of shape (B,)
            Number of tokens of each text before it was cut.

        Examples
        --------
        >>> from sklearn_relish import FrozenLLM
        >>> llm = FrozenLLM("HuggingFaceTB/SmolLM2-135M")
        >>> for rows, (states,), _ in llm.read(["a text", "another"], layers=[2], max_length=512):
        ...     len(rows), states.hidden_size == llm.hidden_size
        (2, True)
        """

    def resolve_layer(self, layer: int | float) -> int:
        """The number of a layer, from 1 to `n_layers`.

        Parameters
        ----------
        layer : int or float
            A number from 1 to `n_layers`; a negative number, which counts from the end, -1 being
            the last layer after the final norm; or a fraction of the depth in (0, 1].

        Raises
        ------
        ValueError
            If the model has no such layer.

        Examples
        --------
        >>> from sklearn_relish import FrozenLLM
        >>> llm = FrozenLLM("HuggingFaceTB/SmolLM2-135M")
        >>> llm.resolve_layer(-1) == llm.resolve_layer(1.0) == llm.n_layers
        True
        """
        if not isinstance(layer, numbers.Integral) and 0 < layer <= 1:
            return max(1, round(float(layer) * self.n_layers))
        number = layer if layer > 0 else self.n_layers + 1 + layer
        if layer == 0 or not 1 <= number <= self.n_layers or number != int(number):
            raise ValueError(
                f"layer={layer} is not a layer of {self.model!r}, which has {self.n_layers}"
                f" layers: pass 1 to {self.n_layers}, -{self.n_layers} to -1, or a fraction of the"
                " depth in (0, 1]."
            )
        return int(number)

    def state_sizes(self, layer: int) -> Collection[int]:
        """The sizes D that a token's state may have at a layer; states of other sizes are refused.

        Parameters
        ----------
        layer : int
            From 1 to `n_layers`.

        Examples
        --------
        >>> from sklearn_relish import FrozenLLM
        >>> llm = FrozenLLM("HuggingFaceTB/SmolLM2-135M")
        >>> llm.state_sizes(1) == {llm.hidden_size}
        True
        """
        return {self.hidden_size}

    def as_chat(self, texts: list[str]) -> list[str]:
        r"""Each text as a user's message to a chat model, for ``chat_template=True``.

        Raises
        ------
        ValueError
            If the model has no chat template, as by default.

        Examples
        --------
        >>> from sklearn_relish import FrozenLLM
        >>> llm = FrozenLLM("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> llm.as_chat(["a text"])  # doctest: +SKIP
        ['<|im_start|>user\na text<|im_end|>\n<|im_start|>assistant\n']
        """
        raise ValueError(f"{self!r} has no chat template: pass chat_template=False.")

    def tokens(
        self, texts: list[str], *, max_length: int, windows: bool = False
    ) -> list[tuple[list[str], np.ndarray]]:
        """The tokens whose states `read` gives.

        `RelishRegressor.attention` needs them. So does the comparison of two columns of texts: a
        regressor that was fitted with it can't predict without them.

        Parameters
        ----------
        texts : list of str
        max_length : int
        windows : bool, default=False
            As in `read`.

        Returns
        -------
        list of (list of str, int64 ndarray of shape (n_tokens, 2))
            For each text, the pieces of the text that its tokens are, and where they begin and end
            in it. A special token has its name and an empty span.

        Raises
        ------
        ValueError
            If the reader does not know the spans of tokens, as by default.

        Examples
        --------
        >>> from sklearn_relish import FrozenLLM
        >>> llm = FrozenLLM("HuggingFaceTB/SmolLM2-135M")
        >>> ((pieces, spans),) = llm.tokens(["a text"], max_length=512)
        >>> len(pieces) == len(spans)
        True
        """
        raise ValueError(
            f"{self!r} can't map tokens to pieces of the text: its class needs the method `tokens`."
        )


def check_reader(reader: TokenStateReader) -> None:
    """Raise an error if a reader lacks a required attribute, or its fingerprint is not valid."""
    lacking = object()
    missing = [
        name for name in REQUIRED if inspect.getattr_static(reader, name, lacking) is lacking
    ]
    if missing:
        raise TypeError(
            f"The {type(reader).__name__} given as model has no {', '.join(missing)}: a"
            f" TokenStateReader must have the attributes {', '.join(REQUIRED)}."
        )
    if not (isinstance(reader.fingerprint, str) and FINGERPRINT.fullmatch(reader.fingerprint)):
        raise ValueError(
            f"The fingerprint of {reader!r} must be 32 hexadecimal digits in lower case, got"
            f" {reader.fingerprint!r}: use hashlib.blake2b(..., digest_size=16).hexdigest() of"
            " what identifies weights and tokenizer."
        )


def read_batches(
    reader: TokenStateReader,
    texts: list[str],
    *,
    layers: Sequence[int],
    max_length: int,
    windows: bool,
) -> Batches:
    """`TokenStateReader.read` of any number of texts; what it yields is checked."""
    if not texts:
        return
    dtype, n_unread = reader.torch_dtype, len(texts)
    sizes = [reader.state_sizes(layer) for layer in layers]
    unread = np.ones(len(texts), dtype=bool)
    batches = reader.read(texts, layers=layers, max_length=max_length, windows=windows)
    for rows, states_of_layers, full_lengths in batches:
        if len(states_of_layers) != len(layers):
            raise _invalid(reader, f"{len(states_of_layers)} states for {len(layers)} layers")
        for states, layer, allowed in zip(states_of_layers, layers, sizes, strict=True):
            array = states.arrays[0]
            if len(states.arrays) != 1 or array.dtype != dtype or array.shape[1] not in allowed:
                raise _invalid(
                    reader,
                    f"states of layer {layer} in {len(states.arrays)} arrays, the first of shape"
                    f" {tuple(array.shape)} and {array.dtype}, but one array of {dtype} is expected"
                    f" whose rows have size {', '.join(map(str, allowed))}",
                )
            if not array.isfinite().all():
                raise FloatingPointError(
                    f"{reader!r} gives states that are not finite at layer {layer}."
                )
            if not len(rows) == len(states) == len(full_lengths):
                raise _invalid(
                    reader,
                    f"{len(rows)} rows with states of {len(states)} texts at layer {layer} and"
                    f" {len(full_lengths)} full_lengths",
                )
        unread[rows] = False
        n_unread -= len(rows)
        if np.count_nonzero(unread) != n_unread:
            raise _invalid(reader, "a row twice")
        if len(rows):
            yield rows, states_of_layers, full_lengths
    if n_unread:
        raise _invalid(reader, f"no states for {n_unread} of {len(texts)} texts")


def read_spans(
    reader: TokenStateReader,
    texts: list[str],
    lengths: Tensor,
    *,
    max_length: int,
    windows: bool,
) -> list[np.ndarray] | None:
    """Where the tokens of each text begin and end in it, int64 (n_tokens, 2).

    None if the reader does not know. `lengths` are the numbers of tokens whose states were read.
    """
    try:
        tokens = reader.tokens(texts, max_length=max_length, windows=windows)
    except ValueError as error:
        if type(error) is not ValueError:  # such as a server's JSONDecodeError
            raise
        return None
    for (_, spans), length in zip(tokens, lengths.tolist(), strict=True):
        if len(spans) != length:
            raise ValueError(
                f"{reader!r} is not a valid reader: tokens returned {len(spans)} spans for a text"
                f" of {length} states."
            )
    return [spans for _, spans in tokens]


def _invalid(reader: TokenStateReader, what: str) -> ValueError:
    return ValueError(f"{reader!r} is not a valid reader: read yielded {what}.")

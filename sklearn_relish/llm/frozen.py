"""`FrozenLLM`: texts in, token states out.

The other files of this folder each do one part: `loading`, `layers` and `gguf` load a model,
`fingerprint` identifies it, `tokenize` makes token ids, `batching` makes batches, `forward` runs
the network.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from sklearn_relish.llm import batching
from sklearn_relish.llm.fingerprint import model_files, model_fingerprint
from sklearn_relish.llm.forward import ForwardPass
from sklearn_relish.llm.layers import NotLoadedError, move_layers
from sklearn_relish.llm.loading import (
    access_kwargs,
    cached_commit,
    load_network,
    load_pretrained,
    model_source,
)
from sklearn_relish.llm.prefix_attention import Prefix
from sklearn_relish.llm.tokenize import TextTokenizer
from sklearn_relish.states.reader import TokenStateReader
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.utils.devices import computes_bfloat16, has_amx, resolve_device
from sklearn_relish.utils.files import file_signature
from sklearn_relish.utils.locks import ForkSafeLock, renew_in_forked_child
from sklearn_relish.utils.messages import warn

if TYPE_CHECKING:  # importing these classes imports accelerate
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class _LoadedOnce:
    """A property that is computed once for an object, under the object's own lock.

    `functools.cached_property` has one lock for all objects, or none, depending on the Python.
    """

    def __init__(self, load: Callable[[Any], Any]) -> None:
        self.load = load
        self.__doc__ = load.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        if self.name not in vars(instance):  # else another thread's loading is not waited for
            with instance._loading:
                if self.name not in vars(instance):
                    vars(instance)[self.name] = self.load(instance)
        return vars(instance)[self.name]


class FrozenLLM(TokenStateReader):
    """A frozen language model that turns texts into the states of their tokens.

    Nothing is loaded before the first text is read, and no layer above the deepest one that is
    read. A later reading of a deeper layer loads the missing layers. Models that can't be loaded in
    part are loaded as a whole, see `sklearn_relish.llm.layers.partial_model_class`; all files of a
    model are downloaded from the Hub.

    An instance may be shared by any number of estimators and threads: neither `sklearn.base.clone`
    nor `copy.deepcopy` copies it, and a pickle holds the model's name, not its weights.

    Parameters
    ----------
    model : str or path
        Hub id, local folder, or path of a ``.gguf`` file. A causal LLM or an encoder; for an
        encoder-decoder, the encoder is used. A ``.gguf`` file is converted to safetensors once, in
        the user's cache folder; this needs the extra ``gguf``.
    device : str or torch.device, default=None
        Where the model runs. None: ``"cuda"`` if available, else ``"mps"`` if available, else
        ``"cpu"``.
    dtype : {"auto", "float32", "bfloat16", "float16"} or torch.dtype, default="auto"
        Of weights and states. ``"auto"`` is bfloat16 if the hardware computes in it natively, else
        float32.
    model_kwargs : dict, default=None
        Passed to `from_pretrained` of the model, and to those of its configuration and tokenizer
        if they take them: ``revision``, ``device_map``, ``quantization_config``, ``token``,
        ``attn_implementation``, ... Weights in a format other than safetensors need
        ``use_safetensors=False``; code from the Hub runs only with ``trust_remote_code=True``.

    Raises
    ------
    ValueError
        If `model_kwargs` has a dtype.
    OSError
        On first use, if the model is not found; the message says what was tried.

    Examples
    --------
    >>> from sklearn_relish import FrozenLLM
    >>> llm = FrozenLLM("HuggingFaceTB/SmolLM2-135M", device="cpu")
    >>> llm
    FrozenLLM('HuggingFaceTB/SmolLM2-135M', device='cpu')

    Estimators that share it:

    >>> from sklearn_relish import LLMEncoder, RelishRegressor
    >>> regressor, encoder = RelishRegressor(llm), LLMEncoder(llm)
    """

    _prefix: Prefix | None = None

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        named = sorted({"dtype", "torch_dtype"}.intersection(model_kwargs or ()))
        if named:
            raise ValueError(
                f"model_kwargs has {named[0]!r}: pass dtype= to FrozenLLM, or to the estimator,"
                " instead."
            )
        self.model = os.fspath(model)
        self.device = device
        self.dtype = dtype
        self.model_kwargs = model_kwargs
        self._depth = 0  # layers that are loaded
        self._renew_lock()
        renew_in_forked_child(self, FrozenLLM._renew_lock)

    def _renew_lock(self) -> None:
        self._loading = threading.RLock()

    def __repr__(self) -> str:
        model_kwargs = self.model_kwargs
        if model_kwargs and "token" in model_kwargs:
            model_kwargs = model_kwargs | {"token": "..."}  # a secret
        given = "".join(
            f", {name}={value!r}"
            for name, value, default in (
                ("device", self.device, None),
                ("dtype", self.dtype, "auto"),
                ("model_kwargs", model_kwargs, None),
            )
            if value != default
        )
        return f"FrozenLLM({self.model!r}{given})"

    def __getstate__(self) -> dict[str, Any]:
        """The constructor's arguments, for skops; pickle uses `__reduce__`."""
        device = None if self.device is None else str(self.device)
        dtype = str(self.dtype).removeprefix("torch.")
        return {
            "model": self.model,
            "device": device,
            "dtype": dtype,
            "model_kwargs": self.model_kwargs,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self, **state)

    def __reduce__(self) -> tuple[Any, ...]:
        return shared_llm, (self.model, self.device, self.dtype, self.model_kwargs)

    @cached_property
    def torch_device(self) -> torch.device:
        """The device that `device` stands for on this machine."""
        return resolve_device(self.device)

    @cached_property
    def torch_dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype that `dtype` stands for on this machine."""
        if self.dtype == "auto":
            return torch.bfloat16 if computes_bfloat16(self.torch_device) else torch.float32
        dtype = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(
                f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', got {self.dtype!r}."
            )
        return dtype

    @property
    def n_layers(self) -> int:  # type: ignore[override]
        """Number of layers of the model; only its configuration is loaded."""
        return self._text_config.num_hidden_layers

    @property
    def hidden_size(self) -> int:  # type: ignore[override]
        """Size D of a token's state; only the model's configuration is loaded."""
        return self._text_config.hidden_size

    def state_sizes(self, layer: int) -> set[int]:
        """Sizes D that a token's state may have at a layer, from 1 to `n_layers`.

        Examples
        --------
        >>> from sklearn_relish import FrozenLLM
        >>> llm = FrozenLLM("HuggingFaceTB/SmolLM2-135M")
        >>> llm.state_sizes(1) == {llm.hidden_size}
        True
        """
        sizes = {self.hidden_size}
        if layer == self.n_layers:  # some models project the last layer's states
            sizes.add(getattr(self._text_config, "word_embed_proj_dim", None) or self.hidden_size)
        return sizes

    @_LoadedOnce
    def fingerprint(self) -> str:
        """Identifies weights and tokenizer: a digest of the Hub's commit, or of the files."""
        self._check_files()
        return model_fingerprint(self.model, self.revision, self.model_kwargs)

    @_LoadedOnce
    def revision(self) -> str | None:
        """The Hub's commit of the model; None for a local model."""
        if os.path.exists(self.model):
            return None
        _ = self.config  # is in the cache from here on
        return cached_commit(self.model, self.model_kwargs)

    @property
    def files(self) -> list[Path]:
        """Files of a local model: weights, configuration, tokenizer. Empty for one of the Hub."""
        return model_files(self.model, self.model_kwargs)

    @property
    def file_signatures(self) -> list[tuple[int, ...]]:
        """Signatures of `files`, which differ after one of the files has changed."""
        return [file_signature(path) for path in self.files]

    @_LoadedOnce
    def config(self) -> PretrainedConfig:
        """The model's configuration, loaded on first use."""
        return self._from_pretrained(transformers.AutoConfig, **access_kwargs(self.model_kwargs))

    @_LoadedOnce
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded on first use."""
        tokenizer = self._from_pretrained(transformers.AutoTokenizer, **self._pinned_kwargs)
        if tokenizer.is_fast:  # calls would change this state, each for all threads
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        return tokenizer

    @property
    def network(self) -> PreTrainedModel:
        """The model's text layers without a head. All of them are loaded, which `read` avoids."""
        return self._forward_pass.network

    @cached_property
    def token_budget(self) -> int:
        """Tokens of a batch, padding included; halved when a batch does not fit into memory."""
        budget = batching.TOKEN_BUDGET[self._device_kind]
        uses_amx = self.torch_dtype == torch.bfloat16 and has_amx(self.torch_device)
        return budget * (batching.AMX_FACTOR if uses_amx else 1)

    def as_chat(self, texts: list[str]) -> list[str]:
        r"""Each text as a user's message to a chat model, up to where the reply begins.

        Parameters
        ----------
        texts : list of str

        Returns
        -------
        list of str

        Raises
        ------
        ValueError
            If the model's tokenizer has no chat template.

        Examples
        --------
        >>> from sklearn_relish import FrozenLLM
        >>> llm = FrozenLLM("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> llm.as_chat(["a text"])  # doctest: +SKIP
        ['<|im_start|>user\na text<|im_end|>\n<|im_start|>assistant\n']
        """
        return self._text_tokenizer.as_chat(texts)

    def read(
        self, texts: list[str], *, layers: Sequence[int], max_length: int, windows: bool = False
    ) -> Iterator[tuple[np.ndarray, list[TokenStates], np.ndarray]]:
        """States of texts, batch by batch. The order of the texts is not kept.

        One pass gives the states at all of `layers`; no layer above them is computed.

        On a CPU the states of a text have the same bits in any batch, see
        `sklearn_relish.llm.batch_invariance`. On other devices they depend on the batch, within
        the rounding of the dtype. `sklearn_relish.llm.batching` has the rules for batches.

        Parameters
        ----------
        texts : list of str
        layers : sequence of int
            Each from 1 to `n_layers`, see `resolve_layer`.
        max_length : int
            Tokens of a text that are read, special tokens included; never more than the model's
            context.
        windows : bool, default=False
            If True, a text of more than `max_length` tokens is read in windows of this length
            instead of being cut. Each window shares a quarter of its tokens with the window before
            as context; the states of a text have each of its tokens once.

        Yields
        ------
        rows : int64 array of shape (B,)
            The rows of `texts` in the batch.
        states : list of TokenStates
            Their states at each of `layers`, on the CPU, in the model's dtype.
        full_lengths : int64 array of shape (B,)
            Tokens of each text before it was cut; a lower bound for a very long text that is cut.

        Raises
        ------
        FloatingPointError
            If states overflow the dtype.
        ValueError
            If windows of `max_length` have no room for text between the special tokens.
        torch.OutOfMemoryError
            If a single text does not fit into a CUDA device's memory.

        Warns
        -----
        UserWarning
            If a batch does not fit into a CUDA device's memory. Smaller batches are then made.

        Examples
        --------
        >>> from sklearn_relish import FrozenLLM
        >>> llm = FrozenLLM("HuggingFaceTB/SmolLM2-135M")
        >>> for rows, [states], lengths in llm.read(["a text"], layers=[2], max_length=512):
        ...     states.hidden_size == llm.hidden_size, states.lengths.tolist() == lengths.tolist()
        (True, True)
        """
        chunks = self._text_tokenizer.tokenize_in_chunks(
            texts, chunk_size=batching.CHUNK_TEXTS, max_length=max_length, windows=windows
        )
        with closing(chunks):
            for start, pieces, full_lengths in chunks:
                n_tokens = batching.GROUP_BUDGETS * self.token_budget
                for group in batching.group_pieces(pieces, n_tokens):
                    batches = self._read_tokens([piece.ids for piece in group], layers)
                    for rows, states in batching.join_windows(batches, group):
                        yield rows + start, states, full_lengths[rows]

    def count_tokens(
        self, texts: list[str], *, max_length: int, windows: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of tokens that `read` reads; only the tokenizer is loaded.

        Parameters
        ----------
        texts : list of str
        max_length : int
        windows : bool, default=False
            As in `read`.

        Returns
        -------
        n_read : int64 ndarray of shape (n_texts,)
            Tokens of each text whose states `read` gives.
        full_lengths : int64 ndarray of shape (n_texts,)
            Tokens before the text is cut; a lower bound for a very long text that is cut.

        Examples
        --------
        >>> from sklearn_relish import FrozenLLM
        >>> llm = FrozenLLM("HuggingFaceTB/SmolLM2-135M")
        >>> n_read, full_lengths = llm.count_tokens(["a text", "a longer text"], max_length=2)
        >>> n_read.tolist()
        [2, 2]
        """
        tokenizer = self._text_tokenizer
        chunks = [
            tokenizer.tokenize(
                texts[start : start + batching.CHUNK_TEXTS], max_length=max_length, windows=windows
            )[1]
            for start in range(0, len(texts), batching.CHUNK_TEXTS)
        ]
        full_lengths = np.concatenate(chunks)
        if windows:
            return np.maximum(full_lengths, 1), full_lengths
        return np.clip(full_lengths, 1, tokenizer.token_limit(max_length)), full_lengths

    def tokens(
        self, texts: list[str], *, max_length: int, windows: bool = False
    ) -> list[tuple[list[str], np.ndarray]]:
        """The tokens whose states `read` gives, as pieces of the text.

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
            in it. A special token is not a piece of the text: it has its name and an empty span.
            Tokens that form one character together each have all of it.

        Raises
        ------
        ValueError
            If the model's tokenizer is not a fast one.

        Examples
        --------
        >>> from sklearn_relish import FrozenLLM
        >>> llm = FrozenLLM("HuggingFaceTB/SmolLM2-135M")
        >>> (pieces, spans), *_ = llm.tokens(["a text"], max_length=512)
        >>> start, end = spans[-1]
        >>> "a text"[start:end] == pieces[-1]
        True
        """
        return self._text_tokenizer.spans(texts, max_length=max_length, windows=windows)

    def _read_tokens(
        self, tokens: list[np.ndarray], layers: Sequence[int]
    ) -> Iterator[tuple[np.ndarray, list[TokenStates]]]:
        """States of tokenized texts in batches, the longest texts first."""
        lengths = np.array([len(ids) for ids in tokens])
        longest_first = np.argsort(-lengths, kind="stable")
        deepest = max(layers)
        packed = len(tokens) > 1 and self._with_layers(
            deepest, lambda network: network.packing(deepest) is not None
        )
        lengths += self._n_prefix_tokens(layers, int(lengths.max()))
        start = 0
        while start < len(tokens):
            remaining = longest_first[start:]
            n_texts = batching.batch_size(
                lengths[remaining],
                kind=self._device_kind,
                token_budget=self.token_budget,
                packed=packed,
            )
            rows = remaining[:n_texts]
            try:
                states = self._read_batch([tokens[row] for row in rows], layers)
            except torch.OutOfMemoryError:
                if n_texts == 1:
                    raise
                self._halve_budget(n_texts * int(lengths[rows[0]]))
                continue
            start += n_texts
            yield rows, states

    def _read_batch(self, tokens: list[np.ndarray], layers: Sequence[int]) -> list[TokenStates]:
        """States of one batch of tokenized texts at each of `layers`."""
        return self._with_layers(
            max(layers), lambda network: network.run(tokens, layers, self._prefix)
        )

    def _n_prefix_tokens(self, layers: Sequence[int], longest: int) -> int:
        """Tokens that are read with every text of up to `longest` tokens in addition to its own."""
        return 0

    def _halve_budget(self, n_tokens: int) -> None:
        """Make batches smaller than one of `n_tokens` that did not fit into memory."""
        self.token_budget = max(1, min(self.token_budget, n_tokens) // 2)
        warn(
            f"A batch of {n_tokens} tokens was too much for the memory of {self.torch_device}: it"
            f" is read again in batches of {self.token_budget}, and so are all later texts.",
        )

    @property
    def _device_kind(self) -> str:
        return batching.device_kind(self.torch_device)

    @property
    def _text_config(self) -> PretrainedConfig:
        return self.config.get_text_config()

    @_LoadedOnce
    def _text_tokenizer(self) -> TextTokenizer:
        context_length = getattr(self._text_config, "max_position_embeddings", None)
        return TextTokenizer(self.tokenizer, context_length, self.model)

    @property
    def _forward_pass(self) -> ForwardPass:
        return self._forward_pass_to(self.n_layers)

    def _forward_pass_to(self, layer: int) -> ForwardPass:
        """The forward pass, with all weights up to `layer` loaded."""
        if layer > self._depth:  # else another thread's loading is not waited for
            with self._loading:
                if layer > self._depth:
                    self._load_layers(layer)
        return self._any_depth_pass

    def _with_layers(self, layer: int, use: Callable[[ForwardPass], Any]) -> Any:
        """What `use` returns, called with the forward pass of at least the layers up to `layer`."""
        forward_pass = self._forward_pass_to(layer)
        try:
            return use(forward_pass)
        except NotLoadedError:  # the network uses layers that it does not run, as BigBird does
            with self._loading:
                if self._depth < self.n_layers:
                    self._depth = 0  # no part of the old network is used again
                    self._load_layers(self.n_layers)
            return use(self._forward_pass)

    def _load_layers(self, depth: int) -> None:
        """Load the layers up to `depth` that are missing."""
        self._check_files()
        network, depth = self._load_network(range(self._depth, depth))
        if self._depth == 0:
            self._any_depth_pass = ForwardPass(
                network,
                self._text_tokenizer,
                self._text_config,
                kind=self._device_kind,
                dtype=self.torch_dtype,
                name=repr(self),
            )
        else:  # threads that run the layers below are not disturbed
            missing = range(self._depth, depth)
            move_layers(network, self._any_depth_pass.network, missing, self.n_layers)
        self._depth = depth

    def _load_network(self, layers: range) -> tuple[PreTrainedModel, int]:
        """The network with some of its layers, and the layer up to which all are loaded."""
        return load_network(
            self._from_pretrained,
            self.config,
            layers,
            model=self.model,
            source=self._source,
            device=self.torch_device,
            dtype=self.torch_dtype,
            kwargs=(self.model_kwargs or {}) | self._pinned_kwargs,
        )

    @_LoadedOnce
    def _source(self) -> str:
        """What `from_pretrained` is given: a folder or a Hub id."""
        return model_source(self.model, self.model_kwargs)

    @property
    def _pinned_kwargs(self) -> dict[str, Any]:
        """Keyword arguments that load the same commit that the fingerprint identifies."""
        revision = self.revision
        pinned = {} if revision is None else {"revision": revision}
        return access_kwargs(self.model_kwargs) | pinned

    def _from_pretrained(self, auto_class: type, **kwargs: Any) -> Any:
        loaded = load_pretrained(auto_class, self._source, **kwargs)
        if "_file_signatures" in vars(self):
            self._check_files()
        return loaded

    def _check_files(self) -> None:
        """Refuse a local model whose files have changed since the first call."""
        signatures = self.file_signatures
        if vars(self).setdefault("_file_signatures", signatures) != signatures:
            raise RuntimeError(
                f"The files of {self.model!r} have changed since this process first read them:"
                " make a new FrozenLLM, or restart the process."
            )


_shared: dict[tuple[str, str], tuple[list[tuple[int, ...]], FrozenLLM]] = {}
_sharing = ForkSafeLock()


def shared_llm(
    model: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    model_kwargs: dict[str, Any] | None = None,
) -> FrozenLLM:
    """The process's only `FrozenLLM` of these arguments; a new one if its files have changed."""
    name = os.fspath(model)
    name = os.path.abspath(name) if os.path.exists(name) else name
    llm = FrozenLLM(name, device=device, dtype=dtype, model_kwargs=model_kwargs)
    key = name, repr((llm.torch_device, llm.torch_dtype, sorted((model_kwargs or {}).items())))
    signatures = llm.file_signatures
    with _sharing:
        cached = _shared.get(key)
        if cached is None or cached[0] != signatures:
            _shared[key] = cached = signatures, llm
        return cached[1]

"""The frozen language model: load it, and run texts through it up to the layer asked for.

Weights never change here, no gradient is kept, and no layer above the one asked for is computed.
It knows neither scikit-learn nor the head.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import numbers
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from sklearn_relish.llm.batch_invariance import JOINT_TOKENS, ROW_STEP, BatchInvariant
from sklearn_relish.llm.gguf import converted_gguf
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.utils.devices import computes_bfloat16, resolve_device
from sklearn_relish.utils.files import file_digest, file_stamp
from sklearn_relish.utils.locks import FairLock, ForkSafeLock, renew_in_forked_child
from sklearn_relish.utils.messages import warn

# Tokens of a batch, padding included. On a CPU more is no faster; the others are not measured yet.
# It is halved where a batch is too much for the memory.
TOKEN_BUDGET = {"cpu": 1_024, "mps": 8_192, "cuda": 16_384}
# The shortest text of a padded batch, as a part of the longest, and the padded tokens up to which
# this does not matter. On a CPU there is no padding; the others are not measured.
SHORTEST = {"cpu": 1.0, "mps": 0.875, "cuda": 0.875}
ENOUGH_TOKENS = {"cpu": 0, "mps": 4_096, "cuda": 4_096}
TOKENIZE_TEXTS = 256  # texts tokenized at once, each token of which takes 100 bytes then
TOKEN_CHARACTERS = 16  # characters of a long text that are tokenized for each token wanted
CUT_CHARACTERS = 512  # at the cut, where the tokens may be others than those of the whole text
WINDOW_TEXTS = 4_096  # texts sorted by length together, while the next so many are tokenized
GROUP_BUDGETS = 16  # budgets of tokens in windows that are read before their texts are joined
OVERLAP = 4  # a window of a long text has one in so many of its tokens from the one before
MODEL_SUFFIXES = {".bin", ".jinja", ".json", ".model", ".py", ".safetensors", ".spm", ".txt"}
# Keyword arguments that find a model; configuration and tokenizer take them too.
ACCESS_KWARGS = frozenset(
    ["cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"]
)
# Keyword arguments that leave the states as they are: they find a model, or place it.
NEUTRAL_KWARGS = ACCESS_KWARGS - {"subfolder"} | {"device_map", "max_memory", "offload_folder"}


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
        with instance._loading:
            if self.name not in vars(instance):
                vars(instance)[self.name] = self.load(instance)
            return vars(instance)[self.name]


class FrozenLLM:
    """A frozen language model that answers with the states of each token.

    Nothing is loaded before the first text is read. An instance may be shared by any number of
    estimators: it is never copied, neither by `sklearn.base.clone` nor by `copy.deepcopy`, and a
    pickle holds its name alone.

    Parameters
    ----------
    model : str or path
        Hub id, local folder, or path of a ``.gguf`` file. A causal LLM or an encoder (of an
        encoder-decoder, the encoder is read). A ``.gguf`` file is converted once and kept as
        safetensors in the user's cache folder; the extra ``gguf`` is needed for that.
    device : str or torch.device, default=None
        Where the model runs. None: ``"cuda"`` where there is one, else ``"mps"``, else ``"cpu"``.
    dtype : {"auto", "float32", "bfloat16", "float16"} or torch.dtype, default="auto"
        Of weights and states. ``"auto"`` is bfloat16 where the hardware computes in it, else
        float32.
    model_kwargs : dict, default=None
        Passed to `from_pretrained` of the model, and to those of its configuration and tokenizer
        as far as they concern them: ``revision``, ``device_map``, ``quantization_config``,
        ``token``, ``attn_implementation``, ... Only safetensors weights are loaded unless
        ``use_safetensors=False`` is among them, and no code from the Hub runs unless
        ``trust_remote_code=True`` is.

    Raises
    ------
    OSError
        On first use, if no such model is found; the message says what was tried.

    Examples
    --------
    >>> from sklearn_relish import FrozenLLM
    >>> llm = FrozenLLM("HuggingFaceTB/SmolLM2-135M", device="cpu")
    >>> llm
    FrozenLLM('HuggingFaceTB/SmolLM2-135M', device='cpu')
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.model = os.fspath(model)
        self.device = device
        self.dtype = dtype
        self.model_kwargs = model_kwargs
        self._packing: dict[tuple[int, int], str | None] = {}  # by layer and number of threads
        self._renew_locks()
        renew_in_forked_child(self, FrozenLLM._renew_locks)

    def _renew_locks(self) -> None:
        self._loading = threading.RLock()
        self._passing = FairLock()  # one batch at a time goes through the network
        self._tokenizing = FairLock()  # for tokenizers that are not thread-safe

    def __repr__(self) -> str:
        given = "".join(
            f", {name}={value!r}"
            for name, value, default in (
                ("device", self.device, None),
                ("dtype", self.dtype, "auto"),
                ("model_kwargs", self._told_kwargs, None),
            )
            if value != default
        )
        return f"FrozenLLM({self.model!r}{given})"

    @property
    def _told_kwargs(self) -> dict[str, Any] | None:
        """The model's keyword arguments without the secret among them."""
        given = self.model_kwargs
        return given and {name: v if name != "token" else "..." for name, v in given.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenLLM:
        return self

    __copy__ = __sklearn_clone__ = lambda self: self

    def __getstate__(self) -> dict[str, Any]:
        """For what keeps objects by their state, as skops does; a pickle goes by `__reduce__`."""
        device = None if self.device is None else str(self.device)
        dtype = str(self.dtype).removeprefix("torch.")
        return {
            "model": self.model,
            "device": device,
            "dtype": dtype,
            "model_kwargs": self.model_kwargs,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __reduce__(self) -> tuple[Any, ...]:
        return shared_llm, (self.model, self.device, self.dtype, self.model_kwargs)

    @cached_property
    def torch_device(self) -> torch.device:
        """The device that `device` stands for on this machine."""
        return resolve_device(self.device)

    @cached_property
    def torch_dtype(self) -> torch.dtype:
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
    def n_layers(self) -> int:
        """Layers of the model, read from its configuration alone."""
        return self._text_config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        """Size D of a token's state."""
        return self._text_config.hidden_size

    def state_sizes(self, layer: int) -> set[int]:
        """Sizes D that a token's state may have at a layer, from 1 to `n_layers`."""
        sizes = {self.hidden_size}
        if layer == self.n_layers:  # some models project the last layer's states
            sizes.add(getattr(self._text_config, "word_embed_proj_dim", None) or self.hidden_size)
        return sizes

    def resolve_layer(self, layer: int | float) -> int:
        """The layer that `layer` stands for, from 1 to `n_layers`.

        Parameters
        ----------
        layer : int or float
            A number from 1 to `n_layers`; a negative one, counted from the end, -1 being the
            last, read after the final norm; or a share of the depth in (0, 1].

        Raises
        ------
        ValueError
            If the model has no such layer.
        """
        if not isinstance(layer, numbers.Integral) and 0 < layer <= 1:
            return max(1, round(float(layer) * self.n_layers))
        number = layer if layer > 0 else self.n_layers + 1 + layer
        if layer == 0 or not 1 <= number <= self.n_layers or number != int(number):
            raise ValueError(
                f"layer={layer} is none of {self.model!r}, which has {self.n_layers} layers: pass"
                f" 1 to {self.n_layers}, -{self.n_layers} to -1, or a share of the depth in (0, 1]."
            )
        return int(number)

    @_LoadedOnce
    def fingerprint(self) -> str:
        """What identifies weights and tokenizer: the Hub's commit, or a digest of the files."""
        digest = hashlib.sha256()
        self._stamps = self.stamps
        if os.path.exists(self.model):
            for path in self.files:
                digest.update(file_digest(path).encode())
        else:
            digest.update(f"{self.model}@{self.revision}".encode())
        changes = {
            name: value
            for name, value in (self.model_kwargs or {}).items()
            if name not in NEUTRAL_KWARGS
        }
        told = json.dumps(changes, sort_keys=True, default=_told) if changes else "[]"
        digest.update(told.encode())
        return digest.hexdigest()[:32]

    @property
    def revision(self) -> str | None:
        """The Hub's commit of the model; None for one that is local."""
        return None if os.path.exists(self.model) else getattr(self.config, "_commit_hash", None)

    @property
    def files(self) -> list[Path]:
        """What makes a local model: weights, configuration, tokenizer; none for one of the Hub."""
        path = Path(self.model)
        if path.is_file():
            return [path]
        folder = path / (self.model_kwargs or {}).get("subfolder", "")
        if not folder.is_dir():
            return []
        return sorted(file for file in folder.iterdir() if file.suffix in MODEL_SUFFIXES)

    @property
    def stamps(self) -> list[tuple[int, ...]]:
        """What changes when one of the files does."""
        return [file_stamp(path) for path in self.files]

    @_LoadedOnce
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        return self._from_pretrained(AutoConfig, **self._access_kwargs)

    @_LoadedOnce
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded on first use."""
        tokenizer = self._from_pretrained(AutoTokenizer, **self._pinned_kwargs)
        if tokenizer.is_fast:  # a state that calls would change, each for all threads
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        return tokenizer

    @_LoadedOnce
    def network(self) -> PreTrainedModel:
        """The model itself, loaded on first use: its text layers, without a head."""
        with _quiet_loading():
            defaults = {"use_safetensors": True, "dtype": self.torch_dtype}
            kwargs = defaults | (self.model_kwargs or {}) | self._pinned_kwargs
            if kwargs.get("quantization_config") is not None:
                kwargs.setdefault("device_map", {"": self.torch_device})
            network, found = self._from_pretrained(AutoModel, output_loading_info=True, **kwargs)
            # Encoders are often published without their pooler, which is not read here.
            missing = sorted(name for name in found["missing_keys"] if "pooler" not in name)
            if missing:  # Transformers would fill them with random numbers
                raise OSError(
                    f"The weights of {self.model!r} are incomplete: {len(missing)} tensors are"
                    f" missing, the first is {missing[0]!r}. Get the model again."
                )
            if kwargs.get("device_map") is None:
                network = network.to(self.torch_device)
            seq2seq = self.config.is_encoder_decoder
            network = network.get_encoder() if seq2seq else network.get_decoder()
            network.config.use_cache = False
            return network.eval().requires_grad_(False)

    def as_chat(self, texts: list[str]) -> list[str]:
        """Each text as what a user says to a chat model, up to where its answer begins.

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
        """
        tokenizer = self.tokenizer
        if not tokenizer.chat_template:
            raise ValueError(
                f"The tokenizer of {self.model!r} has no chat template: name a model that was"
                " tuned for chat, or pass chat_template=False."
            )
        turns = [[{"role": "user", "content": text}] for text in texts]
        chats = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        begin = tokenizer.bos_token or ""
        with self._tokenizer_lock:
            begins = bool(begin) and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        return [chat.removeprefix(begin) for chat in chats] if begins else chats

    def read(
        self, texts: list[str], *, layers: Sequence[int], max_length: int, windows: bool = False
    ) -> Iterator[tuple[np.ndarray, list[TokenStates], np.ndarray]]:
        """States of texts, batch by batch; of each some thousands of texts the longest first.

        One pass gives the states at all layers that are asked for; none above them is computed.

        On a CPU the states of a text are the same to the last bit in any batch, see
        `sklearn_relish.llm.batch_invariance`: texts are packed one after the other, without
        padding, if the model computes the same for them as for each alone, and batches have texts
        of one length otherwise. Other devices pad texts of similar length; there the states of a
        text depend on its batch, by the rounding of the dtype.

        Parameters
        ----------
        texts : list of str
        layers : sequence of int
            Each from 1 to `n_layers`, see `resolve_layer`.
        max_length : int
            Tokens of a text that are read, special tokens counted in; never more than the model's
            own window.
        windows : bool, default=False
            Whether a longer text is read in windows of so many tokens instead of being cut. Each
            shares a quarter with the one before, from which its tokens have their context; the
            states of a text are those of its tokens, once each.

        Yields
        ------
        rows : int64 array of shape (B,)
            Which texts the batch holds.
        states : list of TokenStates
            Their states at each of `layers`, on the CPU, in the model's dtype.
        full_lengths : int64 array of shape (B,)
            Tokens of each text before it was cut; of a very long one that is cut, at least so many.

        Raises
        ------
        FloatingPointError
            If the model's states overflow its dtype.
        ValueError
            If windows of `max_length` have no room beside the special tokens.
        torch.OutOfMemoryError
            If a single text is too much for a CUDA device's memory.

        Warns
        -----
        UserWarning
            If a batch was too much for a CUDA device's memory, and smaller ones are made.
        """
        with ThreadPoolExecutor(1) as beside:
            tokenized = self._tokenize(texts[:WINDOW_TEXTS], max_length, windows)
            for start in range(0, len(texts), WINDOW_TEXTS):
                pieces, full_lengths = tokenized
                following = texts[start + WINDOW_TEXTS : start + 2 * WINDOW_TEXTS]
                if following:
                    waiting = beside.submit(self._tokenize, following, max_length, windows)
                for group in _grouped(pieces, GROUP_BUDGETS * self.token_budget):
                    batches = self._read_tokens([piece.ids for piece in group], layers)
                    for rows, states in _joined(batches, group):
                        yield rows + start, states, full_lengths[rows]
                if following:
                    tokenized = waiting.result()

    def tokens(
        self, texts: list[str], *, max_length: int, windows: bool = False
    ) -> list[tuple[list[str], np.ndarray]]:
        """The tokens whose states `read` gives, as pieces of the text.

        Parameters
        ----------
        texts : list of str
        max_length : int
        windows : bool, default=False
            As of `read`.

        Returns
        -------
        list of (list of str, int64 ndarray of shape (n_tokens, 2))
            For each text its tokens' pieces of it, and where they begin and end in it. A special
            token, which is no piece of the text, goes by its name and has an empty span; tokens
            that make a character together each have all of it.

        Raises
        ------
        ValueError
            If the model's tokenizer can't tell: only a fast tokenizer can.
        """
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} of {self.model!r} can't tell which piece of the"
                " text a token is: only a fast tokenizer can."
            )
        found, window = [], self._window(max_length)
        for text in texts:
            ((ids, special, spans, shift),) = self._encode([text], None if windows else window)
            if not windows and len(ids) > window:
                kept = self._cut(special, window)
                ids, spans = [ids[i] for i in kept], [spans[i] for i in kept]
            spans = [(a + shift, b + shift) if b > a else (a, b) for a, b in spans]
            if not ids:
                ids, spans = [self._filler_id], [(0, 0)]
            names = self.tokenizer.convert_ids_to_tokens(ids)
            pieces = [
                text[begin:end] or name for (begin, end), name in zip(spans, names, strict=True)
            ]
            found.append((pieces, np.array(spans, dtype=np.int64)))
        return found

    def _window(self, max_length: int) -> int:
        """Tokens that are read at once."""
        if max_length < 1:
            raise ValueError(f"max_length must be 1 or more, got {max_length}.")
        limits = (
            self.tokenizer.model_max_length,
            getattr(self._text_config, "max_position_embeddings", None),
        )
        # A model without positions of its own says None or -1.
        return min([max_length, *(limit for limit in limits if limit and limit > 0)])

    def _read_tokens(
        self, tokens: list[np.ndarray], layers: Sequence[int]
    ) -> Iterator[tuple[np.ndarray, list[TokenStates]]]:
        """States of tokenized texts, the longest first, under the token budget.

        On a CUDA device a batch is on its way before the one before it is waited for.
        """
        lengths = np.array([len(ids) for ids in tokens])
        longest_first = np.argsort(-lengths, kind="stable")
        shortest, enough = SHORTEST[self._kind], ENOUGH_TOKENS[self._kind]
        packs = len(tokens) > 1 and self._packs(max(layers)) is not None
        start, before = 0, None  # `before` has been started and not been finished
        while start < len(tokens) or before is not None:
            started = None
            if start < len(tokens):
                longest = int(lengths[longest_first[start]])
                rows = longest_first[start : start + max(1, self.token_budget)]
                if packs:
                    fits = lengths[rows].cumsum() <= self.token_budget
                else:
                    rows = rows[: max(1, self.token_budget // longest)]
                    fits = lengths[rows] >= shortest * longest
                    fits[: enough // longest] = True
                fits[0] = True
                rows = rows[fits]
                try:
                    started = rows, self._start_pass([tokens[row] for row in rows], layers)
                    start += len(rows)
                except torch.OutOfMemoryError:
                    if len(rows) == 1 and before is None:
                        raise
                    if len(rows) > 1:
                        self._halve_budget(len(rows) * longest)
            if before is None and started is not None and not started[1].done:
                before, started = started, None  # there is nothing to wait for
            if before is not None:
                yield before[0], self._finish_pass(before[1], layers)
            before = started

    @cached_property
    def token_budget(self) -> int:
        """Padded tokens of a batch; less once that has been too much for the device's memory."""
        return TOKEN_BUDGET[self._kind]

    @property
    def _kind(self) -> str:
        """The kind of device whose figures hold for this one."""
        return self.torch_device.type if self.torch_device.type in TOKEN_BUDGET else "cuda"

    def _halve_budget(self, n_tokens: int) -> None:
        """Make batches smaller than one of `n_tokens` that did not fit."""
        self.token_budget = max(1, min(self.token_budget, n_tokens) // 2)
        warn(
            f"A batch of {n_tokens} tokens was too much for the memory of {self.torch_device}: it"
            f" is read again in batches of {self.token_budget}, and so is all that follows.",
        )

    def _tokenize(
        self, texts: list[str], max_length: int, windows: bool
    ) -> tuple[list[_Piece], np.ndarray]:
        """Token ids of each text, cut or in windows, and how many there are without that."""
        window = self._window(max_length)
        pieces: list[_Piece] = []
        full_lengths = np.empty(len(texts), dtype=np.int64)
        for start in range(0, len(texts), TOKENIZE_TEXTS):
            encoded = self._encode(
                texts[start : start + TOKENIZE_TEXTS], None if windows else window
            )
            for row, (ids, special, _, _) in enumerate(encoded, start):
                full_lengths[row] = len(ids)
                if len(ids) > window and windows:
                    pieces += self._windows(row, ids, special, window)
                    continue
                if len(ids) > window:
                    ids = [ids[i] for i in self._cut(special, window)]
                ids = np.asarray(ids or [self._filler_id], dtype=np.int64)
                pieces.append(_Piece(row, ids, 0, len(ids), 1))
        return pieces, full_lengths

    def _encode(self, texts: list[str], window: int | None) -> list[_Encoded]:
        """Tokens of texts; of a text that is cut to a window, only of a part that is long enough.

        A tokenizer takes 0.3 KB and 2.5 microseconds a character, so 5 MB of text would take 12 s.
        """
        tokenizer, left = self.tokenizer, self._truncates_left
        parts, n_characters = list(texts), None
        if window is not None:
            n_characters = TOKEN_CHARACTERS * window + 2 * CUT_CHARACTERS
        encoded: list[_Encoded | None] = [None] * len(texts)
        pending = list(range(len(texts)))
        while pending:
            if n_characters is not None:
                for i in pending:
                    text = texts[i]
                    parts[i] = text[-n_characters:] if left else text[:n_characters]
            with self._tokenizer_lock:
                found = tokenizer(
                    [parts[i] for i in pending],
                    verbose=False,
                    return_special_tokens_mask=True,
                    return_offsets_mapping=tokenizer.is_fast,
                )
            for place, i in enumerate(pending):
                ids = found["input_ids"][place]
                spans = found["offset_mapping"][place] if tokenizer.is_fast else []
                special = found["special_tokens_mask"][place]
                shift = len(texts[i]) - len(parts[i]) if left else 0
                text = _Encoded(ids, special, spans, shift)
                if len(parts[i]) == len(texts[i]) or self._is_enough(text, window, n_characters):
                    encoded[i] = text
            pending = [i for i in pending if encoded[i] is None]
            if n_characters is not None:
                n_characters *= 4
        return encoded

    def _is_enough(self, text: _Encoded, window: int, n_characters: int) -> bool:
        """Whether the tokens of a window lie clear of the place where a part of a text was cut."""
        if not text.spans:  # a slow tokenizer does not say where they lie
            return len(text.ids) >= window + CUT_CHARACTERS
        if len(text.ids) < window:
            return False
        places = [text.spans[i] for i in self._cut(text.special, window) if not text.special[i]]
        if self._truncates_left:
            return all(begin >= CUT_CHARACTERS for begin, _ in places)
        return all(end <= n_characters - CUT_CHARACTERS for _, end in places)

    def _cut(self, special: list[int], window: int) -> list[int]:
        """Which tokens of a text stay in a window: the special ones around it, and what fits in."""
        n_before, n_after = _special_ends(special)
        places = range(len(special))
        content = places[n_before : len(places) - n_after]
        room = max(0, window - n_before - n_after)
        content = content[len(content) - room :] if self._truncates_left else content[:room]
        return [*places[:n_before], *content, *places[len(places) - n_after :]][:window]

    @property
    def _truncates_left(self) -> bool:
        return getattr(self.tokenizer, "truncation_side", "right") == "left"

    @property
    def _tokenizer_lock(self) -> AbstractContextManager:
        """A fast tokenizer whose truncation and padding stay off is thread-safe."""
        return nullcontext() if self.tokenizer.is_fast else self._tokenizing

    def _windows(self, row: int, ids: list[int], special: list[int], window: int) -> list[_Piece]:
        """A long text's windows; each has the special tokens, of which the outermost tell."""
        n_before, n_after = _special_ends(special)
        content = ids[n_before : len(ids) - n_after]
        n_content, overlap = window - n_before - n_after, window // OVERLAP
        if n_content <= overlap:
            raise ValueError(
                f"Windows of {window} tokens have no room for a text beside the special tokens of"
                f" {self.model!r}: raise max_length."
            )
        starts = range(0, max(1, len(content) - overlap), n_content - overlap)
        pieces = []
        for start in starts:
            some = [
                *ids[:n_before],
                *content[start : start + n_content],
                *ids[len(ids) - n_after :],
            ]
            begin = n_before + overlap if start > 0 else 0
            end = len(some) if start == starts[-1] else len(some) - n_after
            pieces.append(_Piece(row, np.array(some, dtype=np.int64), begin, end, len(starts)))
        return pieces

    @property
    def _filler_id(self) -> int:
        """A token for a text that has none, and for padding where there is no padding token."""
        tokenizer = self.tokenizer
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
            if token is not None:
                return token
        return 0

    def _start_pass(self, tokens: list[np.ndarray], layers: Sequence[int]) -> _Pass:
        """Send a batch through the model; on a CUDA device most of it is left to do on return."""
        lengths = torch.tensor([len(ids) for ids in tokens])
        n_texts, longest = len(lengths), int(lengths.max())
        inputs: dict[str, Tensor] = {}
        real, context = None, nullcontext()
        packed = self._packs(max(layers)) if n_texts > 1 else None
        if packed:
            inputs, context = self._packed(tokens, packed)
        elif int(lengths.min()) == longest:
            inputs["input_ids"] = torch.from_numpy(np.stack(tokens))  # (B, S)
            if self._kind == "cpu":
                context = BatchInvariant()
        else:  # padding stands on the right, where a causal model does not look back at it
            padding = self.tokenizer.pad_token_id
            mask = torch.arange(longest) < lengths[:, None]  # (B, S)
            ids = torch.full(mask.shape, self._filler_id if padding is None else padding)
            ids[mask] = torch.from_numpy(np.concatenate(tokens))
            inputs = {"input_ids": ids, "attention_mask": mask.long()}
            real = mask.flatten().nonzero()[:, 0]  # (n_tokens,)
        with self._passing, torch.inference_mode(), context:
            device = self.network.device
            found = self._states_at(
                layers, **{name: _sent(tensor, device) for name, tensor in inputs.items()}
            )
            values, finite, done = [], [], []
            for states in found:
                # Some models pad further, to a multiple of their attention window.
                if packed:
                    some = states[0, : int(lengths.sum())]  # without what fills it up
                else:
                    some = states[:, :longest].reshape(n_texts * longest, -1)
                if real is not None:
                    some = some[_sent(real, some.device)]  # (n_tokens, D)
                # From a CUDA device to pinned memory: the device need not stop for it.
                finite.append(some.isfinite().all().to("cpu", non_blocking=True))
                values.append(some.to("cpu", non_blocking=True))
                if some.is_cuda:
                    done.append(torch.cuda.current_stream(some.device).record_event())
            return _Pass(values, lengths, finite, done)

    def _packed(
        self, tokens: list[np.ndarray], attention: str
    ) -> tuple[dict[str, Tensor], BatchInvariant]:
        """Inputs of texts packed in one row, filled up to a multiple of ROW_STEP tokens."""
        lengths = [len(ids) for ids in tokens]
        n_filling = -sum(lengths) % ROW_STEP
        if n_filling:
            tokens = [*tokens, np.full(n_filling, self._filler_id)]
            lengths.append(n_filling)
        inputs = {
            "input_ids": torch.from_numpy(np.concatenate(tokens))[None],  # (1, S)
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        }
        return inputs, BatchInvariant(lengths, joint=attention == "joint")

    def _packs(self, layer: int) -> str | None:
        """How attention treats packed texts, so that each gets the bits at a layer of it alone.

        ``"joint"`` or ``"separate"``; None if texts must not be packed. This is measured once for
        a layer and a number of threads: a model with convolutions or recurrent layers, without
        position ids, or with an attention of its own would mix the texts.
        """
        if self._kind != "cpu" or self.network.device.type != "cpu":
            return None
        key = layer, torch.get_num_threads()
        if key not in self._packing:
            ways = ["separate"] if self.torch_dtype == torch.float32 else ["joint", "separate"]
            self._packing[key] = next((way for way in ways if self._packs_as(way, layer)), None)
        return self._packing[key]

    def _packs_as(self, attention: str, layer: int) -> bool:
        """Whether packed texts have the bits at a layer that each has alone."""
        generator = np.random.default_rng(0)
        longest = min(JOINT_TOKENS + 6, self._window(2 * JOINT_TOKENS))
        texts = [
            generator.integers(self._text_config.vocab_size, size=min(length, longest))
            for length in (longest, 33, 33, 9, 9, 9, 3)
        ]
        with self._passing, torch.inference_mode():
            try:
                inputs, context = self._packed(texts, attention)
                with context:
                    (packed,) = self._states_at([layer], **inputs)
                alone = []
                for ids in texts:
                    with BatchInvariant():
                        alone += self._states_at([layer], input_ids=torch.from_numpy(ids)[None])
                alone = torch.cat(alone, dim=1)[0]
                return context.n_attentions > 0 and torch.equal(packed[0, : len(alone)], alone)
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                return False  # it does not take these inputs

    def _finish_pass(self, unfinished: _Pass, layers: Sequence[int]) -> list[TokenStates]:
        for event in unfinished.done:
            event.synchronize()
        for layer, finite in zip(layers, unfinished.finite, strict=True):
            if not finite:
                advice = (
                    "the weights are damaged, or the model is broken at this layer: try another one"
                    if self.torch_dtype == torch.float32
                    else "pass dtype='float32'"
                )
                raise FloatingPointError(
                    f"{self!r} gives states that are not finite at layer {layer} in"
                    f" {self.torch_dtype}: {advice}."
                )
        lengths = unfinished.lengths
        return [TokenStates.from_lengths(values, lengths) for values in unfinished.values]

    def _states_at(self, layers: Sequence[int], **inputs: Tensor) -> list[Tensor]:
        """Outputs of layers; the last one's after the final norm. Nothing above them runs."""
        reached: dict[int, Tensor] = {}
        deepest = max(layers)

        def hook(layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            reached[layer] = output[0] if isinstance(output, tuple) else output
            if layer == deepest:
                raise _DeepestReached

        with ExitStack() as hooks:
            for layer in set(layers) - {self.n_layers}:
                handle = self._layers[layer - 1].register_forward_hook(partial(hook, layer))
                hooks.callback(handle.remove)
            with suppress(_DeepestReached):
                reached[self.n_layers] = self.network(**inputs).last_hidden_state
        if deepest not in reached:
            raise RuntimeError(f"The pass of {self!r} did not go through layer {deepest}.")
        return [reached[layer] for layer in layers]

    @cached_property
    def _layers(self) -> nn.ModuleList:
        for parent in self.network.modules():
            lists = [
                child
                for child in parent.children()
                if isinstance(child, nn.ModuleList) and len(child) == self.n_layers
            ]
            if len(lists) == 1:
                return lists[0]
            if lists:  # the parts of a layer in lists of their own: none of them gives its state
                break
        raise ValueError(
            f"{self.model!r} is a {type(self.network).__name__}, whose {self.n_layers} layers are"
            " not one torch.nn.ModuleList: read its last layer, layer=-1."
        )

    @property
    def _text_config(self) -> PretrainedConfig:
        return self.config.get_text_config()

    @property
    def _access_kwargs(self) -> dict[str, Any]:
        given = self.model_kwargs or {}
        access = {name: value for name, value in given.items() if name in ACCESS_KWARGS}
        # Left at None, Transformers would ask on the terminal.
        return {"trust_remote_code": given.get("trust_remote_code", False), **access}

    @property
    def _pinned_kwargs(self) -> dict[str, Any]:
        """The same, with the very commit that the fingerprint speaks of."""
        revision = self.revision
        return self._access_kwargs | ({} if revision is None else {"revision": revision})

    @_LoadedOnce
    def _source(self) -> str:
        """What `from_pretrained` is given: a folder or a Hub id."""
        if self.model.endswith(".gguf"):
            if not os.path.isfile(self.model):
                raise FileNotFoundError(f"No model file at {os.path.abspath(self.model)}.")
            with _quiet_loading():
                return str(converted_gguf(Path(self.model)))
        folder = Path(self.model, (self.model_kwargs or {}).get("subfolder", ""))
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"The folder {folder.absolute()} holds no model: it has no config.json."
            )
        return self.model

    def _from_pretrained(self, auto_class: type, **kwargs: Any) -> Any:
        source = self._source
        try:
            loaded = auto_class.from_pretrained(source, **kwargs)
            if "fingerprint" in vars(self) and self._stamps != self.stamps:
                raise RuntimeError(
                    f"The files of {self.model!r} have changed since this process first looked at"
                    " them: make a new FrozenLLM, or start again."
                )
            return loaded
        except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "mismatched_sizes" not in str(error):
                raise
            raise OSError(
                f"{auto_class.__name__} can't load {os.path.abspath(source)}: its files are damaged"
                f" or do not fit together ({' '.join(str(error).split())}). Get the model again."
            ) from error
        except OSError as error:
            if os.path.isdir(source):
                what = f"{auto_class.__name__} can't load the folder {os.path.abspath(source)}"
            else:
                what = (
                    f"No model {source!r} was found: tried the folder {os.path.abspath(source)}"
                    f" and the Hugging Face Hub's {source!r}"
                )
            raise OSError(
                f"{what} ({' '.join(str(error).split())}). Pass model= the path of a local folder"
                " with config.json, a tokenizer and safetensors weights, the path of a .gguf file,"
                " or a Hub id that this machine can reach or has in its cache. For weights in"
                " another format, pass model_kwargs={'use_safetensors': False}."
            ) from error


def _told(value: Any) -> Any:
    """A value of `model_kwargs` as JSON tells it, the same before and after it has been kept."""
    return value.to_dict() if hasattr(value, "to_dict") else str(value).removeprefix("torch.")


class _Encoded(NamedTuple):
    """Tokens of a text: ids, which of them are special, and spans in the text from `shift` on."""

    ids: list[int]
    special: list[int]
    spans: list[tuple[int, int]]
    shift: int


def _special_ends(special: list[int]) -> tuple[int, int]:
    """How many special tokens stand before a text, and how many after it."""
    n_before = len(list(itertools.takewhile(bool, special)))
    n_after = len(list(itertools.takewhile(bool, reversed(special[n_before:]))))
    return n_before, n_after


class _Piece(NamedTuple):
    """Tokens that are read together: a text, or one window of a text.

    The states of tokens `begin` to `end` are the text's; it has `n_pieces` of them.
    """

    row: int
    ids: np.ndarray
    begin: int
    end: int
    n_pieces: int


def _grouped(pieces: list[_Piece], n_tokens: int) -> Iterator[list[_Piece]]:
    """Texts without windows all together, those in windows a few at a time, up to so many tokens.

    Their states can't be handed on before all windows of a text have been read.
    """
    whole = [piece for piece in pieces if piece.n_pieces == 1]
    if whole:
        yield whole
    group: list[_Piece] = []
    for piece in pieces:
        if piece.n_pieces > 1:
            group.append(piece)
            complete = sum(some.row == piece.row for some in group[-piece.n_pieces :])
            if complete == piece.n_pieces and sum(len(some.ids) for some in group) >= n_tokens:
                yield group
                group = []
    if group:
        yield group


def _joined(
    batches: Iterator[tuple[np.ndarray, list[TokenStates]]], pieces: list[_Piece]
) -> Iterator[tuple[np.ndarray, list[TokenStates]]]:
    """The same by text: those in windows once all of their windows have been read."""
    read: dict[int, dict[int, list[Tensor]]] = {}  # by text, window and layer
    for batch, states in batches:
        if pieces[batch[0]].n_pieces == 1:
            yield np.array([pieces[number].row for number in batch]), states
            continue
        values = [list(some) for some in states]
        for place, number in enumerate(batch):
            piece = pieces[number]
            windows = read.setdefault(piece.row, {})
            # A copy: a view would hold the whole batch.
            windows[number] = [some[place][piece.begin : piece.end].clone() for some in values]
            if len(windows) == piece.n_pieces:
                parts = zip(*(windows[number] for number in sorted(windows)), strict=True)
                text = [torch.cat(some) for some in parts]
                yield (
                    np.array([piece.row]),
                    [TokenStates.from_lengths(some, torch.tensor([len(some)])) for some in text],
                )
                del read[piece.row]


class _Pass(NamedTuple):
    """A batch that has been sent through the model; its `values` are there once it is `done`."""

    values: list[Tensor]  # a layer each
    lengths: Tensor
    finite: list[Tensor]
    done: list[torch.cuda.Event]


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; where that is a CUDA device, sent without waiting for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class _DeepestReached(Exception):  # noqa: N818, it is the way out and no error
    """Ends a forward pass that need not go on."""


_shared: dict[tuple[str, str], tuple[list[tuple[int, ...]], FrozenLLM]] = {}
_sharing = ForkSafeLock()


def shared_llm(
    model: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    model_kwargs: dict[str, Any] | None = None,
) -> FrozenLLM:
    """The process's one `FrozenLLM` of these arguments; a new one if its files have changed."""
    name = os.fspath(model)
    name = os.path.abspath(name) if os.path.exists(name) else name
    llm = FrozenLLM(name, device=device, dtype=dtype, model_kwargs=model_kwargs)
    key = name, repr((llm.torch_device, llm.torch_dtype, sorted((model_kwargs or {}).items())))
    stamps = llm.stamps
    with _sharing:
        known = _shared.get(key)
        if known is None or known[0] != stamps:
            _shared[key] = known = stamps, llm
        return known[1]


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Silence Transformers' bar over weights and its report on the head that is left out."""
    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()

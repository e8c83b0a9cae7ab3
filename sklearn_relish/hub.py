"""A fitted regressor as a folder, in the Hugging Face manner, with nothing to unpickle.

``config.json`` has the parameters and what was learned of the input, ``model.safetensors`` the
weights and arrays, ``README.md`` is a model card. All that is read is checked first: a folder may
come from anyone.

Saving over a model is atomic. ``config.json`` names its weights by their SHA-256. New weights are
first written as ``model-<SHA-256>.safetensors``, then ``config.json`` is replaced, which is the
moment of the change, then the weights are renamed to ``model.safetensors``. So the weights that
``config.json`` names are there at any time, under one of the two names, and a killed process leaves
a folder that opens.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from filelock import FileLock
from huggingface_hub import EvalResult, ModelCard, ModelCardData, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors
from sklearn.utils._param_validation import (
    Interval,
    StrOptions,
    validate_parameter_constraints,
)

from sklearn_relish.head.ensemble import RelishEnsemble
from sklearn_relish.head.head import RelishHead
from sklearn_relish.head.losses import LOSSES, make_loss
from sklearn_relish.llm.frozen import FrozenLLM
from sklearn_relish.training.conformal import Conformal
from sklearn_relish.utils.versions import FORMAT, STAMP, check_format, stamp, warn_versions

if TYPE_CHECKING:
    from sklearn_relish.regressor import RelishRegressor

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
PENDING = "model-{}.safetensors"  # weights until they are renamed to WEIGHTS
LOCK, PARTIAL = ".save.lock", ".save.partial"
WEIGHTS_DIGEST = "weights_sha256"
MOST_CONFIG_BYTES = 2**24
MOST_ITERATIONS = 1_000  # with shared weights no tensor bounds their number
ATTEMPTS, PAUSE_SECONDS = 20, 0.01  # to find the weights of a config.json that stays the same
OF_THE_MACHINE = ("memory", "device", "verbose", "random_state")  # parameters that are not kept
COUNT = [Interval(Integral, 1, None, closed="left")]
# What is kept of a fit, and what it must be; `_check_fitted` looks into lists and dicts.
FITTED: dict[str, list[Any]] = {
    "layer_": COUNT,
    "layer_scores_": [dict, None],
    "n_outputs_": COUNT,
    "n_features_in_": COUNT,
    "feature_names_in_": [list, None],
    "history_": [list],
    "best_epoch_": [list],
    "n_epochs_": [Interval(Integral, 0, None, closed="left")],
    "validation_score_": [Interval(Real, None, None, closed="neither"), None],
    "_column_names": [list],
    "_column_kinds": [list, None],
    "_y_shape": [list],
    "_llm_fingerprint": [str],
    "_llm_revision": [str, None],
    "head": [dict],
}
HEAD: dict[str, list[Any]] = {
    "sizes": [dict],
    "n_heads": COUNT,
    "linear_path": ["boolean"],
    "loss_fn": [dict],
}
SIZES: dict[str, list[Any]] = {
    "input_size": COUNT,
    "latent_size": COUNT,
    "n_heads": COUNT,
    "n_iterations": [Interval(Integral, 1, MOST_ITERATIONS, closed="both")],
    "n_outputs": COUNT,
    "share_weights": ["boolean"],
    "state_norm": [StrOptions({"rms"}), None],
}
LOSS: dict[str, list[Any]] = {"name": [StrOptions(set(LOSSES))], "quantiles": [list]}
# What a file may ask for in `model_kwargs`; anything else could run or write what it likes.
HARMLESS = {"revision": str, "subfolder": str, "quantization_config": dict}
ATTENTION = ("eager", "sdpa", "flash_attention_2")
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
    state = regressor.__getstate__()  # one consistent state, though another thread may fit
    if isinstance(state["model"], FrozenLLM):
        llm = state["model"]
        state |= {"model": llm.model, "dtype": llm.dtype, "model_kwargs": llm.model_kwargs}
    state["dtype"] = str(state["dtype"]).removeprefix("torch.")
    kwargs = state["model_kwargs"]
    if kwargs:  # a secret stays where it is
        state["model_kwargs"] = {name: kwargs[name] for name in kwargs if name != "token"}
    names = [name for name in regressor._get_param_names() if name not in OF_THE_MACHINE]
    parameters = {name: state[name] for name in names}
    head = state["head_"].__getstate__()
    del head["format"]  # the folder's own says it
    arrays = {f"head.{name}": array for name, array in head.pop("weights").items()}
    arrays |= {"_y_mean": state["_y_mean"], "_y_scale": state["_y_scale"]}
    if state["_conformal"] is not None:
        arrays["conformal.scores"] = state["_conformal"].scores
        arrays["conformal.weight"] = state["_conformal"].weight
    weights = to_safetensors({name: np.ascontiguousarray(some) for name, some in arrays.items()})
    config = {
        STAMP: stamp(),
        WEIGHTS_DIGEST: hashlib.sha256(weights).hexdigest(),
        "parameters": parameters,
        "fitted": {name: state.get(name) for name in FITTED} | {"head": head},
    }
    try:
        written = json.dumps(_without_nan(config), indent=2, default=_plain) + "\n"
    except TypeError as error:
        raise TypeError(f"A parameter can't be kept in {CONFIG}: {error}") from None
    # What is saved opens again.
    path = folder / CONFIG
    kept = _parsed(written.encode(), path)
    _check_config(kept, type(regressor), path)
    _check_shapes(kept["fitted"], {name: _header(array) for name, array in arrays.items()}, folder)
    _check_values(arrays, folder)
    card = _card(type(regressor), state, parameters, metrics)

    folder.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path) and not _is_ours(path):
        raise FileExistsError(
            f"{path.absolute()} is not a RelishRegressor's, and would be lost: choose another"
            " folder."
        )
    with _locked(folder):
        pending = folder / PENDING.format(config[WEIGHTS_DIGEST])
        _write(pending, weights)
        _write(path, written.encode())  # from here on the folder holds the new regressor
        os.replace(pending, folder / WEIGHTS)
        _write(folder / CARD, f"{card}".encode())
        for left_behind in folder.glob(PENDING.format("[0-9a-f]" * 64)):
            left_behind.unlink()


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
                    allow_patterns=[CONFIG, WEIGHTS, PENDING.format("[0-9a-f]" * 64)],
                )
            )
        except (OSError, ValueError) as error:
            raise OSError(
                f"No regressor {os.fspath(source)!r} was found: tried the folder"
                f" {os.path.abspath(source)} and the Hugging Face Hub"
                f" ({' '.join(str(error).split())})."
            ) from error
    config, arrays = _read(folder, cls)
    warn_versions(config[STAMP], cls.__name__)
    kept, fitted = config["parameters"], config["fitted"]
    if isinstance(parameters.get("model"), FrozenLLM):  # which has these itself
        kept |= {"dtype": "auto", "model_kwargs": None}
    elif "model_kwargs" in kept.keys() - parameters:
        kept["model_kwargs"] = _checked_kwargs(kept["model_kwargs"])
        if "model" not in parameters and fitted["_llm_revision"] is not None:
            pinned = {"revision": fitted["_llm_revision"]}
            kept["model_kwargs"] = pinned | (kept["model_kwargs"] or {})
    regressor = cls(**kept | parameters)
    head = fitted.pop("head") | {"format": FORMAT}
    head["weights"] = {
        name.removeprefix("head."): array
        for name, array in arrays.items()
        if name.startswith("head.")
    }
    regressor.head_ = RelishEnsemble.__new__(RelishEnsemble)
    regressor.head_.__setstate__(head)
    regressor._y_mean, regressor._y_scale = arrays["_y_mean"], arrays["_y_scale"]
    regressor._conformal = None
    if "conformal.scores" in arrays:
        scores, weight = arrays["conformal.scores"], arrays["conformal.weight"]
        regressor._conformal = Conformal(regressor.head_.loss_fn, scores, weight)
    fitted["_y_shape"] = (fitted["n_outputs_"],) if fitted["_y_shape"] else ()
    if fitted["layer_scores_"] is not None:
        fitted["layer_scores_"] = {int(n): r2 for n, r2 in fitted["layer_scores_"].items()}
    names = fitted.pop("feature_names_in_")
    if names is not None:
        regressor.feature_names_in_ = np.array(names, dtype=object)
    for name, value in fitted.items():
        setattr(regressor, name, value)
    return regressor


def _read(folder: Path, cls: type[RelishRegressor]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration and the weights that belong to it, checked.

    A process that saves meanwhile may take the weights away between the two; then there is a new
    configuration, and both are read again.
    """
    before, attempt = None, 0
    while attempt < ATTEMPTS:
        try:
            config = _parsed(_read_config(folder / CONFIG), folder / CONFIG)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{folder.absolute()} holds no regressor that save_pretrained has written: it has"
                f" no {CONFIG}."
            ) from None
        digest = config[WEIGHTS_DIGEST]
        for path in (folder / PENDING.format(digest), folder / WEIGHTS):
            with suppress(FileNotFoundError), _opened(path) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    continue
                try:
                    with safe_open(path, framework="numpy") as weights:
                        # No other file takes the number of one that is open.
                        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                            continue
                        return config, _checked(config, cls, weights, folder)
                except SafetensorError as error:
                    raise ValueError(
                        f"{path.absolute()} is not a valid safetensors file ({error}): save the"
                        " regressor again."
                    ) from None
        attempt = attempt + 1 if digest == before else 0
        before = digest
        time.sleep(PAUSE_SECONDS)
    if not (folder / WEIGHTS).exists():
        raise FileNotFoundError(
            f"{folder.absolute()} holds no regressor that save_pretrained has written: it has no"
            f" {WEIGHTS}."
        )
    raise ValueError(
        f"{(folder / WEIGHTS).absolute()} does not have the SHA-256 that {CONFIG} names as"
        f" {WEIGHTS_DIGEST}: it is truncated, altered or another regressor's. Copy the folder"
        " again, or save the regressor again."
    )


def _checked(
    config: dict[str, Any], cls: type[RelishRegressor], weights: Any, folder: Path
) -> dict[str, np.ndarray]:
    """The arrays, read after all else has been checked against their names and shapes."""
    _check_config(config, cls, folder / CONFIG)
    header = {}
    for name in weights.keys():  # noqa: SIM118, it is no dict
        tensor = weights.get_slice(name)
        header[name] = (tensor.get_dtype(), tuple(tensor.get_shape()))
    _check_shapes(config["fitted"], header, folder)
    arrays = {name: weights.get_tensor(name) for name in header}
    _check_values(arrays, folder)
    return arrays


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A regular file, opened without waiting for whatever else has its name."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path.absolute()} is not a regular file.")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _read_config(path: Path) -> bytes:
    with _opened(path) as file:
        content = file.read(MOST_CONFIG_BYTES + 1)
    _check_length(content, path)
    return content


def _check_length(content: bytes, path: Path) -> None:
    if len(content) > MOST_CONFIG_BYTES:
        raise ValueError(
            f"{path.absolute()} has more than {MOST_CONFIG_BYTES:,} bytes, too many for the"
            " configuration of a RelishRegressor."
        )


def _parsed(content: bytes, path: Path) -> dict[str, Any]:
    """A configuration of this format, of which no more than that is checked."""
    _check_length(content, path)
    try:
        config = json.loads(content, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path.absolute()} is not valid JSON: {reason}.") from None
    if not isinstance(config, dict) or STAMP not in config:
        raise ValueError(f"{path.absolute()} is not the configuration of a RelishRegressor.")
    check_format(config[STAMP], f"{path.absolute()}")
    fields = {STAMP: [dict], WEIGHTS_DIGEST: [str], "parameters": [dict], "fitted": [dict]}
    _check_fields(config, fields, path, "")
    digest = config[WEIGHTS_DIGEST]
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        _refuse(path, WEIGHTS_DIGEST, "must have 64 hexadecimal digits", digest)
    return config


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is not a finite number")
    return value


def _is_ours(config: Path) -> bool:
    """Whether a file may be replaced: it is a regressor's, of whatever format."""
    try:
        found = json.loads(_read_config(config))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and STAMP in found


def _refuse(path: Path, field: str, what: str, value: Any) -> NoReturn:
    shown = repr(value)
    shown = shown if len(shown) <= 100 else f"{shown[:100]}..."
    raise ValueError(f"{path.absolute()}: {field} {what}, got {shown}.")


def _check_fields(values: Any, fields: dict[str, list[Any]], path: Path, within: str) -> None:
    """A ValueError unless `values` has these fields and no others, each of its type and range."""
    for what, names in (("no", fields.keys() - values), ("an unknown", values.keys() - fields)):
        if names:
            listed = ", ".join(f"{within}{name}"[:100] for name in sorted(names)[:10])
            raise ValueError(
                f"{path.absolute()} has {what} field {listed}: it was altered, or saved by another"
                " version or a subclass. Open it with that, or save the regressor again."
            )
    for name, allowed in fields.items():
        if type(values[name]) is bool and within != "parameters." and "boolean" not in allowed:
            _refuse(path, f"{within}{name}", "must not be true or false", values[name])
        try:
            validate_parameter_constraints({name: allowed}, {name: values[name]}, "a folder")
        except ValueError as error:  # "The 'layer_' parameter of a folder must be ... Got 0 ..."
            what = str(error).partition(" of a folder ")[2].partition(" Got ")[0].rstrip(".")
            _refuse(path, f"{within}{name}", what, values[name])


def _check_config(config: dict[str, Any], cls: type[RelishRegressor], path: Path) -> None:
    """All that can be checked without the weights."""
    names = [name for name in cls._get_param_names() if name not in OF_THE_MACHINE]
    free = [object]  # of a subclass's own parameters nothing is known
    constraints = {name: cls._parameter_constraints.get(name, free) for name in names}
    _check_fields(config["parameters"], constraints, path, "parameters.")
    fitted = config["fitted"]
    _check_fields(fitted, FITTED, path, "fitted.")
    _check_fields(fitted["head"], HEAD, path, "fitted.head.")
    _check_fields(fitted["head"]["sizes"], SIZES, path, "fitted.head.sizes.")
    _check_fields(fitted["head"]["loss_fn"], LOSS, path, "fitted.head.loss_fn.")
    _check_fitted(fitted, path)


def _check_fitted(fitted: dict[str, Any], path: Path) -> None:
    """The contents of lists and dicts, and what must agree with each other."""

    def check(holds: bool, field: str, what: str) -> None:
        if not holds:
            value: Any = fitted
            for name in field.split("."):
                value = value[name]
            _refuse(path, f"fitted.{field}", what, value)

    head, n_outputs, n_columns = fitted["head"], fitted["n_outputs_"], fitted["n_features_in_"]
    scores = fitted["layer_scores_"] or {}
    check(
        all(_is_layer(layer) and _is_number(score) for layer, score in scores.items()),
        "layer_scores_",
        "must map layers from 1 to numbers",
    )
    check(
        all(
            isinstance(epoch, dict) and all(map(_is_number, epoch.values()))
            for epoch in fitted["history_"]
        ),
        "history_",
        "must hold a dict of numbers for each epoch",
    )
    check(
        len(fitted["best_epoch_"]) == head["n_heads"]
        and all(type(epoch) is int and epoch >= 0 for epoch in fitted["best_epoch_"]),
        "best_epoch_",
        f"must hold a whole number for each of {head['n_heads']} heads",
    )
    for name in ("_column_names", "_column_kinds", "feature_names_in_"):
        if fitted[name] is not None:
            check(
                len(fitted[name]) == n_columns and all(isinstance(n, str) for n in fitted[name]),
                name,
                f"must hold a string for each of {n_columns} columns",
            )
    check(
        fitted["_y_shape"] in ([[], [1]] if n_outputs == 1 else [[n_outputs]]),
        "_y_shape",
        f"must be the shape of {n_outputs} outputs",
    )
    loss, quantiles = head["loss_fn"]["name"], head["loss_fn"]["quantiles"]
    check(
        all(type(level) in (int, float) and 0 < level < 1 for level in quantiles)
        and all(low < high for low, high in pairwise(quantiles))
        and (len(quantiles) > 0) == (loss == "quantile"),
        "head.loss_fn.quantiles",
        f"must be {'levels between 0 and 1 in rising order' if loss == 'quantile' else 'empty'}"
        f" with the loss {loss!r}",
    )
    loss_fn = make_loss(loss, quantiles)
    check(
        loss_fn.predicts_mean or not head["linear_path"],
        "head.linear_path",
        f"must be false with the loss {loss!r}",
    )
    check(
        head["sizes"]["n_outputs"] == n_outputs * loss_fn.n_predictions,
        "head.sizes.n_outputs",
        f"must be {loss_fn.n_predictions} for each of {n_outputs} outputs",
    )
    check(
        head["sizes"]["latent_size"] % head["sizes"]["n_heads"] == 0,
        "head.sizes.n_heads",
        f"must divide latent_size={head['sizes']['latent_size']}",
    )


def _is_number(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _is_layer(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 10 and int(name) > 0


def _header(array: np.ndarray) -> tuple[str, tuple[int, ...]]:
    """The dtype, as safetensors calls it, and the shape of an array."""
    return f"{array.dtype.kind.upper()}{8 * array.dtype.itemsize}", array.shape


def _check_shapes(
    fitted: dict[str, Any], header: dict[str, tuple[str, tuple[int, ...]]], folder: Path
) -> None:
    """A ValueError unless the weights are those of such heads, by name, dtype and shape."""
    path, head, n_outputs = folder / CONFIG, fitted["head"], fitted["n_outputs_"]
    sizes = head["sizes"]
    for first, name, axis in (
        ("projection.weight", "input_size", 1),
        ("projection.weight", "latent_size", 0),
        ("readout.weight", "n_outputs", 0),
    ):
        shape = header.get(f"head.heads.0.{first}", ("", ()))[1]
        if len(shape) != 2 or shape[axis] != sizes[name]:
            what = f"does not agree with the shape {list(shape)} of {first} in {WEIGHTS}"
            _refuse(path, f"fitted.head.sizes.{name}", what, sizes[name])
    n_blocks = 1 if sizes["share_weights"] else sizes["n_iterations"]
    for field, number in (
        ("n_heads", head["n_heads"]),
        ("sizes.n_iterations", head["n_heads"] * n_blocks),
    ):
        if number > len(header):  # so that no more is made than there are tensors
            value = head["n_heads"] if field == "n_heads" else sizes["n_iterations"]
            what = f"asks for more weights than the {len(header)} tensors of {WEIGHTS}"
            _refuse(path, f"fitted.head.{field}", what, value)
    with torch.device("meta"):  # names and shapes alone; all heads have the same
        ensemble = RelishEnsemble([RelishHead(**sizes)], head["linear_path"])
    expected = {
        f"head.{name.replace('heads.0.', f'heads.{number}.')}": ("F32", tuple(weight.shape))
        for name, weight in ensemble.state_dict().items()
        for number in range(head["n_heads"])
    }
    expected |= {"_y_mean": ("F64", (n_outputs,)), "_y_scale": ("F64", (n_outputs,))}
    if "conformal.scores" in header or "conformal.weight" in header:
        shape = header.get("conformal.weight", ("", ()))[1]
        n_rows = shape[0] if shape and shape[0] > 0 else 1
        expected["conformal.scores"] = ("F64", (n_rows, n_outputs))
        expected["conformal.weight"] = ("F64", (n_rows,))
    for name in sorted(expected.keys() | header.keys()):
        if header.get(name) != expected.get(name):
            wanted, found = (
                f"{some[name][0]} of shape {list(some[name][1])}" if name in some else "none"
                for some in (expected, header)
            )
            raise ValueError(
                f"{(folder / WEIGHTS).absolute()} does not fit {CONFIG}: the tensor"
                f" {name[:100]!r} should be {wanted}, but is {found}."
            )


def _check_values(arrays: dict[str, np.ndarray], folder: Path) -> None:
    """A ValueError unless the arrays hold numbers that can be computed with."""
    for name, array in arrays.items():
        at_least_zero = name in ("_y_scale", "conformal.weight")
        if np.isfinite(array).all() and not (at_least_zero and (array < 0).any()):
            continue
        what = "numbers of 0 or more" if at_least_zero else "finite numbers"
        raise ValueError(
            f"{(folder / WEIGHTS).absolute()}: the tensor {name!r} does not hold {what} alone."
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the system lets go of the lock when the process ends."""
    lock = folder / LOCK
    with FileLock(lock, mode=0o666, fallback_to_soft=False, poll_interval=0.01):
        try:
            yield
        finally:
            with suppress(OSError):  # a process that waits for it notices, and makes another
                lock.unlink()


def _write(path: Path, content: bytes) -> None:
    """Replace a file by another one that is complete and on the disk."""
    partial = path.with_name(PARTIAL)
    partial.unlink(missing_ok=True)  # of a killed process; or a link, which is not followed
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _checked_kwargs(kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
    """`model_kwargs` of a file, unless they could run foreign code."""
    for name, value in (kwargs or {}).items():
        harmless = name in HARMLESS and isinstance(value, HARMLESS[name])
        if not harmless and not (name == "attn_implementation" and value in ATTENTION):
            raise ValueError(
                f"{CONFIG} asks for {name}={value!r}, which may run foreign code: if you trust it,"
                f" pass model_kwargs={kwargs!r} yourself."
            )
    return kwargs


def _without_nan(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {name: _without_nan(some) for name, some in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(some) for some in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _card(
    cls: type[RelishRegressor],
    state: dict[str, Any],
    parameters: dict[str, Any],
    metrics: dict[str, float] | None,
) -> ModelCard:
    model, name = state["model"], "RelishRegressor"
    figures = {}
    if state["validation_score_"] is not None:
        figures["R² on held-out rows of the fit"] = state["validation_score_"]
    figures |= metrics or {}
    changed = cls().get_params()
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
    n_heads, n_outputs = len(state["head_"].heads), state["n_outputs_"]
    return ModelCard.from_template(
        data,
        template_str=CARD_TEXT,
        title=name,
        numbers="a number" if n_outputs == 1 else f"{n_outputs} numbers",
        heads="a RELISH head" if n_heads == 1 else f"{n_heads} RELISH heads",
        layer=state["layer_"],
        model=os.path.basename(model) if os.path.exists(model) else model,
        revision=f" at commit `{state['_llm_revision']}`" if state["_llm_revision"] else "",
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

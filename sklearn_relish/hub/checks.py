"""Checks of a saved regressor: a folder may come from anyone.

Everything in ``config.json`` is checked against the names and shapes of the weights before anything
is allocated. Errors name the file and the field.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from sklearn.utils._param_validation import (
    Interval,
    StrOptions,
    validate_parameter_constraints,
)

from sklearn_relish.base import BaseLLMEstimator
from sklearn_relish.head.ensemble import RelishEnsemble
from sklearn_relish.head.head import RelishHead
from sklearn_relish.head.losses import LOSSES, make_loss
from sklearn_relish.inputs.cells import is_column_kind
from sklearn_relish.utils.versions import STAMP, check_format

CONFIG, WEIGHTS = "config.json", "model.safetensors"
WEIGHTS_DIGEST = "weights_sha256"
MAX_CONFIG_BYTES = 2**24
MAX_ITERATIONS = 1_000  # with shared weights no tensor bounds their number
# Parameters that belong to the machine or the session and are not saved.
UNSAVED_PARAMETERS = ("memory", "device", "verbose", "random_state")
MAX_VECTORS = 1_000  # of a text, for the linear path
MAX_VIEWS = 1_000  # prompts
COUNT = [Interval(Integral, 1, None, closed="left")]
# The saved fitted attributes and their types. `_check_fitted` checks contents of lists and dicts.
FITTED: dict[str, list[Any]] = {
    "layer_": COUNT,
    "layer_scores_": [dict, None],
    "n_outputs_": COUNT,
    "n_features_in_": COUNT,
    "feature_names_in_": [list, None],
    "history_": [list],
    "best_epoch_": [list],
    "ensemble_summary_": [list],
    "n_epochs_": [Interval(Integral, 0, None, closed="left")],
    "validation_score_": [Interval(Real, None, None, closed="neither"), None],
    "_column_names": [list],
    "_column_kinds": [list],
    "_y_shape": [list],
    "_llm_fingerprint": [str],
    "_llm_revision": [str, None],
    "head": [dict],
}
HEAD: dict[str, list[Any]] = {
    "sizes": [dict],
    "n_heads": COUNT,
    "linear_path": ["boolean"],
    "n_vectors": [Interval(Integral, 0, MAX_VECTORS, closed="both")],
    "n_views": [Interval(Integral, 1, MAX_VIEWS, closed="both")],
    "loss_fn": [dict],
}
SIZES: dict[str, list[Any]] = {
    "input_size": COUNT,
    "latent_size": COUNT,
    "n_heads": COUNT,
    "n_iterations": [Interval(Integral, 1, MAX_ITERATIONS, closed="both")],
    "n_outputs": COUNT,
    "share_weights": ["boolean"],
    "state_norm": [StrOptions({"rms"}), None],
    "pair": ["boolean"],
    "both_orders": ["boolean"],
}
LOSS: dict[str, list[Any]] = {"name": [StrOptions(set(LOSSES))], "quantiles": [list]}
# Values of `model_kwargs` that a file may contain; others could run code or write files.
HARMLESS_KWARGS = {"revision": str, "subfolder": str, "quantization_config": dict}
ATTENTION = ("eager", "sdpa", "flash_attention_2")


@contextmanager
def open_regular_file(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file; a pipe or device of that name is refused without waiting."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path.absolute()} is not a regular file.")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def read_config(path: Path) -> bytes:
    """The content of a configuration file of a sensible size."""
    with open_regular_file(path) as file:
        content = file.read(MAX_CONFIG_BYTES + 1)
    _check_length(content, path)
    return content


def _check_length(content: bytes, path: Path) -> None:
    if len(content) > MAX_CONFIG_BYTES:
        raise ValueError(
            f"{path.absolute()} has more than {MAX_CONFIG_BYTES:,} bytes, too many for the"
            " configuration of a RelishRegressor."
        )


def parse_config(content: bytes, path: Path) -> dict[str, Any]:
    """A configuration of this format; only its top level is checked."""
    _check_length(content, path)
    try:
        config = json.loads(content, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path.absolute()} is not valid JSON: {reason}.") from None
    if not isinstance(config, dict) or STAMP not in config:
        raise ValueError(f"{path.absolute()} is not the configuration of a RelishRegressor.")
    check_format(config[STAMP], f"{path.absolute()}")
    fields: dict[str, list[Any]] = {
        STAMP: [dict],
        WEIGHTS_DIGEST: [str],
        "parameters": [dict],
        "fitted": [dict],
    }
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


def is_regressor_config(config: Path) -> bool:
    """Whether a file may be overwritten: it is the configuration of a regressor, of any format."""
    try:
        found = json.loads(read_config(config))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and STAMP in found


def _refuse(path: Path, field: str, what: str, value: Any) -> NoReturn:
    shown = repr(value)
    shown = shown if len(shown) <= 100 else f"{shown[:100]}..."
    raise ValueError(f"{path.absolute()}: {field} {what}, got {shown}.")


def _check_fields(values: Any, fields: dict[str, list[Any]], path: Path, within: str) -> None:
    """Raise a ValueError unless `values` has exactly these fields, each of its type and range."""
    for what, names in (("no", fields.keys() - values), ("an unknown", values.keys() - fields)):
        if names:
            listed = ", ".join(f"{within}{name}"[:100] for name in sorted(names)[:10])
            raise ValueError(
                f"{path.absolute()} has {what} field {listed}: it was altered, or saved by another"
                " version or a subclass. Load it with that one, or save the regressor again."
            )
    for name, allowed in fields.items():
        if type(values[name]) is bool and within != "parameters." and "boolean" not in allowed:
            _refuse(path, f"{within}{name}", "must not be true or false", values[name])
        try:
            validate_parameter_constraints({name: allowed}, {name: values[name]}, "a folder")
        except ValueError as error:  # "The 'layer_' parameter of a folder must be ... Got 0 ..."
            what = str(error).partition(" of a folder ")[2].partition(" Got ")[0].rstrip(".")
            _refuse(path, f"{within}{name}", what or f"is invalid: {error}", values[name])


def check_config(config: dict[str, Any], cls: type[BaseLLMEstimator], path: Path) -> None:
    """Check everything that can be checked without the weights."""
    names = [name for name in cls._get_param_names() if name not in UNSAVED_PARAMETERS]
    unconstrained = [object]  # for the parameters that a subclass adds
    constraints = {name: cls._parameter_constraints.get(name, unconstrained) for name in names}
    _check_fields(config["parameters"], constraints, path, "parameters.")
    fitted = config["fitted"]
    _check_fields(fitted, FITTED, path, "fitted.")
    _check_fields(fitted["head"], HEAD, path, "fitted.head.")
    _check_fields(fitted["head"]["sizes"], SIZES, path, "fitted.head.sizes.")
    _check_fields(fitted["head"]["loss_fn"], LOSS, path, "fitted.head.loss_fn.")
    _check_fitted(fitted, path)
    prompt, n_views = config["parameters"].get("prompt"), fitted["head"]["n_views"]
    prompts = prompt if isinstance(prompt, list) else [prompt or ""]
    if len(prompts) != n_views or not all(isinstance(each, str) for each in prompts):
        what = f"must have a template for each of {n_views} prompts"
        _refuse(path, "parameters.prompt", what, prompt)


def _check_fitted(fitted: dict[str, Any], path: Path) -> None:
    """Check the contents of lists and dicts, and that fields agree with each other."""

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
    check(
        all(
            isinstance(row, dict)
            and isinstance(row.get("part"), str)
            and all(_is_number(value) for name, value in row.items() if name != "part")
            for row in fitted["ensemble_summary_"]
        ),
        "ensemble_summary_",
        "must hold a dict of numbers for each part, with its name as part",
    )
    for name in ("_column_names", "_column_kinds", "feature_names_in_"):
        if fitted[name] is not None:
            check(
                len(fitted[name]) == n_columns and all(isinstance(n, str) for n in fitted[name]),
                name,
                f"must hold a string for each of {n_columns} columns",
            )
    check(all(map(is_column_kind, fitted["_column_kinds"])), "_column_kinds", "must hold kinds")
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
        loss_fn.allows_linear_path or not head["linear_path"],
        "head.linear_path",
        f"must be false with the loss {loss!r}",
    )
    check(
        head["linear_path"] or head["n_vectors"] == 0,
        "head.n_vectors",
        "must be 0 without a linear path",
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


def tensor_header(array: np.ndarray) -> tuple[str, tuple[int, ...]]:
    """The dtype, as safetensors calls it, and the shape of an array."""
    return f"{array.dtype.kind.upper()}{8 * array.dtype.itemsize}", array.shape


def check_shapes(
    fitted: dict[str, Any], header: dict[str, tuple[str, tuple[int, ...]]], folder: Path
) -> None:
    """Raise a ValueError unless the weights have the names, dtypes and shapes of these heads."""
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
        if number > len(header):  # before anything of that size is created
            value = head["n_heads"] if field == "n_heads" else sizes["n_iterations"]
            what = f"asks for more weights than the {len(header)} tensors of {WEIGHTS}"
            _refuse(path, f"fitted.head.{field}", what, value)
    with torch.device("meta"):  # names and shapes alone; all heads have the same
        ensemble = RelishEnsemble(
            [RelishHead(**sizes)],
            head["linear_path"],
            n_vectors=head["n_vectors"],
            n_views=head["n_views"],
        )
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
                f"{tensors[name][0]} of shape {list(tensors[name][1])}"
                if name in tensors
                else "none"
                for tensors in (expected, header)
            )
            raise ValueError(
                f"{(folder / WEIGHTS).absolute()} does not fit {CONFIG}: the tensor"
                f" {name[:100]!r} should be {wanted}, but is {found}."
            )


def check_values(arrays: dict[str, np.ndarray], folder: Path) -> None:
    """Raise a ValueError unless the arrays hold finite numbers in their range."""
    for name, array in arrays.items():
        at_least_zero = name in ("_y_scale", "conformal.weight")
        if np.isfinite(array).all() and not (at_least_zero and (array < 0).any()):
            continue
        what = "numbers of 0 or more" if at_least_zero else "finite numbers"
        raise ValueError(
            f"{(folder / WEIGHTS).absolute()}: the tensor {name!r} does not hold {what} alone."
        )


def check_model_kwargs(kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the `model_kwargs` of a file; refuse values that could run foreign code."""
    for name, value in (kwargs or {}).items():
        harmless = name in HARMLESS_KWARGS and isinstance(value, HARMLESS_KWARGS[name])
        if not harmless and not (name == "attn_implementation" and value in ATTENTION):
            raise ValueError(
                f"{CONFIG} asks for {name}={value!r}, which may run foreign code: if you trust it,"
                f" pass model_kwargs={kwargs!r} yourself."
            )
    return kwargs

"""A fitted regressor as a folder, in the Hugging Face format, without pickle.

``config.json`` has the parameters and fitted attributes, ``model.safetensors`` the weights and
arrays, and ``README.md`` is a model card.

Saving over a model is atomic. ``config.json`` names its weights by their SHA-256. New weights are
first written as ``model-<SHA-256>.safetensors``, then ``config.json`` is replaced, which is the
moment of the change, then the weights are renamed to ``model.safetensors``. So the weights that
``config.json`` names always exist under one of the two names, and a killed process leaves a folder
that loads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from filelock import FileLock
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors
from sklearn.utils.validation import check_is_fitted

from sklearn_relish import __version__
from sklearn_relish.head.ensemble import RelishEnsemble
from sklearn_relish.hub.card import model_card
from sklearn_relish.hub.checks import (
    CONFIG,
    FITTED,
    UNSAVED_PARAMETERS,
    WEIGHTS,
    WEIGHTS_DIGEST,
    check_config,
    check_model_kwargs,
    check_shapes,
    check_values,
    is_regressor_config,
    open_regular_file,
    parse_config,
    read_config,
    tensor_header,
)
from sklearn_relish.hub.model_name import base_name, is_local, with_hub_id
from sklearn_relish.llm.frozen import FrozenLLM
from sklearn_relish.predictor import RelishPredictor
from sklearn_relish.states.reader import TokenStateReader
from sklearn_relish.training.conformal import Conformal
from sklearn_relish.utils.versions import FORMAT, STAMP, stamp, warn_versions

CARD = "README.md"
PENDING = "model-{}.safetensors"  # weights until they are renamed to WEIGHTS
LOCK, PARTIAL = ".save.lock", ".save.partial"
ATTEMPTS, PAUSE_SECONDS = 20, 0.01  # to find the weights of a config.json that stays the same


class SavingMixin(RelishPredictor):
    """`save_pretrained` and `push_to_hub` of a regressor."""

    def _to_save(self) -> RelishPredictor:
        """The regressor that is saved."""
        return self

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        metrics: dict[str, float] | None = None,
        license: str | None = None,
    ) -> None:
        """Save the fitted regressor to a folder, in the Hugging Face format.

        ``config.json`` holds the parameters except `memory`, `device`, `verbose` and
        `random_state`; ``model.safetensors`` the weights; ``README.md`` a model card. Nothing is
        pickled. For a `RelishRegressorCV`, `best_estimator_` is saved.

        The language model is not saved, only its name and revision: the Hub id of a model of the
        Hub, also if it was given as a folder of the Hub's cache; the path of another model.

        A regressor in the folder is replaced atomically: a process that loads it meanwhile, or
        after this process was killed, gets the old or the new one. Processes that save to the same
        folder take turns.

        Parameters
        ----------
        folder : str or path
            Created if it does not exist; the files of a regressor in it are replaced.
        metrics : dict of str to float, default=None
            Figures for the model card, in addition to R² of the out-of-fold predictions.
        license : str, default=None
            Licence of the regressor for the model card, as the Hub names it: ``"apache-2.0"``, ...

        Raises
        ------
        OSError
            If the folder can't be written.
        TypeError
            If `model_kwargs` holds values that JSON can't represent.
        ValueError
            If a parameter is invalid or the weights are not finite: it could not be loaded.

        Examples
        --------
        >>> from sklearn_relish import RelishRegressor
        >>> texts, y = ["dull", "fine", "splendid"] * 20, [1, 3, 5] * 20
        >>> regressor = RelishRegressor(random_state=0).fit(texts, y)
        >>> regressor.save_pretrained("reviews", metrics={"R² on the test set": 0.42})
        >>> RelishRegressor.from_pretrained("reviews").predict(["wonderful"]).shape
        (1,)
        """
        check_is_fitted(self)
        save(self._to_save(), folder, metrics, license)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        metrics: dict[str, float] | None = None,
        license: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Save the fitted regressor to a repository of the Hugging Face Hub, in one commit.

        The files are those of `save_pretrained`; other files of the repository are left alone. If
        the language model is not on the Hub, the name of its file or folder is published, but not
        its path. Whoever loads the regressor passes the path as `model` to `from_pretrained`.

        Parameters
        ----------
        repo_id : str
            ``"namespace/name"``, or ``"name"`` in the namespace of the token's owner. The
            repository is created if it does not exist.
        metrics : dict of str to float, default=None
        license : str, default=None
            For the model card, as in `save_pretrained`.
        commit_message : str, default=None
            None: ``"Upload RelishRegressor"``.
        private : bool, default=None
            Whether a new repository is private. None: the default of its owner.
        token : str or bool, default=None
            Access token. None: the token of ``hf auth login`` or of the variable ``HF_TOKEN``.
        revision : str, default=None
            Branch to commit to; it is created if it does not exist. None: ``"main"``.
        create_pr : bool, default=False
            Whether to open a pull request with the commit instead.

        Returns
        -------
        huggingface_hub.CommitInfo
            With the address of the commit and of the pull request.

        Raises
        ------
        TypeError, ValueError
            As `save_pretrained`; nothing has been created at that point.
        huggingface_hub.errors.HfHubHTTPError
            If the Hub refuses the request, for example because of the token.

        Examples
        --------
        >>> from sklearn_relish import RelishRegressor
        >>> texts, y = ["dull", "fine", "splendid"] * 20, [1, 3, 5] * 20
        >>> regressor = RelishRegressor(random_state=0).fit(texts, y)
        >>> commit = regressor.push_to_hub("name/reviews", license="mit")  # doctest: +SKIP
        >>> RelishRegressor.from_pretrained("name/reviews")  # doctest: +SKIP
        RelishRegressor()
        """
        check_is_fitted(self)
        regressor = self._to_save()
        contents(regressor, repo_id, metrics, license, repo_id)  # raises before anything is created
        api = HfApi(token=token, library_name="sklearn-relish", library_version=__version__)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # The card has the complete id.
        files = contents(regressor, repo_id, metrics, license, repo_id)
        if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=commit_message or f"Upload {type(regressor).__name__}",
            revision=revision,
            create_pr=create_pr,
        )


class PretrainedMixin(SavingMixin):
    """`save_pretrained`, `push_to_hub` and `from_pretrained` of a regressor."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        **parameters: Any,
    ) -> Self:
        """Load a fitted regressor that `save_pretrained` saved.

        Parameters
        ----------
        source : str or path
            A folder, or the id of a repository of the Hugging Face Hub.
        revision : str, default=None
            Branch, tag or commit of the repository.
        token : str or bool, default=None
            For a private repository.
        **parameters
            Parameters to change: ``model`` if the language model is elsewhere or is a reader of
            your own, ``memory``, ``device``, ... Those of the training, such as ``n_estimators``,
            only have an effect in the next fit.

        Returns
        -------
        RelishRegressor
            It predicts the same as the saved one.

        Raises
        ------
        OSError
            If there is no such folder or repository, or no regressor in it.
        ValueError
            If ``config.json`` is not a regressor's, has another format, could run foreign code, or
            holds invalid values; or if the weights are damaged or do not fit it. The message names
            the field. Fields, names and shapes are checked before any weight is allocated.

        Warns
        -----
        VersionWarning
            If this package, torch, Transformers or scikit-learn had another version when the
            regressor was saved; a subclass of scikit-learn's `InconsistentVersionWarning`.

        Examples
        --------
        >>> from sklearn_relish import RelishRegressor
        >>> regressor = RelishRegressor(random_state=0).fit(["dull", "fine"] * 20, [1, 3] * 20)
        >>> regressor.save_pretrained("films")
        >>> loaded = RelishRegressor.from_pretrained("films", memory="states", verbose=1)
        >>> loaded.memory
        'states'
        """
        return load(cls, source, revision, token, parameters)


def contents(
    regressor: RelishPredictor,
    folder: str | os.PathLike[str],
    metrics: dict[str, float] | None,
    license: str | None,
    repo_id: str | None = None,
) -> dict[str, bytes]:
    """The saved files by name, checked that they can be loaded.

    Errors name the files as in `folder`. If `repo_id` is given, the files are public: they do not
    contain the path of a local model.
    """
    folder = Path(folder)
    regressor = regressor._snapshot()  # one consistent state, though another thread may fit
    regressor._check_templates()
    state = regressor.__getstate__()
    if isinstance(state["model"], TokenStateReader) and not isinstance(state["model"], FrozenLLM):
        state["model"] = state["model"].model
    else:
        if isinstance(state["model"], FrozenLLM):
            llm = state["model"]
            state |= {"model": llm.model, "dtype": llm.dtype, "model_kwargs": llm.model_kwargs}
        state = with_hub_id(state)
    if repo_id is not None and is_local(state["model"]):
        state["model"] = f"./{base_name(state['model'])}"
    state["dtype"] = str(state["dtype"]).removeprefix("torch.")
    kwargs = state["model_kwargs"]
    if kwargs:  # secrets are not saved
        secrets = ("proxies", "token")
        state["model_kwargs"] = {name: kwargs[name] for name in kwargs if name not in secrets}
    names = [name for name in regressor._get_param_names() if name not in UNSAVED_PARAMETERS]
    parameters = {name: state[name] for name in names}
    head = state["head_"].__getstate__()
    del head["format"]  # the stamp of the folder has it
    arrays = {f"head.{name}": array for name, array in head.pop("weights").items()}
    arrays |= {"_y_mean": state["_y_mean"], "_y_scale": state["_y_scale"]}
    if state["_conformal"] is not None:
        arrays["conformal.scores"] = state["_conformal"].scores
        arrays["conformal.weight"] = state["_conformal"].weight
    weights = to_safetensors({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    config = {
        STAMP: stamp(),
        WEIGHTS_DIGEST: hashlib.sha256(weights).hexdigest(),
        "parameters": parameters,
        "fitted": {name: state.get(name) for name in FITTED} | {"head": head},
    }
    try:
        written = json.dumps(_without_nan(config), indent=2, default=_plain) + "\n"
    except TypeError as error:
        raise TypeError(f"A parameter can't be saved in {CONFIG}: {error}") from None
    # Check that it can be loaded.
    path = folder / CONFIG
    kept = parse_config(written.encode(), path)
    check_config(kept, type(regressor), path)
    check_shapes(
        kept["fitted"], {name: tensor_header(array) for name, array in arrays.items()}, folder
    )
    check_values(arrays, folder)
    card = model_card(type(regressor), state, parameters, metrics, license, repo_id)
    return {WEIGHTS: weights, CONFIG: written.encode(), CARD: f"{card}".encode()}


def save(
    regressor: RelishPredictor,
    folder: str | os.PathLike[str],
    metrics: dict[str, float] | None,
    license: str | None,
) -> None:
    """Save to a folder, see `PretrainedMixin.save_pretrained`."""
    folder = Path(folder)
    path = folder / CONFIG
    files = contents(regressor, folder, metrics, license)
    if os.path.lexists(folder) and not folder.is_dir():
        raise NotADirectoryError(f"{folder.absolute()} is not a folder: choose another name.")
    folder.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path) and not is_regressor_config(path):
        raise FileExistsError(
            f"{path.absolute()} is not the configuration of a RelishRegressor and would be"
            " overwritten: choose another folder."
        )
    with _locked(folder):
        pending = folder / PENDING.format(hashlib.sha256(files[WEIGHTS]).hexdigest())
        _write(pending, files[WEIGHTS])
        _write(path, files[CONFIG])  # from here on the folder holds the new regressor
        os.replace(pending, folder / WEIGHTS)
        _write(folder / CARD, files[CARD])
        for left_behind in folder.glob(PENDING.format("[0-9a-f]" * 64)):
            left_behind.unlink()


def load(
    cls: type[PretrainedMixin],
    source: str | os.PathLike[str],
    revision: str | None,
    token: str | bool | None,
    parameters: dict[str, Any],
) -> Any:
    """Load a folder or a repository, see `PretrainedMixin.from_pretrained`."""
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
    if isinstance(parameters.get("model"), TokenStateReader):  # it has its own
        kept |= {"dtype": "auto", "model_kwargs": None}
    elif "model_kwargs" in kept.keys() - parameters:
        kept["model_kwargs"] = check_model_kwargs(kept["model_kwargs"])
        if "model" not in parameters and fitted["_llm_revision"] is not None:
            pinned = {"revision": fitted["_llm_revision"]}
            kept["model_kwargs"] = pinned | (kept["model_kwargs"] or {})
    regressor = cls(**kept | parameters)
    regressor._fitted_templates = cls(**kept)._templates()
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


def _read(folder: Path, cls: type[PretrainedMixin]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration and its weights, checked.

    A process that saves meanwhile may replace the weights between the two reads; then both are read
    again.
    """
    before, attempt = None, 0
    while attempt < ATTEMPTS:
        try:
            config = parse_config(read_config(folder / CONFIG), folder / CONFIG)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{folder.absolute()} has no regressor saved by save_pretrained: there is no"
                f" {CONFIG}."
            ) from None
        digest = config[WEIGHTS_DIGEST]
        for path in (folder / PENDING.format(digest), folder / WEIGHTS):
            with suppress(FileNotFoundError), open_regular_file(path) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    continue
                try:
                    with safe_open(path, framework="numpy") as weights:
                        # The inode of an open file is not reused.
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
            f"{folder.absolute()} has no regressor saved by save_pretrained: there is no {WEIGHTS}."
        )
    raise ValueError(
        f"{(folder / WEIGHTS).absolute()} does not have the SHA-256 that {CONFIG} names as"
        f" {WEIGHTS_DIGEST}: it is truncated, altered or from another regressor. Copy the folder"
        " again, or save the regressor again."
    )


def _checked(
    config: dict[str, Any], cls: type[PretrainedMixin], weights: Any, folder: Path
) -> dict[str, np.ndarray]:
    """The arrays, read after the configuration was checked against their names and shapes."""
    check_config(config, cls, folder / CONFIG)
    header = {}
    for name in weights.keys():  # noqa: SIM118, it is no dict
        tensor = weights.get_slice(name)
        header[name] = (tensor.get_dtype(), tuple(tensor.get_shape()))
    check_shapes(config["fitted"], header, folder)
    arrays = {name: weights.get_tensor(name) for name in header}
    check_values(arrays, folder)
    return arrays


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the system releases the lock when the process ends."""
    lock = folder / LOCK
    with FileLock(lock, mode=0o666, fallback_to_soft=False, poll_interval=0.01):
        try:
            yield
        finally:
            with suppress(OSError):  # a process that waits for it creates a new one
                lock.unlink()


def _write(path: Path, content: bytes) -> None:
    """Replace a file atomically, after the new content is on the disk."""
    partial = path.with_name(PARTIAL)
    partial.unlink(missing_ok=True)  # left by a killed process, or a link, which is not followed
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _without_nan(value: Any) -> Any:
    """The value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """A JSON value for a value of another type."""
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

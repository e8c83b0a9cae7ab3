"""How a saved regressor names its language model, so that other machines find it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from sklearn_relish.llm.fingerprint import model_fingerprint, prefixed_fingerprint


def with_hub_id(state: dict[str, Any]) -> dict[str, Any]:
    """A regressor's state that names a model in the cache of the Hub by its id and commit.

    Parameters
    ----------
    state : dict
        With a model given by name.

    Returns
    -------
    dict
        The state itself if the model is not in the cache. The model is then found again in the
        cache, with or without network.
    """
    model, kwargs = state["model"], state["model_kwargs"]
    path, cache = Path(os.path.abspath(model)), os.path.abspath(constants.HF_HUB_CACHE)
    if not path.is_dir() or not path.is_relative_to(cache):
        return state
    parts = path.relative_to(cache).parts  # models--NAMESPACE--NAME, snapshots, COMMIT
    if len(parts) != 3 or not parts[0].startswith("models--") or parts[1] != "snapshots":
        return state
    repo_id, commit = "/".join(parts[0].split("--")[1:]), parts[2]
    fingerprint = prefixed_fingerprint(model_fingerprint(repo_id, commit, kwargs), state["prefix"])
    return state | {"model": repo_id, "_llm_revision": commit, "_llm_fingerprint": fingerprint}


def is_local(model: str) -> bool:
    """Whether a model's name is a path, perhaps of another machine, and not a Hub id."""
    return (
        os.path.exists(model)
        or model.endswith(".gguf")
        or model.startswith((".", "/", "~"))
        or "\\" in model
        or model.count("/") > 1
    )


def base_name(model: str) -> str:
    """The last part of a path of any system."""
    return model.replace("\\", "/").rstrip("/").rpartition("/")[2]

"""What identifies a model: the Hub's commit, or the content of the files of a local folder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from sklearn_relish.llm.loading import ACCESS_KWARGS
from sklearn_relish.utils.files import file_digest

MODEL_SUFFIXES = {".bin", ".jinja", ".json", ".model", ".py", ".safetensors", ".spm", ".txt"}
# Keyword arguments that do not change the states: they find a model, or place it on devices.
NEUTRAL_KWARGS = ACCESS_KWARGS - {"subfolder"} | {"device_map", "max_memory", "offload_folder"}


def model_files(model: str, model_kwargs: dict[str, Any] | None) -> list[Path]:
    """Files of a local model: weights, configuration, tokenizer. Empty for a model of the Hub."""
    path = Path(model)
    if path.is_file():
        return [path]
    folder = path / (model_kwargs or {}).get("subfolder", "")
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.suffix in MODEL_SUFFIXES)


def model_fingerprint(model: str, revision: str | None, model_kwargs: dict[str, Any] | None) -> str:
    """A digest of a model's weights, tokenizer and the keyword arguments that change its states.

    Parameters
    ----------
    model : str
        Hub id or local path.
    revision : str or None
        The Hub's commit. A local model is identified by the content of its files.
    model_kwargs : dict or None
    """
    digest = hashlib.sha256()
    if os.path.exists(model):
        for path in model_files(model, model_kwargs):
            digest.update(file_digest(path).encode())
    else:
        digest.update(f"{model}@{revision}".encode())
    changes = {
        name: value for name, value in (model_kwargs or {}).items() if name not in NEUTRAL_KWARGS
    }
    described = json.dumps(changes, sort_keys=True, default=_as_json) if changes else "[]"
    digest.update(described.encode())
    return digest.hexdigest()[:32]


def prefixed_fingerprint(fingerprint: str, prefix: str) -> str:
    """The fingerprint of a model that reads a prefix before every text."""
    if not prefix:
        return fingerprint
    return hashlib.sha256(f"{fingerprint} {prefix}".encode()).hexdigest()[:32]


def _as_json(value: Any) -> Any:
    """A value that JSON lacks, such as a quantization configuration or a dtype."""
    return value.to_dict() if hasattr(value, "to_dict") else str(value).removeprefix("torch.")

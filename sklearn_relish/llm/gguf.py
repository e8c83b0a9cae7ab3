"""GGUF files: each is converted once to safetensors, which load in seconds.

The converted model is kept in the user's cache folder.
"""

from __future__ import annotations

import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from platformdirs import user_cache_path

from sklearn_relish.utils.files import file_digest


def converted_gguf(path: Path) -> Path:
    """Folder with the model of a GGUF file in the format of Transformers, made on first use.

    The folder's name has a digest of the file's content. All weights are converted to bfloat16.
    This is finer than quantized weights; weights of F16 and F32 files lose precision.

    Parameters
    ----------
    path : Path
        A ``.gguf`` file of an architecture that Transformers reads.

    Raises
    ------
    ImportError
        If the packages of the extra ``gguf`` are not installed.
    OSError
        If the file can't be converted.
    """
    digest = file_digest(path)[:16]
    cache = user_cache_path("sklearn_relish") / "gguf"
    folder = cache / f"{path.stem}-{digest}"
    if folder.exists():
        return folder
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"Converting {path.name} needs {' and '.join(missing)}:"
            " pip install 'sklearn-relish[gguf]'"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
            try:
                try:
                    _convert(path, partial)
                except (MemoryError, ImportError):
                    raise
                except Exception as error:  # a damaged file may cause any error in the parser
                    raise OSError(
                        f"{path} can't be converted: it is damaged or incomplete, or Transformers"
                        f" does not read its architecture ({' '.join(str(error).split())})."
                    ) from error
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert(path: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    loaded = transformers.AutoModel.from_pretrained(**source, dtype=torch.bfloat16)
    # A model loaded from GGUF can't be saved; one made from its configuration can.
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(
            type(loaded.config).from_dict(config), dtype=torch.bfloat16
        )
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.save_pretrained(folder)

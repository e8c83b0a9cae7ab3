"""The version stamp of a saved estimator: its format and the package versions it was saved with."""

from __future__ import annotations

from typing import Any

import sklearn
import torch
import transformers
from sklearn.exceptions import InconsistentVersionWarning

from sklearn_relish import __version__
from sklearn_relish.utils.messages import warn

FORMAT = 1  # of pickles and folders; raised when their content changes its meaning
STAMP = "sklearn_relish"  # the stamp's key in a pickled state and in config.json


class VersionWarning(InconsistentVersionWarning):
    """Warning that an estimator was saved with other versions of packages than those installed.

    It is a scikit-learn `InconsistentVersionWarning`, so a filter for that class applies to it.

    Parameters
    ----------
    estimator_name : str
    saved, installed : dict of str to str
        Versions by package.

    Examples
    --------
    >>> import warnings
    >>> from sklearn_relish.utils.versions import VersionWarning
    >>> warnings.simplefilter("error", VersionWarning)  # refuse what another version saved
    """

    def __init__(
        self, *, estimator_name: str, saved: dict[str, str], installed: dict[str, str]
    ) -> None:
        super().__init__(
            estimator_name=estimator_name,
            current_sklearn_version=installed["scikit-learn"],
            original_sklearn_version=saved.get("scikit-learn", "unknown"),
        )
        self.saved, self.installed = saved, installed

    def __str__(self) -> str:
        changed = [
            f"{package} {self.saved.get(package, 'unknown')} (now {version})"
            for package, version in self.installed.items()
            if self.saved.get(package) != version
        ]
        return (
            f"This {self.estimator_name} was saved with {', '.join(changed)}. Its predictions may"
            " differ: compare a few, or install the versions it was saved with."
        )


def stamp() -> dict[str, Any]:
    """The format and the installed versions, as plain JSON."""
    versions = {
        "sklearn-relish": __version__,
        "torch": torch.__version__.partition("+")[0],  # without the build for a device
        "transformers": transformers.__version__,
        "scikit-learn": sklearn.__version__,
    }
    return {"format": FORMAT, "versions": versions}


def check_format(given: Any, where: str) -> None:
    """Refuse a stamp that is missing or has another format.

    Parameters
    ----------
    given : object
        The supposed stamp; it may come from an untrusted file.
    where : str
        Where the stamp was found, for the error message.

    Raises
    ------
    ValueError
    """
    found = given.get("format") if isinstance(given, dict) else None
    if found == FORMAT:
        return
    versions = given.get("versions") if isinstance(given, dict) else None
    saver = versions.get("sklearn-relish") if isinstance(versions, dict) else None
    problem = "has no valid format number" if found is None else f"has format {found!r}"
    origin = f" and was saved by sklearn-relish {saver}" if isinstance(saver, str) else ""
    raise ValueError(
        f"{where} {problem}{origin}, but sklearn-relish {__version__} opens format"
        f" {FORMAT}: install the version that saved it, or fit and save again."
    )


def warn_versions(given: dict[str, Any], estimator_name: str) -> None:
    """Warn if a stamp has other versions than those installed.

    Raises
    ------
    ValueError
        If the versions are not a dict of strings.
    """
    saved, installed = given.get("versions"), stamp()["versions"]
    if not isinstance(saved, dict) or not all(isinstance(v, str) for v in saved.values()):
        raise ValueError(f"{STAMP}.versions must map packages to versions, got {saved!r}.")
    if any(saved.get(package) != version for package, version in installed.items()):
        warning = VersionWarning(estimator_name=estimator_name, saved=saved, installed=installed)
        warn(warning)

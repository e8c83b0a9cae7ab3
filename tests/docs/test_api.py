"""The API reference lists every public class, and each public method has an example."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import sklearn_relish

API = (Path(__file__).parents[2] / "docs" / "api.rst").read_text("utf-8")
LISTED = re.findall(r"^   ((?:\w+\.)*[A-Z]\w+)$", API, re.MULTILINE)


def own_methods(cls):
    """The public methods that this package defines, with those of its base classes."""
    own = [base for base in cls.__mro__ if base.__module__.startswith("sklearn_relish")]
    for name in dict.fromkeys(name for base in own for name in vars(base)):
        if not name.startswith("_") and not name.endswith("_request"):
            method = getattr(cls, name)
            if inspect.isfunction(method) or inspect.ismethod(method):
                yield method


def test_every_public_name_is_listed():
    assert set(LISTED) >= set(sklearn_relish.__all__) - {"__version__"}


@pytest.mark.parametrize("name", LISTED)
def test_classes_and_methods_have_examples(name):
    module, _, cls = f"sklearn_relish.{name}".rpartition(".")
    cls = getattr(importlib.import_module(module), cls)
    documented = [cls, *own_methods(cls)]
    without = [item.__name__ for item in documented if ">>> " not in (item.__doc__ or "")]
    assert without == []

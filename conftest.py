"""The examples of docstrings run with a tiny model, in a folder of their own."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "tests"))


@pytest.fixture(scope="session")
def doctest_folder(tmp_path_factory):
    from documented import add_tiny_model

    folder = tmp_path_factory.mktemp("doctests")
    add_tiny_model(folder)
    return folder


@pytest.fixture(autouse=True)
def doctest_environment(request, monkeypatch):
    if isinstance(request.node, pytest.DoctestItem):
        if request.node.path.name == "display.py":
            pytest.importorskip("matplotlib.pyplot").switch_backend("agg")
        from documented import run_as_documented

        run_as_documented(request.getfixturevalue("doctest_folder"), monkeypatch)

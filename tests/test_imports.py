"""Imports go one way between the packages, and nothing is imported before it is used."""

import ast
import importlib
import pickle
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from tiny import tiny_model

import sklearn_relish

ROOT = Path(sklearn_relish.__file__).parent
ALLOWED = {  # what a package may import; the estimators, at the top level, may import all of them
    "utils": set(),
    "states": {"utils"},
    "head": {"utils"},
    "inputs": {"utils"},
    "llm": {"states", "utils"},
    "training": {"head", "states", "utils"},
}


def imported_modules(path):
    """The package's modules, without ``sklearn_relish.``, that a file imports at any place."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *parts = name.split(".")
            while parts and not is_module(parts):
                parts.pop()  # the name of a class or a function
            if package == "sklearn_relish" and parts:
                yield ".".join(parts)


def is_module(parts):
    path = ROOT.joinpath(*parts)
    return path.is_dir() or path.with_suffix(".py").exists()


def import_graph():
    graph = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[name.removesuffix(".__init__")] = set(imported_modules(path))
    return graph


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_packages_below_it(package):
    wrong = {
        (module, imported)
        for module, imports in import_graph().items()
        for imported in imports
        if module.partition(".")[0] == package
        and imported.partition(".")[0] not in ALLOWED[package] | {package}
    }
    assert wrong == set()


def test_modules_do_not_import_each_other():
    order = list(TopologicalSorter(import_graph()).static_order())  # raises CycleError
    assert order.index("utils.locks") < order.index("states.store") < order.index("regressor")


def test_no_file_is_too_long_to_read():
    for path in ROOT.rglob("*.py"):
        n_lines = len(path.read_text("utf-8").splitlines())
        assert n_lines <= 700, f"{path.relative_to(ROOT)} has {n_lines} lines"


# Run in a process of its own: what is imported, step by step.
IMPORTS = """
import faulthandler
import sys

faulthandler.dump_traceback_later(200, exit=True)  # shows where a process that hangs is

def imported(*names):
    return sorted(set(names) & set(sys.modules))

OPTIONAL = (
    "accelerate", "dask", "datasets", "gguf", "matplotlib", "pandas", "peft", "polars", "pyarrow",
    "ray",
)
import sklearn_relish

assert sklearn_relish.__version__ and set(sklearn_relish.__all__) <= set(dir(sklearn_relish))
print("package:", *imported(*OPTIONAL, "numpy", "sklearn", "torch", "transformers"))

import sklearn.base, torch, transformers  # scikit-learn imports pandas where it is installed

before = imported(*OPTIONAL)
for name in sklearn_relish.__all__:
    getattr(sklearn_relish, name)
regressor = sklearn_relish.RelishRegressor(sys.argv[1], max_epochs=1, n_estimators=1)
print("names:", *sorted(set(imported(*OPTIONAL)) - set(before)))

from transformers import PreTrainedModel  # imports accelerate where it is installed

before = imported(*OPTIONAL)
regressor.fit(["a", "b", "c"], [1.0, 2.0, 3.0]).predict(["d"])
print("fit:", *sorted(set(imported(*OPTIONAL)) - set(before)))
"""


def test_nothing_is_imported_before_it_is_used():
    result = subprocess.run(
        [sys.executable, "-c", IMPORTS, str(tiny_model())],
        capture_output=True,
        encoding="utf-8",
    )
    assert result.stdout.splitlines() == ["package:", "names:", "fit:"], result.stderr


def test_public_names_are_found_where_type_checkers_find_them():
    tree = ast.parse(Path(sklearn_relish.__file__).read_text("utf-8"))
    declared = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("sklearn_relish.")
        for alias in node.names
    }
    lazy = {name: f"sklearn_relish.{module}" for name, module in sklearn_relish._MODULES.items()}
    assert lazy == declared
    assert {*lazy, "__version__"} == set(sklearn_relish.__all__)
    for name, module in lazy.items():
        value = getattr(sklearn_relish, name)
        assert value is getattr(importlib.import_module(module), name)
        assert pickle.loads(pickle.dumps(value)) is value
    with pytest.raises(AttributeError, match="has no attribute 'RelishClassifier'"):
        _ = sklearn_relish.RelishClassifier

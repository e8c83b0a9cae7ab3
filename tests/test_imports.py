"""Imports between the packages go one way, and no two modules import each other."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

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

"""The architecture: imports go one way."""

import ast
from pathlib import Path

import pytest

import sklearn_relish

PACKAGE = Path(sklearn_relish.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
}
# What each part may import; estimators are the modules at the top level of the package.
ALLOWED = {
    "utils": set(),
    "states": {"utils"},
    "llm": {"states", "utils"},
    "head": {"utils"},
    "training": {"head", "states", "utils"},
    "inputs": {"utils"},
    "base": {"inputs", "llm", "states", "utils"},
    "predictor": {"base", "head", "training", "utils"},
    "hub": {"base", "predictor", "head", "llm", "training", "utils"},
    "encoder": {"base", "head", "llm", "states", "training", "utils"},
    "regressor": {
        *("base", "predictor", "hub"),
        *("head", "inputs", "llm", "states", "training", "utils"),
    },
    "display": {"predictor", "regressor"},
}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, also for type checking alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    names = {name.removeprefix("sklearn_relish.") for name in found if "sklearn_relish" in name}
    return {name if name in MODULES else name.rpartition(".")[0] for name in names}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_deeper_layers_alone(module):
    layer = module.partition(".")[0]
    for name in imported(MODULES[module]):
        other = name.partition(".")[0]
        assert other == layer or other in ALLOWED[layer], f"{module} imports {name}"


def test_no_module_imports_itself_through_others():
    graph = {module: imported(path) & MODULES.keys() for module, path in MODULES.items()}
    while graph:
        free = [module for module, imports in graph.items() if not imports & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        for module in free:
            del graph[module]


def test_files_have_a_readable_length():
    for module, path in MODULES.items():
        n_lines = len(path.read_text(encoding="utf-8").splitlines())
        assert n_lines <= 700, f"{module} has {n_lines} lines"

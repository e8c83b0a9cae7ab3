"""A table has the same texts and predictions in pandas, Polars, PyArrow and CSV files.

Cells that a CSV file cannot represent are excluded: an empty string, and text that a reader parses
as a missing cell, a number, a boolean or a date. The last tests check that those are refused.
"""

import datetime
import io
from decimal import Decimal

import numpy as np
import pytest

pd = pytest.importorskip("pandas")
pl = pytest.importorskip("polars")
pa = pytest.importorskip("pyarrow")
hypothesis = pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

FEW = settings(max_examples=15)
TEXT = st.text(st.sampled_from("abc ä,;\"'\n{}"), max_size=8).map("w{}".format)
INTEGERS = st.integers(-(2**53) + 1, 2**53 - 1)
FLOATS = st.sampled_from([0.1, 1e-7, 1e20, 3.4863509466889064e16, 1234567.25, -2.0])
FLOATS |= st.integers(-(10**12), 10**12).map(lambda digits: digits / 1000)
FIRST, LAST = datetime.date(1800, 1, 1), datetime.date(2200, 1, 1)
DATETIMES = st.datetimes(datetime.datetime(1800, 1, 1), datetime.datetime(2200, 1, 1))
MIDNIGHTS = st.dates(FIRST, LAST).map(lambda day: datetime.datetime(day.year, day.month, day.day))


def cells_or_none(cells):
    return st.none() | cells


ROWS = st.lists(
    st.tuples(
        TEXT,
        INTEGERS,
        cells_or_none(INTEGERS),
        FLOATS,
        st.booleans(),
        cells_or_none(st.booleans()),
        st.dates(FIRST, LAST),
        cells_or_none(DATETIMES | MIDNIGHTS),
        MIDNIGHTS,
        st.sampled_from(["red", "green"]),
        st.decimals(-(10**6), 10**6, places=2),
    ),
    min_size=1,
    max_size=5,
)
DATES = ["day", "moment", "midnight"]


def table_of(rows):
    """A pandas frame with the natural type for each column."""
    names = ["text", "integer", "count", "number", "flag", "answer"]
    columns = zip(*rows, strict=True)
    frame = dict(zip([*names, *DATES, "category", "price"], columns, strict=True))
    frame["count"] = pd.array(frame["count"], dtype="Int64")
    frame["answer"] = pd.array(frame["answer"], dtype="boolean")
    frame["moment"] = pd.Series(frame["moment"], dtype="datetime64[us]")
    frame["midnight"] = pd.Series(frame["midnight"], dtype="datetime64[us]")
    frame["category"] = pd.Categorical(frame["category"])
    for name in ("text", "day", "price"):
        frame[name] = pd.Series(frame[name], dtype=object)
    return pd.DataFrame(frame)


def arrow_of(frame):
    return pa.table({name: pa.Array.from_pandas(frame[name]) for name in frame})


def csv_by_pandas(frame, **parameters):
    csv = io.StringIO(frame.to_csv(index=False))
    return pd.read_csv(csv, **parameters)


def csv_by_polars(frame, **parameters):
    return pl.read_csv(io.StringIO(pl.from_pandas(frame).write_csv()), **parameters)


FORMS = {
    "pandas": lambda frame: frame,
    "pandas objects": lambda frame: frame.astype(object),
    "pandas in Arrow": lambda frame: arrow_of(frame).to_pandas(types_mapper=pd.ArrowDtype),
    "PyArrow": arrow_of,
    "Polars": pl.from_pandas,
    "CSV by pandas": csv_by_pandas,
    "CSV by pandas, dates parsed": lambda frame: csv_by_pandas(
        frame, parse_dates=DATES, date_format="ISO8601"
    ),
    "CSV by pandas, all of it text": lambda frame: csv_by_pandas(frame, dtype=str),
    "CSV by Polars": csv_by_polars,
    "CSV by Polars, dates parsed": lambda frame: csv_by_polars(frame, try_parse_dates=True),
    "CSV by Polars, read by pandas": lambda frame: pd.read_csv(
        io.StringIO(pl.from_pandas(frame).write_csv())
    ),
}
ALL_TEXT = "CSV by pandas, all of it text"  # `fit` finds no numbers in it


@FEW
@given(rows=ROWS)
def test_all_forms_of_a_table_have_the_same_texts(llm, rows):
    from sklearn_relish import LLMEncoder

    forms = {name: form(table_of(rows)) for name, form in FORMS.items()}
    expected = None
    for fitted_on, table in forms.items():
        if fitted_on == ALL_TEXT:
            continue
        encoder = LLMEncoder(llm).fit(table)
        for name, other in forms.items():
            texts = encoder._render(encoder._read_table(other, reset=False))
            expected = expected or texts
            assert texts == expected, (fitted_on, name)


@pytest.fixture(scope="module")
def films():
    random = np.random.default_rng(0)
    days = pd.to_datetime("1960-01-01") + pd.to_timedelta(random.integers(0, 20_000, 60), "D")
    frame = pd.DataFrame({"title": [f"film {i}" for i in range(60)], "released": days})
    frame["votes"] = pd.array([None if i % 5 == 0 else 10 * i for i in range(60)], dtype="Int64")
    frame["colour"] = random.random(60) < 0.5
    frame["price"] = pd.Series([Decimal(i) / 4 for i in range(60)], dtype=object)
    return frame, days.year.to_numpy(dtype=float)


@pytest.mark.parametrize("fitted_on", ["pandas", "CSV by pandas", "Polars"])
def test_all_forms_of_a_table_have_the_same_predictions(llm, films, fitted_on):
    from sklearn_relish import RelishRegressor

    frame, y = films
    small = {"latent_size": 16, "n_heads": 2, "max_epochs": 2, "n_estimators": 1, "random_state": 0}
    parse = {"parse_dates": ["released"]}
    forms = FORMS | {"CSV by pandas, dates parsed": lambda frame: csv_by_pandas(frame, **parse)}
    regressor = RelishRegressor(llm, **small).fit(forms[fitted_on](frame), y)
    expected = RelishRegressor(llm, **small).fit(frame, y).predict(frame)
    assert np.ptp(expected) > 0
    for name, form in forms.items():
        np.testing.assert_array_equal(regressor.predict(form(frame)), expected, err_msg=name)


def test_codes_that_a_csv_file_turned_into_numbers_are_refused(llm):
    from sklearn_relish import LLMEncoder

    frame = pd.DataFrame({"code": ["007", "012"], "seats": [1, 2]})
    encoder = LLMEncoder(llm).fit(frame)
    csv = frame.to_csv(index=False)
    with pytest.raises(ValueError, match=r"'code'.* rows 0, 1 .*read_csv\(.*dtype=\{'code': str\}"):
        encoder.transform(pd.read_csv(io.StringIO(csv)))
    kept = pd.read_csv(io.StringIO(csv), dtype={"code": str})
    np.testing.assert_array_equal(encoder.transform(kept), encoder.transform(frame))


def test_integers_that_a_csv_file_rounded_are_refused(llm):
    from sklearn_relish import LLMEncoder

    frame = pd.DataFrame({"id": pd.array([2**60 + 1, None], dtype="Int64"), "seats": [1, 2]})
    encoder = LLMEncoder(llm).fit(frame)
    csv = frame.to_csv(index=False)
    with pytest.raises(ValueError, match=r"'id'.* row 0 .*Int64"):
        encoder.transform(pd.read_csv(io.StringIO(csv), dtype={"id": float}))
    kept = pd.read_csv(io.StringIO(csv), dtype={"id": "Int64"})
    np.testing.assert_array_equal(encoder.transform(kept), encoder.transform(frame))


def test_text_in_a_column_of_numbers_is_refused(llm):
    from sklearn_relish import LLMEncoder

    encoder = LLMEncoder(llm).fit(pd.DataFrame({"title": ["a", "b"], "year": [1979, 1986]}))
    wrong = pd.DataFrame({"title": ["a", "b"], "year": ["1979", "unknown"]})
    with pytest.raises(ValueError, match="Column 'year' was of kind 'integer' in fit, but row 1"):
        encoder.transform(wrong)
    with pytest.warns(UserWarning, match="Column 'year' is missing in all rows"):
        encoder.transform(wrong.assign(year=None))

import datetime
from decimal import Decimal

import numpy as np
import pandas as pd
import polars as pl
import pytest
from scipy import sparse

from sklearn_relish.inputs.targets import read_targets

DAYS = ["2020-01-01", "2020-01-02"]


@pytest.mark.parametrize(
    "y",
    [
        [1, 2.5],
        ["1", " 2.5"],
        np.array(["1", "2.5"]),
        np.array(["1", "2.5"], dtype=np.dtypes.StringDType()),
        [Decimal("1"), Decimal("2.5")],
        pd.Series([1, 2.5], dtype="Float64"),
        pd.Series([1, 2.5], dtype="Sparse[float]"),
        pd.Series(["1", "2.5"], dtype="category"),
        pl.Series([1.0, 2.5]),
        np.ma.masked_array([1, 2.5], mask=[False, False]),
    ],
    ids=repr,
)
def test_numbers_are_read_from_any_container(y):
    targets = read_targets(y)
    assert targets.dtype == np.float64
    assert targets.tolist() == [1, 2.5]


def test_several_outputs_and_a_frame_of_sparse_columns():
    frame = pd.DataFrame({"a": pd.Series([1, 0], dtype="Sparse[int]"), "b": [3, 4]})
    assert read_targets(frame).tolist() == [[1, 3], [0, 4]]
    assert read_targets([["1", 2], [3, "4.5"]]).tolist() == [[1, 2], [3, 4.5]]


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (sparse.csr_matrix([[1.0], [2.0]]), TypeError, r"y is sparse: .*toarray"),
        (sparse.csr_array([[1.0], [2.0]]), TypeError, "y is sparse"),
        (np.ma.masked_array([1, 2, 3], mask=[0, 1, 1]), ValueError, "masked values in rows 1, 2"),
        (np.ma.masked_array([[1, 2], [3, 4]], mask=[[0, 0], [0, 1]]), ValueError, "in row 1:"),
        (np.array(DAYS, "M8[D]"), ValueError, "no number in rows 0, 1.*a date"),
        (np.array([1, 2], "m8[s]"), ValueError, "no number in rows 0, 1.*or a time"),
        (pd.Series(pd.to_datetime(DAYS)), ValueError, "no number in rows 0, 1"),
        (pd.Series(pd.to_datetime(DAYS, utc=True)), ValueError, "no number in rows 0, 1"),
        (pd.Series(pd.to_timedelta([1, 2], "s")), ValueError, "no number in rows 0, 1"),
        (pl.Series(DAYS).str.to_date(), ValueError, "no number in rows 0, 1"),
        ([1.5, datetime.date(2020, 1, 1)], ValueError, "no number in row 1"),
        (np.array([1, np.datetime64(3, "ns")], dtype=object), ValueError, "no number in row 1"),
        (["1", "two", "3", "four"], ValueError, r"no number in rows 1, 3 \(row 1 has 'two'"),
        (pd.Series([1, "many"]), ValueError, r"no number in row 1 \(row 1 has 'many', a str"),
        ([[1, 2], [3, "x"]], ValueError, "no number in row 1"),
        ([{"a": 1}, {"a": 2}], ValueError, "no number in rows 0, 1"),
        ([1, 10**400], ValueError, r"no number in row 1 \(row 1 has 1000"),
        ([1, None], ValueError, "NaN or infinity in row 1"),
        (pd.Series([1, pd.NA], dtype=object), ValueError, "NaN or infinity in row 1"),
        (pd.Series([1, None], dtype="Int64"), ValueError, "NaN or infinity in row 1"),
        (["1", "nan"], ValueError, "NaN or infinity in row 1"),
        ([[1, 2], [3]], ValueError, "y cannot be converted to an array of numbers"),
        (3.0, ValueError, "for each row, got a single value"),
        ({1.0, 2.0}, ValueError, "for each row, got a set"),
        ((value for value in [1, 2]), ValueError, "for each row, got a generator"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_targets_that_are_not_numbers_are_refused_with_their_rows(y, error, message):
    with pytest.raises(error, match=message):
        read_targets(y)

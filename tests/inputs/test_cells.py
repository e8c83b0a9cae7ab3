import datetime
import fractions
import math
import os
import pathlib
import uuid
from decimal import Decimal

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

from sklearn_relish.inputs.cells import column_texts
from sklearn_relish.inputs.prompts import read_table, write_cells

BERLIN = datetime.timezone(datetime.timedelta(hours=1))


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (1979, "1979"),
        (1979.0, "1979"),
        (np.int8(7), "7"),
        (np.float64(7), "7"),
        (-0.0, "0"),
        (2**53 + 1, "9007199254740993"),
        (1e15, "1000000000000000"),
        (1e20, "1e+20"),
        (math.inf, "inf"),
        (1234567.25, "1234567.25"),
        (np.float32(1234567.1), "1234567.1"),
        (np.float32(0.1), "0.1"),
        (float(np.float32(0.1)), "0.1"),
        (np.float32(123456789), "123456790"),
        (np.float16(0.1), "0.1"),
        (Decimal("1.50"), "1.5"),
        (Decimal("100"), "100"),
        (Decimal("1E+2"), "100"),
        (Decimal("0.12345678901234567890"), "0.1234567890123456789"),
        (Decimal("NaN"), None),
        (True, "True"),
        (np.False_, "False"),
        (datetime.date(2012, 1, 1), "2012-01-01"),
        (datetime.datetime(2012, 1, 1), "2012-01-01"),
        (datetime.datetime(2012, 1, 1, 9, 30), "2012-01-01 09:30:00"),
        (datetime.datetime(2012, 1, 1, 0, 0, 0, 500_000), "2012-01-01 00:00:00.5"),
        (datetime.datetime(2012, 1, 1, tzinfo=BERLIN), "2012-01-01 00:00:00+01:00"),
        (datetime.datetime(2012, 1, 1, 1, 1, 1, 10, BERLIN), "2012-01-01 01:01:01.00001+01:00"),
        (pd.Timestamp("2012-01-01 00:00:00.000000001"), "2012-01-01 00:00:00.000000001"),
        (np.datetime64("2012", "Y"), "2012-01-01"),
        (np.datetime64("2012-01-01T05", "h"), "2012-01-01 05:00:00"),
        (np.datetime64("2012-01-01T00:00:00.25", "ns"), "2012-01-01 00:00:00.25"),
        (np.datetime64("NaT"), None),
        (datetime.time(9, 30, 0, 500_000), "09:30:00.5"),
        (datetime.timedelta(days=1), "1 days"),
        (datetime.timedelta(hours=25, microseconds=10), "1 days 01:00:00.00001"),
        (pd.Timedelta(hours=25, microseconds=10), "1 days 01:00:00.00001"),
        (np.timedelta64(25, "h"), "1 days 01:00:00"),
        (np.timedelta64("NaT"), None),
        (fractions.Fraction(1, 3), "1/3"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (pathlib.PurePosixPath("a/b"), "a/b"),
        (pd.Period("2012-01", "M"), "2012-01"),
        (["a", 1.0, None, True, 0.5], "['a', 1, None, True, 0.5]"),
        (np.array(["a", "b"]), "['a', 'b']"),
        (np.arange(2000.0)[1998:], "[1998, 1999]"),
        (np.array([]), "[]"),
        (np.array(1.0), "1"),
        (torch.tensor([1, 2]), "[1, 2]"),
        ({"a": (1, datetime.date(2012, 1, 1))}, "{'a': [1, '2012-01-01']}"),
        (pd.NaT, None),
        (pd.NA, None),
    ],
    ids=repr,
)
def test_equal_values_have_the_same_text(cell, text):
    assert column_texts([cell], "a")[0] == [text]
    assert column_texts([cell, "x"], "a")[0] == [text, "x"]


class Unstable:
    """An object whose text has a memory address."""


class Wrapper:
    def __str__(self):
        return f"Wrapper({object()!r})"


RECURSIVE = []
RECURSIVE.append(RECURSIVE)


@pytest.mark.parametrize(
    "cell",
    [
        len,
        lambda: None,
        "".join,
        Unstable,
        Unstable(),
        Wrapper(),
        [1, Unstable()],
        {"a": [Unstable()]},
        os,
        {1, 2},
        frozenset("ab"),
        [{"a", "b"}],
        (value for value in "ab"),
        iter([1]),
        RECURSIVE,
        b"bytes",
        memoryview(b"bytes"),
        np.timedelta64(1, "Y"),
    ],
    ids=lambda cell: type(cell).__name__,
)
def test_a_cell_without_a_stable_text_is_refused(cell):
    with pytest.raises(TypeError, match=r"X has .* in row 1 of column 'a'[:,.]"):
        column_texts(["x", cell], "a")


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        ([1, 2], "integer"),
        ([1, None], "integer or missing"),
        ([1, 2.0], "number"),
        ([Decimal(1), math.nan], "number or missing"),
        ([True, False], "boolean"),
        ([datetime.date(2012, 1, 1), datetime.datetime(2012, 1, 1)], "date"),
        ([datetime.time(9)], "time"),
        ([datetime.timedelta(1)], "duration"),
        ([None, math.nan], "missing"),
        ([1, "a"], "mixed"),
        ([[1]], "other"),
        (["a", None], "text or missing"),
        (["a", ""], "text"),
        (["007", "12"], "text"),
        (["7", "12", "seven"], "text/number"),
        (["True", "maybe"], "text/boolean"),
        (["true", "maybe"], "text"),
        (["True", "7"], "text/boolean/number"),
        (["2012-01-01", "2012-01-01T10:00Z"], "date text"),
        (["2012-01-01", "2012-02-30"], "text"),
        (["2012-01-01", ""], "text"),
    ],
    ids=str,
)
def test_kinds_of_columns(cells, kind):
    assert column_texts(cells, "a")[1] == kind


@pytest.mark.parametrize(
    ("kind", "cells", "texts"),
    [
        ("integer", [1979.0, "1979", " 1979.0", "0012", True], ["1979", "1979", "1979", "12", "1"]),
        ("integer", [2.5, "2.50"], ["2.5", "2.5"]),
        ("integer", ["9007199254740993"], ["9007199254740993"]),
        (
            "number",
            [7, "1e-7", "1.50", "nan", "", "-inf"],
            ["7", "1e-07", "1.5", None, None, "-inf"],
        ),
        ("boolean", ["true", "FALSE", 1, 0.0, ""], ["True", "False", "True", "False", None]),
        (
            "date",
            ["2012-01-01T00:00:00.000", "2012-01-01 09:30"],
            ["2012-01-01", "2012-01-01 09:30:00"],
        ),
        (
            "date",
            ["2012-01-01T00:00:00+0100", "2012-01-01 00:00Z"],
            ["2012-01-01 00:00:00+01:00", "2012-01-01 00:00:00+00:00"],
        ),
        ("date", ["NaT", "2012-01-01 00:00:00.000000001"], [None, "2012-01-01 00:00:00.000000001"]),
        ("time", ["09:30", "09:30:00.500"], ["09:30:00", "09:30:00.5"]),
        (
            "duration",
            ["1 days 00:00:00", "1 day, 02:00:00", "-1 days +23:00:00"],
            ["1 days", "1 days 02:00:00", "-1 days 23:00:00"],
        ),
        ("text", ["007", "2012-01-01 00:00:00", "true"], ["007", "2012-01-01 00:00:00", "true"]),
        ("text/number", [1984.0, "Alien"], ["1984", "Alien"]),
        ("text/boolean", [True, "maybe"], ["True", "maybe"]),
        (
            "date text",
            ["2012-01-01T00:00", "soon", datetime.date(2012, 1, 1)],
            ["2012-01-01", "soon", "2012-01-01"],
        ),
        ("mixed", ["a", 1.0], ["a", "1"]),
        ("other", [[1], "[1]"], ["[1]", "[1]"]),
    ],
    ids=str,
)
def test_cells_that_convert_without_loss_are_converted(kind, cells, texts):
    assert column_texts(cells, "a", kind)[0] == texts


@pytest.mark.parametrize(
    ("kind", "cell", "message"),
    [
        ("integer", "many", "row 1 has 'many', of kind 'text'. Convert the column"),
        ("integer", "1_000", "row 1 has '1_000'"),
        ("integer", 1e17, "A float does not hold every such integer"),
        ("number or missing", datetime.date(2012, 1, 1), "row 1 has '2012-01-01', of kind 'date'"),
        ("boolean", 2, "row 1 has '2', of kind 'integer'"),
        ("boolean", "yes", "row 1 has 'yes'"),
        ("date", "01/02/2012", "row 1 has '01/02/2012'"),
        ("date", "2012-01-01 25:00", "row 1 has '2012-01-01 25:00'"),
        ("date", 1325376000, "of kind 'integer'"),
        ("duration", 5, "of kind 'integer'"),
        ("text", 7, r"row 1 has '7', of kind 'integer'. .*read_csv\(..., dtype=\{'a': str\}\)"),
        ("text/boolean", 7, "Keep the column as text"),
        ("text", datetime.date(2012, 1, 1), "Keep the column as text"),
        ("date text", 7, "Keep the column as text"),
        ("integer", "x" * 10_000_000, "row 1 has 'xxxx"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_lossy_conversions_are_refused_with_the_rows(kind, cell, message):
    with pytest.raises(
        ValueError, match=rf"Column 'a' was of kind .* in fit, but row 1 .*{message}"
    ):
        column_texts([None, cell, None], "a", kind)


def test_a_column_that_is_all_missing_in_either_fit_or_predict_warns():
    assert column_texts([None, None], "a", "integer or missing")[0] == [None, None]
    with pytest.warns(UserWarning, match="Column 'a' is missing in all rows"):
        column_texts([None, math.nan], "a", "integer")
    with pytest.warns(UserWarning, match="Column 'a' was missing in all rows of fit"):
        column_texts([None, 1], "a", "missing")


NANOSECONDS = pd.Series(pd.to_datetime([1, None, 86_400 * 10**9], unit="ns"))


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"a": NANOSECONDS}),
        pd.DataFrame({"a": NANOSECONDS.astype("timestamp[ns][pyarrow]")}),
        pl.DataFrame({"a": NANOSECONDS.to_numpy()}),
        pa.table({"a": NANOSECONDS.to_numpy()}),
        NANOSECONDS.to_numpy()[:, None],
        np.ma.masked_invalid(NANOSECONDS.to_numpy()[:, None]),
    ],
    ids=lambda frame: type(frame).__module__,
)
def test_nanoseconds_are_kept(frame):
    table, kinds = write_cells(read_table(frame))
    assert table.columns == [["1970-01-01 00:00:00.000000001", None, "1970-01-02"]]
    assert kinds == ["date or missing"]


SINGLE = [0.1, None, 1234567.125]


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"a": pd.Series(SINGLE, dtype="float32")}),
        pd.DataFrame({"a": pd.Series(SINGLE, dtype="Float32")}),
        pl.DataFrame({"a": pl.Series(SINGLE, dtype=pl.Float32)}),
        pa.table({"a": pa.array(SINGLE, pa.float32())}),
        np.array(SINGLE, dtype=np.float32)[:, None],
    ],
    ids=lambda frame: type(frame).__module__,
)
def test_float32_is_written_with_its_own_digits(frame):
    table, _ = write_cells(read_table(frame))
    assert table.columns == [["0.1", None, "1234567.1"]]


def test_polars_enum_categories_and_durations():
    frame = pl.DataFrame(
        {
            "enum": pl.Series(["a", None], dtype=pl.Enum(["a", "b"])),
            "category": pl.Series(["x", "y"], dtype=pl.Categorical),
            "long": [datetime.timedelta(days=2), None],
            "list": [[1, None], []],
        }
    )
    table, kinds = write_cells(read_table(frame))
    assert table.columns == [["a", None], ["x", "y"], ["2 days", None], ["[1, None]", "[]"]]
    assert kinds == ["text or missing", "text", "duration or missing", "other"]

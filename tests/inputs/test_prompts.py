import numpy as np
import pandas as pd
import polars as pl
import pytest
from scipy.sparse import csr_matrix

from sklearn_relish.inputs.prompts import read_table, render, write_cells


def texts_of(X, prompt=None):
    table, _ = write_cells(read_table(X))
    return render(table, table.names, prompt)


@pytest.mark.parametrize(
    "X",
    [
        ["a", "b"],
        ("a", "b"),
        np.array(["a", "b"]),
        np.array(["a", "b"], dtype=object),
        np.array(["a", "b"], dtype=np.dtypes.StringDType()),
        np.array([["a"], ["b"]], dtype=object),
        [["a"], ["b"]],
        pd.Series(["a", "b"], index=[7, 3]),
        pd.Series(["a", "b"], dtype="string"),
        pd.DataFrame({"review": ["a", "b"]}),
        pl.Series(["a", "b"]),
        pl.DataFrame({"review": ["a", "b"]}),
        {"review": ["a", "b"]},
    ],
    ids=lambda X: type(X).__module__ + "." + type(X).__name__,
)
def test_texts_are_unchanged(X):
    assert texts_of(X) == ["a", "b"]


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
def test_columns_become_lines_and_missing_cells_are_left_out(frame):
    films = frame({"title": ["Alien", "Solaris"], "year": [1979, None], "score": [98.5, 92.0]})
    assert texts_of(films) == ["title: Alien\nyear: 1979\nscore: 98.5", "title: Solaris\nscore: 92"]


def test_a_dict_of_columns_is_a_table():
    columns = {"a": ["x", None], "b": np.array([1.5, np.nan]), "c": pd.Series([7, 8], index=[3, 5])}
    assert texts_of(columns) == ["a: x\nb: 1.5\nc: 7", "c: 8"]
    assert texts_of({"a": np.array([0.1], dtype=np.float32)}) == ["0.1"]


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, pd.NaT])
def test_all_missing_values_are_left_out(missing):
    frame = pd.DataFrame({"a": ["x", "y"], "b": pd.Series(["z", missing], dtype=object)})
    assert texts_of(frame) == ["a: x\nb: z", "a: y"]


def test_unnamed_columns_have_names_as_in_scikit_learn():
    assert texts_of(np.array([[1.5, 2.0]])) == ["x0: 1.5\nx1: 2"]
    assert texts_of(pd.DataFrame([[1.5, 2.0]])) == ["x0: 1.5\nx1: 2"]


@pytest.mark.parametrize(
    ("cells", "text"),
    [
        (np.array([[0.1, 1e-7]], dtype=np.float32), "x0: 0.1\nx1: 1e-07"),
        (np.array([[0.1, 1 / 3]]), "x0: 0.1\nx1: 0.3333333333333333"),
        ([[True, 2**60 + 1]], "x0: True\nx1: 1152921504606846977"),
        (np.array([["2020-01-02", "2020-01-03"]], "M8[ns]"), None),
        (np.ma.masked_array([[1, 2]], mask=[[False, True]]), "x0: 1"),
    ],
)
def test_cells_are_read_as_a_person_would_write_them(cells, text):
    text = text or "x0: 2020-01-02\nx1: 2020-01-03"
    assert texts_of(cells) == [text]


def test_a_template_is_filled_with_the_cells():
    frame = pd.DataFrame({"premise": ["p", None], "the hypothesis": ["{h}", "g"]})
    prompt = "1: {premise}\n2: {the hypothesis} {{end}}"
    assert texts_of(frame, prompt) == ["1: p\n2: {h} {end}", "1: \n2: g {end}"]
    assert texts_of(["a"], "Review: {text}") == ["Review: a"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{titel}", r"names \{titel\}, which is no column: the columns are 'title', 'year'"),
        ("{title.__class__}", "which is no column"),
        ("no field", "names no column"),
        ("{title", "is not a template"),
        ("{year:.0f}", "formats 'year'.*a field can only be a name"),
    ],
)
def test_wrong_templates_are_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        texts_of(pd.DataFrame({"title": ["a"], "year": [1]}), prompt)


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        ("one text", ValueError, "X is a single str: pass a list of texts"),
        (b"one text", ValueError, "X is a single bytes"),
        ([], ValueError, "no rows"),
        (np.empty((0, 2)), ValueError, "no rows"),
        (np.empty((2, 0)), ValueError, r"0 feature\(s\)"),
        (np.arange(3.0), ValueError, "holds no text in rows 0, 1, 2 .*Reshape your data"),
        ([1, 2], ValueError, "holds no text in rows 0, 1"),
        (["a", 5, "c"], ValueError, r"holds no text in row 1 \(row 1 is a int\)"),
        ([b"a", b"b"], TypeError, "bytes in rows 0, 1: decode them first"),
        (["a", None, "c", np.nan], ValueError, "missing texts in rows 1, 3: drop these rows"),
        ([None, None], ValueError, "missing texts in rows 0, 1"),
        (pd.DataFrame({"a": ["x", None]}), ValueError, "missing texts in row 1, where no column"),
        (["a"] + [None] * 9, ValueError, "rows 1, 2, 3, 4, 5 and 4 more"),
        (pd.Series(["a", pd.NA], dtype="string"), ValueError, "missing texts in row 1"),
        (pl.Series(["a", None]), ValueError, "missing texts in row 1"),
        ([["a", "b"], ["c"]], ValueError, "rows of 1 to 2 columns"),
        (np.zeros((2, 2, 2)), ValueError, "3 dimensions"),
        (np.array([[1j]]), ValueError, "Complex data not supported"),
        (csr_matrix(np.eye(3)), TypeError, "sparse"),
        ({"a": "b"}, TypeError, "X is a dict, and 'a' is a str: a dict has a list or an array"),
        ({"a": ["b"], "c": np.eye(2)}, TypeError, "X is a dict, and 'c' is a ndarray"),
        ({"a": [1], "b": [1, 2]}, ValueError, "differ in length: {'a': 1, 'b': 2}"),
        ({0: ["a"]}, TypeError, r"dict with the keys \[0\]: the names of columns are strings"),
        ({"a": []}, ValueError, "no rows"),
        ({}, ValueError, "no rows"),
        ({"a", "b"}, TypeError, "X is a set: .* whose rows have an order"),
        (frozenset("ab"), TypeError, "X is a frozenset: .* whose rows have an order"),
        ({"a": 1}.keys(), TypeError, "X is a dict_keys"),
        ({"a": "b"}.values(), TypeError, "X is a dict_values"),
        ((text for text in "ab"), TypeError, "X is a generator"),
        (iter(["a"]), TypeError, "expected a list of texts"),
        (pl.LazyFrame({"a": ["b"]}), TypeError, "collect it first"),
        (
            pd.DataFrame({"a": ["x", "y"], "b": ["z", b"z"]}),
            TypeError,
            "bytes in row 1 of column 'b'",
        ),
        (pd.DataFrame({"a": ["x"], "b": [object()]}), TypeError, "object in row 0 of column 'b'"),
        (["fine", "broken \ud800"], ValueError, "lone surrogates.* in row 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,  # no addresses
)
def test_bad_input_is_refused_with_its_rows(X, error, message):
    with pytest.raises(error, match=message):
        texts_of(X)

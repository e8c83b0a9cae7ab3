"""Texts and tables of other libraries lead to the same predictions as lists."""

import numpy as np
import pytest

pd = pytest.importorskip("pandas")
pl = pytest.importorskip("polars")
pa = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")

TEXTS = {
    "list": list,
    "tuple": tuple,
    "NumPy objects": lambda texts: np.array(texts, dtype=object),
    "NumPy str": np.array,
    "NumPy StringDType": lambda texts: np.array(texts, dtype=np.dtypes.StringDType()),
    "pandas Series": pd.Series,
    "pandas Series of objects": lambda texts: pd.Series(texts, dtype=object),
    "pandas Series in Arrow": lambda texts: pd.Series(texts, dtype="string[pyarrow]"),
    "pandas Series with an index": lambda texts: pd.Series(texts, index=range(900, 1020)),
    "pandas frame of one column": lambda texts: pd.DataFrame({"text": texts}),
    "Polars Series": pl.Series,
    "PyArrow array": lambda texts: pa.chunked_array([texts]),
    "Hugging Face column": lambda texts: datasets.Dataset.from_dict({"text": texts})["text"],
}
TABLES = {
    "pandas": pd.DataFrame,
    "pandas in Arrow": lambda columns: pd.DataFrame(columns).convert_dtypes(
        dtype_backend="pyarrow"
    ),
    "Polars": pl.DataFrame,
    "PyArrow": pa.table,
    "Hugging Face to_pandas": lambda columns: datasets.Dataset.from_dict(columns).to_pandas(),
}


@pytest.fixture(scope="module")
def expected(llm, reviews):
    from sklearn_relish import RelishRegressor

    small = {"latent_size": 16, "n_heads": 2, "max_epochs": 2, "n_estimators": 1, "random_state": 0}
    regressor = RelishRegressor(llm, **small).fit(*reviews)
    return regressor.predict(reviews[0])


@pytest.mark.parametrize("kind", TEXTS)
def test_texts(regressor, reviews, expected, kind):
    texts, y = reviews
    regressor.set_params(max_epochs=2, n_estimators=1, learning_rate="auto")
    converted = TEXTS[kind](texts)
    target = datasets.Dataset.from_dict({"y": y})["y"] if kind == "Hugging Face column" else y
    np.testing.assert_array_equal(regressor.fit(converted, target).predict(converted), expected)


@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_several_columns(regressor, reviews, kind):
    texts, y = reviews
    stars = [None if i % 3 else i % 5 for i in range(120)]
    table = TABLES[kind]({"title": texts, "stars": stars, "seen": [i % 2 == 0 for i in range(120)]})
    regressor.set_params(max_epochs=2, n_estimators=1).fit(table, y)
    assert list(regressor.feature_names_in_) == ["title", "stars", "seen"]
    assert regressor._render(regressor._read_table(table, reset=False))[:2] == [
        f"title: {texts[0]}\nstars: 0\nseen: True",
        f"title: {texts[1]}\nseen: False",
    ]
    regressor.set_params(prompt="{title} has {stars}").fit(table, y)
    assert regressor._render(regressor._read_table(table, reset=False))[0] == f"{texts[0]} has 0"
    with pytest.raises(ValueError, match=r"missing|feature names"):
        regressor.predict(TABLES[kind]({"title": texts[:2], "stars": [1, 2]}))


NULLS = {
    "pandas in Arrow": lambda texts: pd.DataFrame({"text": pd.array(texts, "string[pyarrow]")}),
    "pandas Series in Arrow": lambda texts: pd.Series(texts, dtype=pd.ArrowDtype(pa.string())),
    "Polars": lambda texts: pl.DataFrame({"text": texts}),
    "PyArrow table": lambda texts: pa.table({"text": texts}),
    "PyArrow record batch": lambda texts: pa.RecordBatch.from_pydict({"text": texts}),
    "PyArrow array": lambda texts: pa.chunked_array([texts]),
    "dict of lists": lambda texts: {"text": texts},
    "dict of NumPy arrays, as in Ray Data": lambda texts: {"text": np.array(texts, dtype=object)},
    "dict of Arrow arrays": lambda texts: {"text": pa.chunked_array([texts])},
}


@pytest.mark.parametrize("prompt", [None, "Review: {text}"])
@pytest.mark.parametrize("kind", NULLS)
def test_missing_texts_are_named_by_row(regressor, kind, prompt):
    regressor.set_params(prompt=prompt, max_epochs=1, n_estimators=1)
    texts = [f"text {i}" for i in range(8)]
    broken = NULLS[kind]([None if i in (2, 5) else text for i, text in enumerate(texts)])
    with pytest.raises(ValueError, match=r"missing texts in rows 2, 5.*: drop these rows"):
        regressor.fit(broken, range(8))
    regressor.fit(NULLS[kind](texts), range(8))
    with pytest.raises(ValueError, match=r"missing texts in rows 2, 5.*: drop these rows"):
        regressor.predict(broken)


def test_a_row_without_a_cell_for_the_prompt_is_named(regressor):
    table = pa.table({"row": range(4), "text": ["a", None, "b", None]})
    regressor.set_params(prompt="Review: {text}")
    with pytest.raises(ValueError, match=r"missing texts in rows 1, 3.*: drop these rows"):
        regressor.fit(table, range(4))


def test_a_dataset_of_several_columns_is_refused_with_a_hint(regressor):
    rows = datasets.Dataset.from_dict({"title": ["a", "b"], "year": [1, 2]})
    with pytest.raises(TypeError, match=r"holds a dict in rows 0, 1: pass a frame.*to_pandas"):
        regressor.fit(rows, [1, 2])

"""Inputs that are not in memory: a loop over the batches of each library."""

import numpy as np
import pytest

from sklearn_relish import LLMEncoder, StateStore

pd = pytest.importorskip("pandas")
pa = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")
arrow_dataset = pytest.importorskip("pyarrow.dataset")
parquet = pytest.importorskip("pyarrow.parquet")

TABLE = {
    "title": [f"a good film {i}" if i % 2 else f"a poor film, {i}" for i in range(60)],
    "year": [1960 + i for i in range(60)],
    "stars": [None if i % 20 > 10 else i % 5 / 2 for i in range(60)],
}


@pytest.fixture
def fitted(regressor):
    return regressor.set_params(max_epochs=1, n_estimators=1).fit(pd.DataFrame(TABLE), range(60))


@pytest.fixture
def files(tmp_path):
    frame = pd.DataFrame(TABLE)
    frame.to_csv(tmp_path / "films.csv", index=False)
    parquet.write_table(pa.table(TABLE), tmp_path / "films.parquet", row_group_size=25)
    return tmp_path


BATCHES = {
    "pandas read_csv": lambda folder: pd.read_csv(folder / "films.csv", chunksize=25),
    "PyArrow ParquetFile": lambda folder: parquet.ParquetFile(
        folder / "films.parquet"
    ).iter_batches(25),
    "PyArrow RecordBatchReader": lambda folder: (
        arrow_dataset.dataset(folder / "films.parquet").scanner(batch_size=25).to_reader()
    ),
    "PyArrow dataset": lambda folder: arrow_dataset.dataset(folder / "films.parquet").to_batches(
        batch_size=25
    ),
    "Hugging Face IterableDataset": lambda folder: stream(folder).iter(batch_size=25),
    "dicts of NumPy arrays, as in Ray Data": lambda folder: (
        {name: cells.to_numpy() for name, cells in pd.DataFrame(TABLE)[start : start + 25].items()}
        for start in (0, 25, 50)
    ),
}


def stream(folder):
    path = str(folder / "films.parquet")
    return datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)


@pytest.mark.parametrize("kind", BATCHES)
def test_a_loop_over_batches(fitted, files, kind):
    expected = fitted.predict(pd.DataFrame(TABLE))
    predictions = [fitted.predict(batch) for batch in BATCHES[kind](files)]
    assert len(predictions) == 3
    np.testing.assert_array_equal(np.concatenate(predictions), expected)


@pytest.mark.parametrize("format", [None, "numpy", "pandas", "arrow", "polars"])
def test_map_of_a_dataset(fitted, format):
    dataset = datasets.Dataset.from_dict(TABLE).with_format(format)
    scored = dataset.map(
        lambda batch: {"score": fitted.predict(batch)}, batched=True, batch_size=25
    )
    np.testing.assert_array_equal(
        scored.with_format("numpy")["score"], fitted.predict(pd.DataFrame(TABLE))
    )


def test_map_of_a_streaming_dataset(fitted, files):
    scored = stream(files).map(
        lambda batch: {"score": fitted.predict(batch)}, batched=True, batch_size=25
    )
    assert [row["score"] for row in scored] == fitted.predict(pd.DataFrame(TABLE)).tolist()


def test_the_columns_of_a_dict_are_those_of_fit(regressor, fitted):
    batch = {name: cells[:2] for name, cells in TABLE.items()}
    with pytest.raises(ValueError, match="columns 'title', 'year', but RelishRegressor was"):
        fitted.predict({name: batch[name] for name in ("title", "year")})
    with pytest.raises(ValueError, match=r"'seen', but .* 'stars': pass these columns"):
        fitted.predict(batch | {"seen": [1, 2]})
    expected = fitted.predict(pd.DataFrame(batch))
    regressor.fit(TABLE, range(60))
    assert list(regressor.feature_names_in_) == list(TABLE)
    assert regressor.n_features_in_ == 3
    np.testing.assert_array_equal(regressor.predict(pd.DataFrame(batch)), expected)
    regressor.fit(TABLE["title"], range(60))
    assert not hasattr(regressor, "feature_names_in_")
    expected = regressor.predict(batch["title"])
    np.testing.assert_array_equal(regressor.predict({"title": batch["title"]}), expected)
    with pytest.raises(ValueError, match="fitted with the columns 'text'"):
        regressor.predict(batch)


def test_states_read_before_a_broken_row_group_are_kept(llm, files, tmp_path):
    store = StateStore(tmp_path / "states")
    encoder = LLMEncoder(llm, memory=store)
    path = files / "films.parquet"
    sound = path.read_bytes()
    column = parquet.read_metadata(path).row_group(1).column(0)
    start, size = column.dictionary_page_offset, column.total_compressed_size
    path.write_bytes(sound[:start] + b"\xff" * size + sound[start + size :])

    def read():
        with parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                encoder.fit_transform(file.read_row_group(group, columns=["title"]))

    with pytest.raises(OSError, match="page header"):
        read()
    assert store.misses == 25
    path.write_bytes(sound)
    read()
    assert store.misses == 60

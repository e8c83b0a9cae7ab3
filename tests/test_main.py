"""The command line: tables of CSV and Parquet, batches, and errors that are sentences."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_model

from sklearn_relish import RelishRegressor
from sklearn_relish.__main__ import main

pytest.importorskip("pyarrow")

FRAME = pd.DataFrame(
    {
        "title": [f"film {i}" for i in range(30)],
        "code": [f"{i:03}" for i in range(29)] + ["x"],
        "year": [None, *range(1981, 2010)],
        "score": np.arange(30.0),
    }
)
SMALL = ["--set", "max_epochs=1", "--set", "n_estimators=1", "--set", "latent_size=16"]


def write(frame, path):
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    return str(path)


def read(path):
    return pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A regressor that the command line has fitted."""
    path = tmp_path_factory.mktemp("command-line")
    table = write(FRAME, path / "films.parquet")
    arguments = ["--target", "score", "--model", str(tiny_model()), "--random-state", "0", *SMALL]
    assert main(["fit", table, *arguments, "--output", str(path / "films")]) == 0
    return path / "films"


def test_fit_is_that_of_the_regressor(folder):
    saved = RelishRegressor.from_pretrained(folder)
    ours = RelishRegressor(
        tiny_model(), max_epochs=1, n_estimators=1, latent_size=16, random_state=0
    ).fit(FRAME.drop(columns="score"), FRAME["score"])
    X = FRAME[["title", "code", "year"]]
    np.testing.assert_array_equal(saved.predict(X), ours.predict(X))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("output_suffix", [".csv", ".parquet"])
def test_batches_give_the_predictions_of_the_whole_table(folder, tmp_path, suffix, output_suffix):
    # reordered and extra columns; in the first batches all codes look like numbers
    table = write(FRAME[["score", "year", "code", "title"]], tmp_path / f"films{suffix}")
    output = tmp_path / f"predicted{output_suffix}"
    arguments = ["predict", str(folder), table, "--output", str(output), "--batch-size", "7"]
    assert main(arguments) == 0
    expected = RelishRegressor.from_pretrained(folder).predict(FRAME[["title", "code", "year"]])
    written = read(output)
    assert list(written) == ["prediction"]
    np.testing.assert_array_equal(written["prediction"], expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f"films{suffix}", output.name]
    )


def test_columns_may_have_other_names(folder, tmp_path):
    renamed = FRAME.rename(columns={"title": "name", "year": "made"})
    table = write(renamed, tmp_path / "films.csv")
    outputs = [str(tmp_path / name) for name in ("a.csv", "b.csv")]
    same = write(FRAME, tmp_path / "same.csv")
    columns = ["--columns", "name", "code", "made"]
    assert main(["predict", str(folder), table, *columns, "--output", outputs[0]]) == 0
    assert main(["predict", str(folder), same, "--output", outputs[1]]) == 0
    np.testing.assert_array_equal(*map(pd.read_csv, outputs))


def test_a_regressor_of_texts_and_of_several_targets(tmp_path):
    texts = [f"{i}" for i in range(20)]  # numbers, for pandas
    Y = np.stack([np.arange(20.0), -np.arange(20.0)], axis=1)
    regressor = RelishRegressor(tiny_model(), max_epochs=1, n_estimators=1).fit(texts, Y)
    regressor.save_pretrained(tmp_path / "saved")
    table = write(pd.DataFrame({"text": texts, "id": range(20)}), tmp_path / "texts.csv")
    alone = write(pd.DataFrame({"text": texts}), tmp_path / "alone.csv")
    for source, columns in ((table, ["--columns", "text"]), (alone, [])):
        output = tmp_path / "predicted.parquet"
        arguments = ["predict", str(tmp_path / "saved"), source, "--output", str(output)]
        assert main([*arguments, *columns]) == 0
        written = pd.read_parquet(output)
        assert list(written) == ["prediction_0", "prediction_1"]
        np.testing.assert_array_equal(written.to_numpy(), regressor.predict(texts))


def test_the_prompt_chooses_the_columns(tmp_path, capsys):
    table = write(FRAME, tmp_path / "films.csv")
    prompt = "{title}, again {title}"
    arguments = [
        "fit",
        table,
        "--target",
        "score",
        "--prompt",
        prompt,
        "--model",
        str(tiny_model()),
    ]
    assert main([*arguments, *SMALL, "--output", str(tmp_path / "films")]) == 0
    assert "Fitted on 30 rows" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "films")]) == 0
    shown = capsys.readouterr().out
    assert "columns: title (text)\n" in shown
    assert "heads: 1 with " in shown
    assert "ridge models: yes\n" in shown or "ridge models: no\n" in shown
    assert f"prompt={prompt!r}" in shown
    assert "latent_size=16" in shown
    assert "saved with: sklearn-relish " in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "FOLDER", "no.csv", "--output", "o.csv"], "There is no file"),
        (["predict", "FOLDER", "other.csv", "--output", "o.csv"], "has no column 'title', 'code'"),
        (["predict", "FOLDER", "other.parquet", "--output", "o.csv"], "has no column 'title'"),
        (["predict", "FOLDER", "empty.csv", "--output", "o.csv"], "has no rows"),
        (
            ["predict", "FOLDER", "bad.csv", "--output", "o.csv"],
            "in the batch of rows 0 to 29: Col",
        ),
        (
            ["predict", "FOLDER", "films.csv", "--output", "o.csv", "--columns", "a"],
            "has 1 columns",
        ),
        (["predict", "texts", "films.csv", "--output", "o.csv"], "without names: pass --columns"),
        (["predict", "nowhere", "films.csv", "--output", "o.csv"], "No regressor 'nowhere'"),
        (["info", "nowhere"], "No regressor 'nowhere'"),
        (["fit", "films.csv", "--target", "mark", "--output", "o"], "has no column 'mark'"),
        (["fit", "films.csv", "--target", "title", "--output", "o"], "y holds no number"),
        (
            ["fit", "films.csv", "--target", "score", "--output", "o", "--set", "depth=3"],
            "Invalid parameter 'depth'",
        ),
        (
            ["fit", "films.csv", "--target", "score", "--output", "o", "--set=learning_rate=1e30"],
            "Training diverged",
        ),
    ],
)
def test_errors_are_sentences(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write(FRAME, tmp_path / "films.csv")
    write(FRAME[["year"]], tmp_path / "other.csv")
    write(FRAME[["year"]], tmp_path / "other.parquet")
    write(FRAME.head(0), tmp_path / "empty.csv")
    write(FRAME.assign(year="unknown"), tmp_path / "bad.csv")
    if "texts" in arguments:
        regressor = RelishRegressor(tiny_model(), max_epochs=1, n_estimators=1)
        regressor.fit(["a", "b", "c"], [1, 2, 3]).save_pretrained("texts")
    if arguments[0] == "fit":
        arguments = [*arguments, "--model", str(tiny_model())]
    arguments = [str(folder) if argument == "FOLDER" else argument for argument in arguments]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ")
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("*o.csv*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "f", "films.txt", "--output", "o.csv"], "neither a .csv nor a .parquet file"),
        (["predict", "f", "a.csv", "--output", "o.csv", "--batch-size", "0"], "no number of rows"),
        (["fit", "a.csv", "--target", "y", "--output", "o", "--set", "depth"], "not NAME=VALUE"),
        (["fit", "a.csv"], "required"),
        ([], "required"),
    ],
)
def test_wrong_usage(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_extra(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sklearn_relish.__main__.find_spec", lambda name: None)
    table = write(FRAME, tmp_path / "films.csv")
    assert main(["predict", str(folder), table, "--output", str(tmp_path / "o.csv")]) == 1
    assert "pandas for this file: pip install 'sklearn-relish[cli]'" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(folder, tmp_path, capsys):
    table = write(FRAME.assign(code=None), tmp_path / "films.csv")
    assert main(["predict", str(folder), table, "--output", str(tmp_path / "o.csv")]) == 0
    assert "warning: Column 'code' is missing in all rows" in capsys.readouterr().err


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "sklearn_relish", "info", "/no/where"]
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert result.returncode == 1
    assert result.stderr.startswith("error: No regressor '/no/where' was found")

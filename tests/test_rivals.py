"""Every rival of the evaluation is a regressor that scikit-learn's cross-validation runs.

A line of the evaluation's results counts only with the current versions and settings.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.model_selection import KFold, cross_val_score
from tiny import tiny_model

from sklearn_relish import FrozenLLM, RelishRegressor, StateStore
from sklearn_relish.training import trainer

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
rivals = pytest.importorskip("rivals", reason="the benchmarks are not installed with the package")
evaluation = pytest.importorskip("evaluation")

TEMPLATE = "{a} {b}:"
WORDS = {"awful": -2.0, "bad": -1.0, "good": 1.0, "superb": 2.0}


@pytest.fixture(scope="module")
def llm():
    return FrozenLLM(tiny_model(), device="cpu", dtype="float32")


def rows(n_rows):
    random = np.random.RandomState(0)
    a, b = random.choice(list(WORDS), size=(2, n_rows))
    frame = pd.DataFrame({"a": a, "b": b})
    return frame, frame["a"].map(WORDS) + frame["b"].map(WORDS)


def r2_of(rival, n_rows=90):
    X, y = rows(n_rows)
    return cross_val_score(rival, X, y, cv=KFold(3), scoring="r2", error_score="raise")


def test_heads_and_counts_learn(llm):
    reading = {"prompt": TEMPLATE, "memory": StateStore()}
    for rival in (
        rivals.tfidf_ridge(TEMPLATE),
        rivals.pooled_linear(llm, pooling="mean", **reading),
        rivals.pooled_mlp(llm, pooling="mean", **reading),
    ):
        assert r2_of(rival).mean() > 0.5, rival


def test_published_relish_is_as_published(llm, monkeypatch):
    settings = {"prompt": "{a}\n{b}:", "max_epochs": 2, "random_state": 0}
    X, y = rows(40)
    lengths = []

    def average(head, n_steps):
        lengths.append(n_steps)
        return average_of_steps(head, n_steps)

    average_of_steps = trainer._MovingAverage
    monkeypatch.setattr(trainer, "_MovingAverage", average)
    rival = rivals.published_relish(llm, **settings).fit(X, y)
    assert lengths == [0.0]
    assert not rival.head_.heads[0].sizes["pair"]
    default = RelishRegressor(llm, **settings).fit(X, y)
    assert default.head_.heads[0].sizes["pair"]
    assert min(lengths[1:]) > 0
    assert np.isfinite(rival.predict(X)).all()
    assert rival.layer_ == llm.n_layers
    assert len(rival.head_.heads) == 1
    assert rival.head_.linear is None
    assert rival.head_.state_norm is None
    assert not rival.deep_supervision
    assert rival.latent_size == 256
    assert rival.learning_rate == 5e-4


@pytest.mark.parametrize("name", ["DecodingRegressor", "ExpectationRegressor"])
@pytest.mark.parametrize("n_shots", [0, 4])
def test_answers_in_words_are_within_the_scale(name, n_shots):
    rival = getattr(rivals, name)(str(tiny_model()), TEMPLATE, "Rate it.", n_shots=n_shots)
    X, y = rows(40)
    assert np.isfinite(r2_of(rival, 40)).all()  # it knows no numbers: nothing is asked of them
    predicted = rival.fit(X, y).predict(X[:5])
    assert predicted.shape == (5,)
    assert (predicted >= y.min()).all()
    assert (predicted <= y.max()).all()


@pytest.mark.parametrize("name", ["LoRARegressor", "RAFTRegressor"])
def test_fine_tuned_language_models_learn(name):
    pytest.importorskip("peft")
    rival = getattr(rivals, name)(
        str(tiny_model()), TEMPLATE, n_epochs=8, learning_rate=5e-3, rank=8
    )
    assert r2_of(rival).mean() > 0.5


def test_raft_predicts_the_expected_number():
    """With equal weights for all digits, that is the middle of the scale."""
    pytest.importorskip("peft")
    X, y = rows(40)
    rival = rivals.RAFTRegressor(str(tiny_model()), TEMPLATE, n_epochs=1).fit(X, y)
    assert rival.tokenizer_.convert_ids_to_tokens(rival.digits_) == list("0123456789")
    assert rival._tokens(X)[0].tolist() == rival.tokenizer_(f"{X['a'][0]} {X['b'][0]}: ").input_ids
    predicted = rival.predict(X)
    assert (predicted > y.min()).all()
    assert (predicted < y.max()).all()
    with torch.no_grad():
        rival.network_.get_base_model().get_output_embeddings().weight.zero_()
    np.testing.assert_allclose(rival.predict(X), (y.min() + y.max()) / 2, atol=1e-6)


def test_sentence_embeddings_learn():
    pytest.importorskip("sentence_transformers")
    model = str(tiny_model("bert"))
    for rival in (rivals.embedded_ridge(model), rivals.embedded_boosting(model)):
        assert r2_of(rival, 180).mean() > 0.5, rival


def test_features_of_a_pair():
    pytest.importorskip("sentence_transformers")
    X = pd.DataFrame({"a": ["good", "good"], "b": ["good", "bad"]})
    features = rivals.PairEmbedder(str(tiny_model("bert"))).fit_transform(X)
    u, v, difference, product = np.split(features[:, :-1], 4, axis=1)
    np.testing.assert_allclose(u[0], v[0], rtol=1e-5)
    np.testing.assert_array_equal(difference, np.abs(u - v))
    np.testing.assert_array_equal(product, u * v)
    assert features[:, -1] == pytest.approx([1, np.corrcoef(u[1], v[1])[0, 1]], abs=0.05)
    assert features[1, -1] < 0.999


def test_cross_encoder_learns_and_leaves_nothing_behind(tmp_path, monkeypatch, capfd):
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    rival = rivals.CrossEncoderRegressor(
        str(tiny_model("bert")), n_epochs=8, batch_size=16, learning_rate=5e-3
    )
    X, y = rows(90)
    predicted = rival.fit(X, y).predict(X)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ""
    np.testing.assert_array_equal(rival.fit(X, y).predict(X), predicted)
    assert r2_of(rival).mean() > 0.5


@pytest.mark.parametrize("task", evaluation.TASKS.values(), ids=evaluation.TASKS)
def test_both_orders_read_the_same_pair(task):
    swapped = task.swapped
    assert swapped.swapped == task
    assert swapped.pair is not None
    row = {"text_a": "one", "text_b": "two"}
    text, other = task.prompt.format(**row), swapped.prompt.format(**row)
    assert text.index("one") < text.index("two")
    if text.startswith("Source"):  # a name stays with its text
        source, translation, end = text.splitlines()
        assert other.splitlines() == [translation, source, end]
    else:  # the names are numbers
        assert other == task.prompt.format(text_a="two", text_b="one")


def test_both_orders_are_read_before_the_fit_is_timed(llm, tmp_path, monkeypatch):
    for split in ("train", "test"):
        X = pd.DataFrame({"text_a": [f"film {i}" for i in range(40)], "text_b": "a book"})
        path = tmp_path / "stsb" / f"{split}.csv"
        path.parent.mkdir(exist_ok=True)
        X.assign(score=np.arange(40.0) % 5).to_csv(path, index=False)
    n_read = []

    def n_texts():
        return sum(row["n_texts"] for row in store.info())

    def run_cell(estimator, train, test, spread):
        before = n_texts()
        estimator.set_params(max_epochs=1)
        estimator.fit(train[evaluation.COLUMNS], train["score"]).predict(test[evaluation.COLUMNS])
        n_read.append((before, n_texts() - before))
        return {"r": 0.0, "nrmse": 0.0, "fit_seconds": 0.0}

    store = StateStore()
    monkeypatch.setattr(evaluation, "run_cell", run_cell)
    results = evaluation.Cells(tmp_path / "lines.jsonl")
    options = {"sets": ["stsb"], "methods": [evaluation.BOTH_ORDERS], "seeds": 1, "rows": [40]}
    evaluation.run(results, {"tiny": llm}, tmp_path, store, draws=0, test_rows=40, **options)
    assert n_read == [(80, 0)]  # 40 pairs, in two orders
    assert results.find(method=evaluation.BOTH_ORDERS)[0]["reading_seconds"] > 0


CELL = {"set": "stsb", "model": "tiny", "seed": 0, "train_rows": 300, "test_rows": 1000}


def line_of(results, method):
    cell = CELL | {"method": method, "reading_seconds": 1.0, "fit_seconds": 2.0}
    settings = evaluation.settings_of(results.estimator(cell))
    versions = evaluation.versions_of(evaluation.find_method(method))
    return cell | {"versions": versions, "settings": settings}


@pytest.mark.parametrize("method", evaluation.METHODS)
def test_a_line_is_found_again(tmp_path, method):
    path = tmp_path / "lines.jsonl"
    results = evaluation.Cells(path)
    results.add(**line_of(results, evaluation.OURS))
    results.add(**line_of(results, method))
    found = evaluation.Cells(path).find(**CELL, method=method)
    assert found[-1] == json.loads(path.read_text().splitlines()[-1])


def test_a_line_with_other_versions_or_settings_is_not_found(tmp_path):
    results = evaluation.Cells(tmp_path / "lines.jsonl")
    line = line_of(results, "cross-encoder")
    old = {name: value for name, value in line.items() if name not in ("versions", "settings")}
    results.add(**old)
    results.add(**line | {"versions": line["versions"] | {"torch": "1.0"}})
    results.add(**line | {"settings": line["settings"] | {"n_epochs": 30}})
    results.add(**line | {"method": "a method of another day"})
    assert results.find(**CELL) == []
    results.add(**line)
    assert results.find(**CELL) == [line]


def test_settings_name_what_decides_and_no_place():
    results = evaluation.Cells(Path("none"))
    counted = line_of(results, evaluation.COUNTED)["settings"]
    assert counted["estimator__functiontransformer__kw_args"] == {
        "template": evaluation.TASKS["stsb"].prompt
    }
    embedded = line_of(results, "sentence embeddings + ridge")["settings"]
    assert "pairembedder__model" not in embedded
    assert embedded["ridgecv__alphas"] == list(rivals.PENALTIES)


def test_a_timed_line_depends_on_the_time_of_relish(tmp_path):
    results = evaluation.Cells(tmp_path / "lines.jsonl")
    results.add(**line_of(results, evaluation.OURS))
    line = line_of(results, "LoRA, as long as RELISH")
    assert line["settings"]["max_seconds"] == 3.0
    assert results.is_current(line)
    results.lines[0]["fit_seconds"] = 5.0
    assert not results.is_current(line)


def test_methods_with_another_number_of_epochs():
    results = evaluation.Cells(Path("none"))
    for name in ("LoRA", "RAFT", "cross-encoder"):
        settings = line_of(results, name)["settings"]
        more = line_of(results, f"{name}, 20 epochs")["settings"]
        assert more == settings | {"n_epochs": 20}
    with pytest.raises(argparse.ArgumentTypeError, match="no method"):
        evaluation.method_name("zero-shot, 20 epochs")

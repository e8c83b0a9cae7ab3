"""Every rival of the evaluation is a regressor that scikit-learn's cross-validation runs."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import KFold, cross_val_score
from tiny import tiny_model

from sklearn_relish import FrozenLLM, StateStore

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
rivals = pytest.importorskip("rivals", reason="the benchmarks are not installed with the package")

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


def test_published_relish_is_as_published(llm):
    rival = rivals.published_relish(llm, prompt=TEMPLATE, max_epochs=2, random_state=0)
    X, y = rows(40)
    rival.fit(X, y)
    assert rival.layer_ == llm.n_layers
    assert len(rival.head_.heads) == 1
    assert rival.head_.linear is None
    assert rival.head_.state_norm is None
    assert not rival.deep_supervision


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


def test_lora_learns():
    pytest.importorskip("peft")
    rival = rivals.LoRARegressor(
        str(tiny_model()), TEMPLATE, n_epochs=8, learning_rate=5e-3, rank=8
    )
    assert r2_of(rival).mean() > 0.5

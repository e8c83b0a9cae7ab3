"""A regressor with several prompts: each row has a text for each of them."""

import copy
import json
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from tiny import tiny_model

from sklearn_relish import RelishRegressor, RelishRegressorCV, StateStore, TokenStates
from sklearn_relish.inputs.training_rows import TrainingRows
from sklearn_relish.training.inference import predict_states
from sklearn_relish.training.parallel import train_all

ORDERS = ["A: {a}\nB: {b}\nScore:", "B: {b}\nA: {a}\nScore:"]
WORDS = ["dull", "fine", "splendid", "poor", "good"]


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(0)
    a, b = random.integers(len(WORDS), size=(2, 60))
    X = pd.DataFrame({"a": [f"{WORDS[i]} {n}" for n, i in enumerate(a)], "b": np.take(WORDS, b)})
    return X, (a - b).astype(float)


def regressor(**parameters):
    return RelishRegressor(
        tiny_model(n_layers=6),
        dtype="float32",
        random_state=0,
        **{"prompt": ORDERS, "n_estimators": 3, "max_epochs": 3} | parameters,
    )


def predictions_of_prompts(fitted, X):
    """The predictions from the texts of each prompt."""
    predictions = np.empty((len(fitted.prompt), len(X)))
    for places, states in fitted._stream_views(X):
        for number, of_prompt in enumerate(states):
            head = fitted.head_.of_view(number)
            predicted = predict_states(head, of_prompt, torch.device("cpu"))
            predictions[number, places] = predicted[:, 0] * fitted._y_scale + fitted._y_mean
    return predictions


@pytest.mark.parametrize("prompts", [ORDERS, ["{a} {a}", "{b}", "{a}; {b}; {b}"]])
def test_a_prediction_is_the_mean_over_the_prompts(prompts, rows):
    X, y = rows
    fitted = regressor(prompt=prompts).fit(X, y)
    of_prompts = predictions_of_prompts(fitted, X)
    np.testing.assert_allclose(fitted.predict(X), np.mean(of_prompts, axis=0), rtol=0, atol=1e-6)
    *_, last = fitted.staged_predict(X)
    np.testing.assert_allclose(last, fitted.predict(X), rtol=1e-6)
    assert not np.allclose(of_prompts[0], of_prompts[1])


def test_one_prompt_in_a_list_is_that_prompt(rows):
    X, y = rows
    alone = regressor(prompt=ORDERS[0]).fit(X, y)
    listed = regressor(prompt=ORDERS[:1]).fit(X, y)
    np.testing.assert_array_equal(listed.predict(X), alone.predict(X))


def test_all_texts_of_a_row_are_held_out_together(rows):
    X, y = rows
    fitted = regressor().fit(X, y)
    heads = [row for row in fitted.ensemble_summary_ if row["part"].startswith("head")]
    assert [(row["n_rows"], row["n_held_out"]) for row in heads] == [(48, 12)] * 3
    ridges = [row for row in fitted.ensemble_summary_ if row["part"].startswith("ridge")]
    assert [row["n_held_out"] for row in ridges] == [60] * 5
    trained = []

    def record(heads, examples, *args, **kwargs):
        trained.extend(examples)
        return train_all(heads, examples, *args, **kwargs)

    with patch("sklearn_relish.training.stacking.train_all", record):
        regressor().fit(X, y)
    for train, held_out in trained:
        assert (len(train.states), len(held_out.states)) == (96, 24)
        assert torch.equal(train.y[:48], train.y[48:])
        places = [
            set(
                zip(*map(torch.Tensor.tolist, (e.states.array_index, e.states.starts)), strict=True)
            )
            for e in (train, held_out)
        ]
        assert not places[0] & places[1]


def test_the_fit_depends_on_neither_the_order_nor_the_repetition_of_rows(rows):
    X, y = rows
    weight = np.arange(len(y)) % 3
    fitted = regressor().fit(X, y, sample_weight=weight)
    order = np.random.default_rng(1).permutation(np.repeat(np.arange(len(y)), weight))
    repeated = regressor().fit(X.iloc[order], y[order])
    np.testing.assert_array_equal(repeated.predict(X), fitted.predict(X))


def test_rows_are_equal_if_all_of_their_texts_are():
    texts = [("a", "b"), ("a", "c"), ("d", "e"), ("f", "d"), ("a", "b"), ("g", "h")]
    rows = TrainingRows.from_rows(texts, np.zeros((6, 1)), np.ones(6))
    assert rows.texts == [("a", "b"), ("a", "c"), ("d", "e"), ("f", "d"), ("g", "h")]
    assert rows.weight[0] == 2 * rows.weight[1]
    assert rows.components().tolist() == [0, 0, 1, 1, 2]
    single = TrainingRows.from_rows(["a", "b", "a"], np.arange(3.0)[:, None], np.ones(3))
    assert single.components() is single.groups
    connected = TrainingRows.from_rows([("a", "b"), ("a", "c")], np.zeros((2, 1)), np.ones(2))
    with pytest.warns(UserWarning, match="so none is held out"):
        assert connected.components().tolist() == [0, 0]


def test_rows_that_share_a_text_are_held_out_together():
    random = np.random.default_rng(0)
    a, b = (random.choice(list("abcdefghijklmnop"), size=(60, 12)) for _ in range(2))
    a, b = ["".join(word) for word in a], ["".join(word) for word in b]
    y = random.normal(size=60)
    both = pd.DataFrame({"a": a + b, "b": b + a})  # each pair in both orders
    prompts = ["A: {a}\nB: {b}", "A: {b}\nB: {a}"]
    for linear_path in (False, True):
        fitted = regressor(prompt=prompts, max_epochs=20, linear_path=linear_path)
        fitted.fit(both, np.tile(y, 2))
        assert fitted.validation_score_ < 0.2  # the targets are noise


def test_single_rows_that_share_a_text(rows):
    X, y = rows
    X = X.assign(b=[f"{text} {n}!" for n, text in enumerate(X["b"])])
    swapped = X.iloc[:5].rename(columns={"a": "b", "b": "a"})[["a", "b"]]
    more, target = pd.concat([X, swapped]), np.concatenate([y, y[:5]])
    prompts = ["A: {a}\nB: {b}", "A: {b}\nB: {a}"]
    fitted = regressor(prompt=prompts).fit(more, target)
    ridges = [row for row in fitted.ensemble_summary_ if row["part"].startswith("ridge")]
    assert [row["n_held_out"] for row in ridges] == [55] * 5  # of 65, of which 10 share texts
    assert np.isfinite(fitted.validation_score_)


def test_predictions_follow_changed_weights(rows):
    X, y = rows
    fitted = regressor(n_estimators=1, max_epochs=1).fit(X, y)
    before = fitted.predict(X)
    copied = copy.deepcopy(fitted)
    copied.head_.linear.bias += 1
    np.testing.assert_allclose(copied.predict(X), before + y.std(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(fitted.predict(X), before)
    weights = {name: value.clone() for name, value in fitted.head_.state_dict().items()}
    weights["linear.bias"] += 1
    fitted.head_.load_state_dict(weights, assign=True)
    np.testing.assert_allclose(fitted.predict(X), copied.predict(X), rtol=1e-6)
    fitted.head_.linear.bias.data = fitted.head_.linear.bias.data - 1
    np.testing.assert_allclose(fitted.predict(X), before, rtol=1e-5, atol=1e-5)


def test_states_without_matches_are_aligned(rows):
    X, y = rows
    fitted = regressor(prompt=ORDERS[0]).fit(X, y)
    states = fitted._states(fitted._texts(X), fitted.layer_)
    without = replace(
        states,
        matches=None,
        vectors=replace(states.vectors, lengths=torch.full_like(states.vectors.lengths, 3)),
    )
    for parts in ([states, without], [without, states]):
        aligned = TokenStates.aligned(parts)
        assert [part.n_vectors for part in aligned] == [3, 3]
        assert [part.matches for part in aligned] == [None, None]
        kept = [list(part.vectors) for part in aligned]
        assert all(map(torch.equal, *kept))


@pytest.mark.parametrize(
    "change",
    [{"prompt": ORDERS[0]}, {"prompt": [*ORDERS, "{a}"]}, {"prompt": [1, {}]}, {"n_views": 10**30}],
)
def test_a_saved_regressor_has_as_many_prompts_as_views(change, rows, tmp_path):
    X, y = rows
    regressor(n_estimators=1, max_epochs=1).fit(X, y).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    if "prompt" in change:
        config["parameters"] |= change
    else:
        config["fitted"]["head"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"prompt|n_views"):
        RelishRegressor.from_pretrained(tmp_path)


def test_each_prompt_has_its_own_ridges(rows):
    X, y = rows
    fitted = regressor().fit(X, y)
    weight = fitted.head_.linear.weight
    assert weight.shape[0] == 2
    assert not torch.allclose(weight[0], weight[1])
    second = fitted.head_.of_view(1)
    assert torch.equal(second.linear.weight, weight[1:])
    assert second.heads[0] is fitted.head_.heads[0]
    assert fitted.head_.of_view(1) is second


@pytest.mark.parametrize("bits", [None, 8])
def test_concatenated_states(bits, rows):
    X, y = rows
    store = StateStore(bits=bits)
    fitted = regressor(prompt=ORDERS[0], memory=store).fit(X, y)
    texts = fitted._texts(X)
    states = fitted._states(texts, fitted.layer_)
    both = TokenStates.concatenated([states, states[torch.arange(10)]])
    assert len(both) == len(texts) + 10
    for name in ("vectors", "matches"):
        whole, part = getattr(both, name), getattr(states, name)
        assert all(map(torch.equal, list(whole)[-10:], list(part)[:10]))
    assert all(map(torch.equal, list(both)[-10:], list(states)[:10]))


def test_everything_that_a_regressor_does(rows, tmp_path):
    X, y = rows
    fitted = regressor(memory=StateStore(tmp_path / "states"), layer="auto").fit(X, y)
    interval = fitted.predict_interval(X, coverage=0.5)
    assert (interval[:, 0] < interval[:, 1]).all()
    fitted.save_pretrained(tmp_path / "saved")
    loaded = RelishRegressor.from_pretrained(tmp_path / "saved")
    assert loaded.prompt == ORDERS
    np.testing.assert_array_equal(loaded.predict(X), fitted.predict(X))
    assert clone(fitted).prompt == ORDERS
    (attention,) = fitted.attention(X.iloc[:1])
    assert attention.text == ORDERS[0].format(**X.iloc[0])
    before = fitted.predict(X)
    assert not np.array_equal(fitted.partial_fit(X, y).predict(X), before)
    warm = regressor(warm_start=True).fit(X, y)
    assert np.isfinite(warm.fit(X, y).predict(X)).all()
    quantiles = regressor(loss="quantile", quantile=[0.1, 0.9]).fit(X, y).predict_quantiles(X)
    assert (quantiles[:, 0] < quantiles[:, 1]).all()


def test_a_search_compares_lists_of_prompts(rows):
    X, y = rows
    candidates = [ORDERS[0], ORDERS]
    search = GridSearchCV(regressor(n_estimators=1), {"prompt": candidates}, cv=2).fit(X, y)
    assert search.best_params_["prompt"] in candidates


def test_the_preview_counts_the_texts_of_all_prompts(rows):
    X, _ = rows
    both, first = regressor().preview(X), regressor(prompt=ORDERS[0]).preview(X)
    assert both.n_tokens == 2 * first.n_tokens
    assert both.n_distinct == 2 * first.n_distinct
    assert both.texts == first.texts


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        (np.array(["{a}", "{b}"]), ValueError, r"'prompt' parameter"),
        ([], TypeError, r"prompt=\[\] must be a template, or a list of one or more"),
        (["{a}", None], TypeError, r"must be a template, or a list of one or more"),
        (["{a} {c}", "{a}"], ValueError, r"names \{c\}, which is no column"),
        (["{a}\n{b}", "{a}"], ValueError, r"have two columns of texts and others do not"),
    ],
)
def test_prompts_that_can_not_be_used(prompts, error, message, rows):
    X, y = rows
    for call in (lambda X: regressor(prompt=prompts).fit(X, y), regressor(prompt=prompts).preview):
        with pytest.raises(error, match=message):
            call(X)


@pytest.mark.parametrize("changed", [ORDERS[0], ORDERS[::-1], None])
def test_prompts_may_not_change_after_fit(changed, rows):
    X, y = rows
    fitted = regressor(n_estimators=1).fit(X, y).set_params(prompt=changed)
    calls = (fitted.predict, lambda X: fitted.partial_fit(X, y), fitted.attention)
    message = r"fitted with prompt=\['.*'\], but now it has prompt="
    for call in (*calls, fitted.staged_predict, fitted.predict_interval):
        with pytest.raises(ValueError, match=message):
            call(X)
    assert len(fitted.set_params(prompt=tuple(ORDERS)).predict(X)) == len(X)


def test_a_search_over_folds_has_one_prompt(rows):
    X, y = rows
    with pytest.raises(ValueError, match="'prompt' parameter of RelishRegressorCV must be"):
        RelishRegressorCV(tiny_model(), dtype="float32", prompt=ORDERS).fit(X, y)

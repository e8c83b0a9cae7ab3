"""Rows of two columns of texts: heads and ridges read which text a token belongs to."""

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_model

from sklearn_relish import (
    FrozenLLM,
    LLMEncoder,
    RelishRegressor,
    RelishRegressorCV,
    StateStore,
    preview,
)
from sklearn_relish.inputs.prompts import pair_literals
from sklearn_relish.states.pairs import N_PAIR_VECTORS
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.states.vectors import N_VECTORS, PAIR_RIDGES
from sklearn_relish.training.stacking import fit_ridges
from sklearn_relish.utils import progress

N_ALL = N_VECTORS + N_PAIR_VECTORS
SMALL = {"latent_size": 16, "n_heads": 2, "max_epochs": 1, "random_state": 0}
KINDS = {RelishRegressor: {"n_estimators": 2}, RelishRegressorCV: {"n_iterations": [1, 2], "cv": 3}}
PROMPT = "One: {first}\nTwo: {second}\nSame:"


def rows_of_pairs(n_rows=60, seed=0):
    """Two texts of three letters in each row; the target is how many of them are the same."""
    random, letters = np.random.RandomState(seed), list("abcdef")
    texts = [["".join(random.permutation(letters)[:3]) for _ in range(2)] for _ in range(n_rows)]
    X = pd.DataFrame(texts, columns=["first", "second"])
    return X, np.array([len(set(a) & set(b)) for a, b in texts], dtype=float)


@pytest.fixture(scope="module")
def llm():
    return FrozenLLM(tiny_model("llama", n_layers=9), device="cpu", dtype="float32")


def small(kind, llm, **changes):
    return kind(llm, **{"memory": StateStore()} | SMALL | KINDS[kind] | changes)


@pytest.mark.parametrize(
    ("names", "kinds", "prompt", "literals"),
    [
        (["a", "b"], ["text", "text or missing"], None, ("a: ", "\nb: ", "")),
        (["a", "b"], ["text", "text/number"], "{{{b}}} is {a}!", ("{", "} is ", "!")),
        (["a", "n", "b"], ["text", "number", "text"], "{a}\n{b}", ("", "\n", "")),
        (["a", "b"], ["text", "number"], None, None),
        (["a", "b", "c"], ["text"] * 3, None, None),
        (["a", "b"], ["text", "text"], "{a} and {b} or {a}", None),
        (["a", "b"], ["text", "text"], "{a} alone", None),
        (["a", "b"], ["text", "text"], "{a} {b}", None),
        (["a", "b"], ["text", "text"], "{a}{b}", None),
        (["text"], ["mixed"], None, None),
    ],
)
def test_two_columns_of_texts_are_a_pair(names, kinds, prompt, literals):
    assert pair_literals(names, kinds, prompt) == literals


@pytest.mark.parametrize("prompt", [None, PROMPT])
@pytest.mark.parametrize("kind", KINDS)
def test_a_regressor_reads_each_pair_once_and_has_ridges_of_pairs(llm, kind, prompt):
    X, y = rows_of_pairs()
    store = StateStore()
    regressor = small(kind, llm, prompt=prompt, memory=store).fit(X, y)
    assert store.misses == len(X.drop_duplicates())
    assert regressor.head_.n_vectors == N_ALL
    assert regressor.head_.linear.in_features == (3 + N_ALL) * llm.hidden_size
    assert all(head.sizes["pair"] for head in regressor.head_.heads)
    parts = [row["part"] for row in regressor.ensemble_summary_]
    assert parts[-2:] == ["ridge pair means", "ridge pair distances"]
    fresh, _ = rows_of_pairs(8, seed=1)
    together = regressor.predict(pd.concat([X, fresh]))
    np.testing.assert_array_equal(together[-1:], regressor.predict(fresh.iloc[-1:]))
    np.testing.assert_array_equal(list(regressor.staged_predict(fresh))[-1], together[-8:])


def test_the_ridge_of_distances_sees_what_two_texts_share(llm):
    X, y = rows_of_pairs(300)
    summary = small(RelishRegressor, llm).fit(X, y).ensemble_summary_
    r2 = {row["part"]: row["validation_r2"] for row in summary}
    others = [r2[part] for part in r2 if part != "ridge pair distances"]
    assert r2["ridge pair distances"] > max(others) + 0.1


@pytest.mark.parametrize("other_columns", [[], ["number"], ["second", "third"]])
def test_other_rows_have_no_ridges_of_pairs(llm, other_columns):
    X, y = rows_of_pairs(40)
    X = X.assign(number=range(40), third="x")[["first", *other_columns]]
    regressor = small(RelishRegressor, llm).fit(X, y)
    assert regressor.head_.n_vectors == N_VECTORS
    assert not regressor.head_.heads[0].sizes["pair"]


def test_heads_see_what_two_texts_share(llm):
    X, y = rows_of_pairs(600)
    fresh, expected = rows_of_pairs(200, seed=1)
    texts, fresh_texts = (
        [f"first: {row.first}\nsecond: {row.second}" for row in rows.itertuples()]
        for rows in (X, fresh)
    )
    options = {"linear_path": False, "max_epochs": 10}
    of_pairs = small(RelishRegressor, llm, **options).fit(X, y)
    of_texts = small(RelishRegressor, llm, **options).fit(texts, y)
    r2 = of_pairs.score(fresh, expected)
    assert r2 > of_texts.score(fresh_texts, expected) + 0.1


@pytest.mark.parametrize("number", range(2))
def test_each_ridge_of_pairs_reads_its_vectors(number):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(100, N_ALL, 4, generator=generator)
    states = TokenStates.from_lengths(
        torch.randn(200, 4, generator=generator), torch.full((100,), 2)
    )
    further = TokenStates.from_lengths(vectors.flatten(0, 1), torch.full((100,), N_ALL))
    states = TokenStates(
        states.arrays, states.array_index, states.starts, states.lengths, vectors=further
    )
    name = list(PAIR_RIDGES)[number]
    first = N_VECTORS + 2 * number
    y = vectors[:, first : first + 2].sum(dim=(1, 2))[:, None].double().numpy()
    ridges = fit_ridges(states, "rms", y, np.ones(100))
    r = {
        part: np.corrcoef(fit.oof_predictions[:, 0], y[:, 0])[0, 1] for part, fit in ridges.items()
    }
    assert r.pop(name) > 0.99
    assert max(r.values()) < 0.5


def test_predictions_are_the_weighted_sum_of_the_parts(llm):
    """The weights of the linear path stand where it reads them."""
    X, y = rows_of_pairs(120)
    regressor = small(RelishRegressor, llm, prompt=PROMPT).fit(X, y)
    states = regressor._states(regressor._texts(X), regressor.layer_)
    ensemble, summary = regressor.head_, regressor.ensemble_summary_
    ridges = fit_ridges(states, "rms", ((y - y.mean()) / y.std())[:, None], np.ones(len(y)))
    weights = {row["part"]: row["weight"] for row in summary}
    D, n_poolings = llm.hidden_size, 3
    pooled_and_lower = ensemble.linear.weight[0].view(n_poolings + N_ALL, D)
    for number, (name, fit) in enumerate(ridges.items()):
        if number < n_poolings:
            found = torch.cat([pooled_and_lower[number], pooled_and_lower[n_poolings + number]])
        else:
            begin = 2 * n_poolings + 2 * (number - n_poolings)
            found = pooled_and_lower[begin : begin + 2].flatten()
        expected = weights[f"ridge {name}"] * fit.coef[0]
        # The rows of the fit are merged and sorted, so only the penalty could differ.
        r = np.corrcoef(found.numpy(), expected)[0, 1] if expected.any() else 1.0
        assert r > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_regressor_predicts_the_same(llm, kind, tmp_path):
    X, y = rows_of_pairs()
    regressor = small(kind, llm, prompt=PROMPT).fit(X, y)
    regressor.save_pretrained(tmp_path / "saved")
    loaded = RelishRegressor.from_pretrained(tmp_path / "saved", model=llm)
    assert loaded.head_.n_vectors == N_ALL
    np.testing.assert_array_equal(loaded.predict(X), regressor.predict(X))


def test_a_linear_path_without_pairs_ignores_their_vectors(llm):
    """As that of a regressor that an earlier version has saved."""
    X, y = rows_of_pairs()
    texts = [f"first: {row.first}\nsecond: {row.second}" for row in X.itertuples()]
    plain = small(RelishRegressor, llm).fit(texts, y)
    regressor = small(RelishRegressor, llm).fit(X, y)
    expected = plain.predict(texts)
    regressor.head_ = plain.head_
    np.testing.assert_array_equal(regressor.predict(X), expected)


def test_missing_cells_are_read(llm):
    X, y = rows_of_pairs()
    X.loc[3, "second"] = None
    regressor = small(RelishRegressor, llm).fit(X, y)
    assert regressor.head_.n_vectors == N_ALL
    missing = pd.DataFrame({"first": ["abc"], "second": [None]})
    assert np.isfinite(regressor.predict(missing)).all()


class ChatLLM(FrozenLLM):
    """Its template strips the text, and has the separator of the prompt itself."""

    def as_chat(self, texts):
        return [f"<user>\nTwo: yes or no?\n{text.strip()}\n<model>" for text in texts]


def test_the_parts_of_a_chat_are_those_of_the_text():
    llm = ChatLLM(tiny_model("llama", n_layers=9), device="cpu", dtype="float32")
    X, y = rows_of_pairs()
    prompt = "\n{first}\nTwo: {second}\n"
    regressor = small(RelishRegressor, llm, prompt=prompt, chat_template=True).fit(X, y)
    (text,) = regressor._texts(X.iloc[:1])
    parts = [text[begin:end] for begin, end in regressor._pair().parts(text)]
    assert parts == [X["first"][0], X["second"][0]]


def test_a_regressor_of_pairs_refuses_a_prompt_of_one_column(llm):
    X, y = rows_of_pairs()
    regressor = small(RelishRegressor, llm, prompt=PROMPT).fit(X, y)
    regressor.set_params(prompt="One: {first}")
    with pytest.raises(ValueError, match="was fitted with prompt="):
        regressor.predict(X)


class WithoutSpans(FrozenLLM):
    def tokens(self, texts, *, max_length, windows=False):
        raise ValueError("no spans of tokens")


class TooManySpans(FrozenLLM):
    def tokens(self, texts, *, max_length, windows=False):
        tokens = super().tokens(texts, max_length=max_length, windows=windows)
        return [(pieces, np.vstack([spans, spans[:1]])) for pieces, spans in tokens]


def test_a_model_without_spans_has_no_ridges_of_pairs(llm, tmp_path):
    X, y = rows_of_pairs()
    other = WithoutSpans(tiny_model("llama", n_layers=9), device="cpu", dtype="float32")
    plain = small(RelishRegressor, other, memory=StateStore(tmp_path)).fit(X, y)
    assert plain.head_.n_vectors == N_VECTORS
    regressor = small(RelishRegressor, llm).fit(X, y)
    assert not plain.head_.heads[0].sizes["pair"]
    with pytest.raises(ValueError, match="pass matches, or a model that maps tokens"):
        regressor.set_params(model=other).predict({"first": ["unread"], "second": ["so far"]})


def test_wrong_spans_are_an_error():
    llm = TooManySpans(tiny_model("llama", n_layers=9), device="cpu", dtype="float32")
    X, y = rows_of_pairs()
    with pytest.raises(ValueError, match="is not a valid reader: tokens returned"):
        small(RelishRegressor, llm).fit(X, y)


def test_an_encoder_shares_the_states_of_pairs(llm):
    X, y = rows_of_pairs()
    store = StateStore()
    LLMEncoder(llm, memory=store).fit_transform(X)
    n_read = store.misses
    small(RelishRegressor, llm, memory=store).fit(X, y)
    assert store.misses == n_read


@pytest.mark.parametrize("bits", [None, 4])
def test_a_preview_counts_the_bytes_of_pairs(llm, bits):
    X, y = rows_of_pairs()
    store = StateStore(bits=bits)
    regressor = small(RelishRegressor, llm, memory=store)
    n_bytes = regressor.preview(X).n_bytes
    regressor.fit(X, y)
    assert sum(row["n_bytes"] for row in store.info()) == n_bytes


def test_attention_and_stages_of_pairs(llm):
    X, y = rows_of_pairs()
    regressor = small(RelishRegressor, llm).fit(X, y)
    for found in regressor.attention(X[:3]):
        np.testing.assert_allclose(found.weights.sum(axis=-1), 1.0)
    np.testing.assert_array_equal(list(regressor.staged_predict(X))[-1], regressor.predict(X))


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_of_pairs_is_chosen(llm, kind):
    X, y = rows_of_pairs(120)
    regressor = small(kind, llm, layer="auto").fit(X, y)
    assert regressor.head_.heads[0].sizes["pair"]
    assert np.isfinite(regressor.predict(X)).all()


@pytest.mark.parametrize("first", ["fit", "partial_fit"])
def test_the_heads_of_pairs_are_trained_further(llm, first):
    X, y = rows_of_pairs()
    regressor = getattr(small(RelishRegressor, llm, linear_path=False), first)(X, y)
    before = regressor.predict(X)
    regressor.partial_fit(X, y)
    assert regressor.head_.heads[0].sizes["pair"]
    assert not np.array_equal(regressor.predict(X), before)
    regressor.set_params(warm_start=True).fit(X, y)
    assert regressor.head_.heads[0].sizes["pair"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_time_of_a_first_fit_on_pairs_is_estimated(llm, kind, monkeypatch):
    """Before the regressor has its columns."""
    estimated = []

    def estimate(plan, states):
        estimated.append(plan.trainings[0][0].sizes["pair"])
        return 1.0

    monkeypatch.setattr(preview, "training_seconds", estimate)
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0)
    X, y = rows_of_pairs(200)
    small(kind, llm, verbose=1).fit(X, y)
    assert set(estimated) == {True}


def test_an_altered_kind_of_head_is_refused(llm, tmp_path):
    X, y = rows_of_pairs()
    small(RelishRegressor, llm).fit(X, y).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"pair": true', '"pair": false'))
    with pytest.raises(ValueError, match=r"difference\.weight' should be none"):
        RelishRegressor.from_pretrained(tmp_path, model=llm)

"""The linear path also reads the pooled states of a lower layer."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_model

from sklearn_relish import FrozenLLM, LLMEncoder, RelishRegressor, RelishRegressorCV, StateStore
from sklearn_relish.head.ensemble import LINEAR_POOLINGS, RelishEnsemble
from sklearn_relish.head.head import RelishHead
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.states.vectors import N_VECTORS
from sklearn_relish.training.inference import pool_states, predict_states, staged_predict_states
from sklearn_relish.training.stacking import fit_ridges

TEXTS = [f"{word} film {i}" for i in range(20) for word in ("dull", "fine", "splendid")]
Y = np.tile([1.0, 3.0, 5.0], 20)
SMALL = {"latent_size": 16, "n_heads": 2, "max_epochs": 1, "random_state": 0}
KINDS = {RelishRegressor: {"n_estimators": 2}, RelishRegressorCV: {"n_iterations": [1, 2], "cv": 3}}


class CountingLLM(FrozenLLM):
    """Keeps the texts that it has read."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.texts = []

    def read(self, texts, *, layers, **options):
        assert layers == [5, 4]
        self.texts += texts
        return super().read(texts, layers=layers, **options)


@pytest.fixture
def llm():
    return CountingLLM(tiny_model("llama", n_layers=9), device="cpu", dtype="float32")


def small(kind, llm, **changes):
    return kind(llm, **{"memory": StateStore()} | SMALL | KINDS[kind] | changes)


def test_the_linear_path_is_a_linear_function_of_pooled_states_and_vectors():
    generator = torch.Generator().manual_seed(0)
    head = RelishHead(input_size=6, latent_size=8, n_heads=2)
    ensemble = RelishEnsemble([head], True, n_vectors=N_VECTORS).eval()
    ensemble.head_weight.fill_(0.0)
    ensemble.linear.weight.copy_(torch.arange(36.0)[None])
    values = torch.randn(8, 6, generator=generator)
    states = TokenStates.from_lengths(values, torch.tensor([3, 1, 4]))
    vectors = torch.randn(3, N_VECTORS, 6, generator=generator)
    pooled = [pool_states(states, pooling, "rms") for pooling in LINEAR_POOLINGS]
    features = torch.cat([*pooled, vectors.flatten(1)], dim=1).double()
    expected = (features @ torch.arange(36.0).double()).numpy()
    places = states.arrays, states.array_index, states.starts, states.lengths
    vectors = TokenStates.from_lengths(vectors.flatten(0, 1), torch.full((3,), N_VECTORS))
    with_vectors = TokenStates(*places, vectors=vectors)
    cpu = torch.device("cpu")
    found = predict_states(ensemble, with_vectors, cpu)[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    staged = staged_predict_states(ensemble, with_vectors, cpu)
    np.testing.assert_allclose(staged[:, -1, 0], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="reads 3 vectors of each text"):
        predict_states(ensemble, states, cpu)


@pytest.mark.parametrize("kind", KINDS)
def test_each_text_is_read_once_for_both_layers(llm, kind):
    regressor = small(kind, llm).fit(TEXTS, Y)
    assert regressor.layer_ == 5
    assert sorted(llm.texts) == sorted(TEXTS)
    assert regressor.head_.n_vectors == N_VECTORS
    assert regressor.head_.linear.in_features == 6 * llm.hidden_size
    fresh = ["a dull one", "splendid!"]
    together = regressor.predict([*TEXTS, *fresh])
    assert sorted(llm.texts) == sorted([*TEXTS, *fresh])
    np.testing.assert_array_equal(together[-1:], regressor.predict(fresh[1:]))
    np.testing.assert_array_equal(list(regressor.staged_predict(fresh))[-1], together[-2:])


def test_estimators_share_what_one_of_them_has_read(llm):
    store = StateStore()
    encoder = LLMEncoder(llm, memory=store).fit(TEXTS)
    encoder.transform(TEXTS)
    plain = RelishRegressor(llm, memory=store, linear_path=False, n_estimators=1, **SMALL)
    plain.fit(TEXTS[:40], Y[:40]).predict(TEXTS)
    regressor = RelishRegressor(llm, memory=store, n_estimators=2, **SMALL).fit(TEXTS, Y)
    assert sorted(llm.texts) == sorted(TEXTS)
    assert plain.head_.n_vectors == 0
    assert regressor.head_.n_vectors == N_VECTORS


@pytest.mark.parametrize("number", range(N_VECTORS))
def test_each_ridge_reads_the_vector_of_its_pooling(number):
    generator = torch.Generator().manual_seed(0)
    lengths, n_texts = torch.full((100,), 2), 100
    vectors = torch.randn(n_texts, N_VECTORS, 6, generator=generator)
    states = TokenStates.from_lengths(torch.randn(200, 6, generator=generator), lengths)
    further = TokenStates.from_lengths(vectors.flatten(0, 1), torch.full((n_texts,), N_VECTORS))
    y = vectors[:, number].sum(dim=1, keepdim=True).double().numpy()
    ridges = fit_ridges(replace(states, vectors=further), "rms", y, np.ones(n_texts))
    r = [np.corrcoef(ridge.oof_predictions[:, 0], y[:, 0])[0, 1] for ridge in ridges.values()]
    assert r.pop(number) > 0.99
    assert max(r) < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_regressor_predicts_the_same(llm, kind, tmp_path):
    regressor = small(kind, llm).fit(TEXTS, Y)
    regressor.save_pretrained(tmp_path / "saved")
    loaded = RelishRegressor.from_pretrained(tmp_path / "saved", model=llm)
    assert loaded.head_.n_vectors == N_VECTORS
    np.testing.assert_array_equal(loaded.predict(TEXTS), regressor.predict(TEXTS))


def test_warm_start_and_partial_fit_keep_the_linear_path(llm):
    regressor = small(RelishRegressor, llm, warm_start=True).fit(TEXTS, Y)
    weight = regressor.head_.linear.weight.clone()
    for continued in (regressor.fit(TEXTS, Y), regressor.partial_fit(TEXTS[:9], Y[:9])):
        assert torch.equal(continued.head_.linear.weight, weight)
        assert np.isfinite(continued.predict(["fresh"])).all()


@pytest.mark.parametrize("bits", [None, 4])
def test_a_preview_counts_the_bytes_of_vectors(llm, bits):
    store = StateStore(bits=bits)
    regressor = small(RelishRegressor, llm, memory=store)
    n_bytes = regressor.preview(TEXTS).n_bytes
    regressor.fit(TEXTS, Y)
    assert sum(row["n_bytes"] for row in store.info()) == n_bytes

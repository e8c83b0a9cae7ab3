"""On a CPU the states of a text are the same to the last bit in any batch."""

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import cross_val_score
from tiny import tiny_model
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention

from sklearn_relish import FrozenLLM, LLMEncoder, RelishRegressor
from sklearn_relish.llm import batch_invariance as invariance
from sklearn_relish.llm.batch_invariance import BatchInvariant, split_rows

LENGTHS = [1, 1, 2, 3, 5, 8, 9, 15, 16, 17, 23, 31, 33, 40, 47, 55, 60]
TEXTS = ["".join(np.random.default_rng(n).choice(list("abcdef "), size=n)) for n in LENGTHS]


def read(llm, texts, layer=2):
    states = [None] * len(texts)
    for rows, (batch,), _ in llm.read(texts, layers=[layer], max_length=512):
        for row, text in zip(rows, batch, strict=True):
            states[row] = text.clone()
    return states


def assert_equal_in_any_batch(llm, texts=TEXTS):
    alone = [read(llm, [text])[0] for text in texts]
    order = np.random.default_rng(1).permutation(len(texts))
    for chosen in (range(len(texts)), order, order[:7], [3] * 40 + [9]):
        found = read(llm, [texts[i] for i in chosen])
        assert all(torch.equal(states, alone[i]) for states, i in zip(found, chosen, strict=True))


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "t5"])
def test_a_text_has_the_same_states_in_any_batch(kind, dtype, n_threads, set_threads):
    set_threads(n_threads)
    llm = FrozenLLM(tiny_model(kind), device="cpu", dtype=dtype)
    assert_equal_in_any_batch(llm)
    assert llm._forward_pass.packing(2)


def test_a_long_text_in_windows_has_the_same_states_in_any_batch(set_threads):
    texts = [letter * n for letter, n in zip("abcde", (10, 100, 333, 200, 64), strict=True)]

    def windows(texts):
        found = {}
        reading = llm.read(texts, layers=[2], max_length=64, windows=True)
        for rows, (batch,), _ in reading:
            found |= {texts[row]: text.clone() for row, text in zip(rows, batch, strict=True)}
        return found

    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    together = windows(texts)
    assert all(torch.equal(windows([text])[text], together[text]) for text in texts)


def uneven_product(x, weight, bias=None):
    """A product whose bits depend on the number of rows, as some processors have it."""
    assert x.ndim == 2
    result = nn.functional.linear(x, weight, bias)
    return result if len(x) in (64, 256) else result * (1 + len(x) / 1000)


def test_products_avoid_numbers_of_rows_with_other_rounding(monkeypatch):
    monkeypatch.setattr(invariance, "linear", uneven_product)
    monkeypatch.setattr(invariance, "_equalities", {})
    weight, x = torch.randn(8, 12), torch.randn(1000, 12)
    for n_rows in (1, 63, 64, 65, 300, 1000):
        found = invariance._linear(x[:n_rows], weight)
        torch.testing.assert_close(found, x[:n_rows] @ weight.t(), rtol=1e-4, atol=1e-5)


def test_networks_run_only_with_numbers_of_rows_that_give_equal_bits(monkeypatch):
    linear = nn.functional.linear
    seen = set()

    def counted(x, weight, bias=None):
        seen.add(len(x.reshape(-1, x.shape[-1])))
        return linear(x, weight, bias)

    monkeypatch.setattr(invariance, "linear", counted)
    equal = invariance._Equality.__call__
    monkeypatch.setattr(
        invariance._Equality, "__call__", lambda self, n: n in (128, 256) and equal(self, n)
    )
    monkeypatch.setattr(invariance, "_equalities", {})
    assert_equal_in_any_batch(FrozenLLM(tiny_model(), device="cpu", dtype="float32"))
    assert seen == {128, 256}


@given(
    n_rows=st.integers(1, 5000),
    counts=st.sets(st.sampled_from([16, 32, 64, 128, 512, 1024])),
)
def test_rows_are_split_into_allowed_numbers(n_rows, counts):
    counts = tuple(sorted(counts | {256}))
    split = split_rows(n_rows, counts)
    assert set(split) <= set(counts)
    assert sum(split) >= n_rows > sum(split[:-1])
    assert sum(split) - n_rows < max(counts)


class MixingEmbedding(nn.Module):
    """Embeddings to which the token before is added, as a convolution would do."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def forward(self, ids):
        embedded = self.embedding(ids)
        return embedded + nn.functional.pad(embedded, (0, 0, 1, 0))[:, :-1]


def test_texts_are_not_packed_if_the_model_would_mix_them():
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    llm.network.embed_tokens = MixingEmbedding(llm.network.embed_tokens)
    assert not llm._forward_pass.packing(2)
    assert_equal_in_any_batch(llm)


def test_texts_are_not_packed_if_the_model_ignores_position_ids():
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    forward = llm.network.forward
    llm.network.forward = lambda input_ids, position_ids=None: forward(input_ids=input_ids)
    assert not llm._forward_pass.packing(2)
    assert_equal_in_any_batch(llm)


def test_a_product_of_no_rows_has_no_rows():
    layer = nn.Linear(4, 3)
    with BatchInvariant():
        assert layer(torch.empty(0, 4)).shape == (0, 3)
        assert layer(torch.empty(2, 0, 4)).shape == (2, 0, 3)


def test_elementwise_functions_of_several_tensors_are_unchanged():
    x, exponents = torch.rand(5, 7), torch.arange(7.0)
    with BatchInvariant():
        found = torch.pow(x, exponents), torch.pow(2.0, exponents), torch.pow(x, 2)
    torch.testing.assert_close(found, (x**exponents, 2.0**exponents, x * x))


def test_other_operations_are_unchanged():
    x = torch.randn(3, 5, 7)
    with BatchInvariant():
        assert torch.equal(torch.relu(x), x.clamp(min=0))
        torch.testing.assert_close(x @ x.transpose(1, 2), torch.einsum("bij,bkj->bik", x, x))
        torch.testing.assert_close(nn.functional.silu(x), x * torch.sigmoid(x))


def test_a_fit_does_not_depend_on_the_batches_that_filled_its_store(tmp_path):
    texts = [f"{word} text {'x' * (i % 13)} {i}" for i in range(30) for word in ("good", "bad")]
    y = [float(len(text)) for text in texts]
    fits = []
    for filling in ("fit", "one by one", "search"):
        regressor = RelishRegressor(
            FrozenLLM(tiny_model(), device="cpu", dtype="bfloat16"),
            memory=tmp_path / filling,
            layer=2,
            latent_size=16,
            max_epochs=2,
            random_state=0,
        )
        if filling == "one by one":
            encoder = LLMEncoder(regressor.model, layer=2, memory=regressor.memory)
            for text in texts[::-1]:
                encoder.fit_transform([text])
        elif filling == "search":
            cross_val_score(regressor, texts[::-1], y[::-1], cv=3)
        fits.append(regressor.fit(texts, y).predict(texts).tolist())
    assert fits[0] == fits[1] == fits[2]


def test_a_measured_mask_is_kept_so_that_no_other_gets_its_id():
    states = torch.randn(3, 1, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    measured = weakref.ref(mask)
    with torch.inference_mode(), BatchInvariant([4, 4]):
        scaled_dot_product_attention(*states, attn_mask=mask)
        del mask  # like a mask that a layer makes for itself
        assert measured() is not None


def test_packing_is_measured_for_each_number_of_threads(set_threads, monkeypatch):
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="bfloat16")
    monkeypatch.setattr(
        llm._forward_pass,
        "_packs",
        lambda way, layer: torch.get_num_threads() == 1 or way == "separate",
    )
    for n_threads, way in ((1, "joint"), (2, "separate"), (1, "joint")):
        set_threads(n_threads)
        assert llm._forward_pass.packing(2) == way


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_of_rows_that_seem_equal_are_equal_for_many_rows(dtype, n_threads, set_threads):
    """Also where a difference is rare: bfloat16 hides all but one of some ten thousand."""
    set_threads(n_threads)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(32, 64, generator=generator).to(dtype)
    rows = torch.randn(2**15, 64, generator=generator).to(dtype)
    equal = invariance._Equality(weight, dtype)
    expected = torch.cat([linear(part, weight) for part in rows.split(invariance.REFERENCE_ROWS)])
    for count in (1, 2, 3, 5, 8, 9, 16, 23, 48, 64, 128, 512, 1024):
        n_rows = len(rows) // count * count
        found = torch.cat([linear(part, weight) for part in rows[:n_rows].split(count)])
        assert not equal(count) or torch.equal(found, expected[:n_rows]), count

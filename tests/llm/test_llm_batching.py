"""How texts are batched for the language model."""

import itertools

import numpy as np
import pytest
import torch
from read_helpers import read, record_batches
from tiny import tiny_model

from sklearn_relish import FrozenLLM
from sklearn_relish.llm.batching import (
    MIN_LENGTH_RATIO,
    TOKEN_BUDGET,
    batch_size,
    group_pieces,
    join_windows,
)
from sklearn_relish.llm.tokenize import Piece
from sklearn_relish.states.token_states import TokenStates


@pytest.mark.parametrize(
    ("dtype", "amx", "budget"),
    [("bfloat16", True, 2_048), ("bfloat16", False, 1_024), ("float32", True, 1_024)],
)
def test_batches_are_larger_for_bfloat16_with_amx(dtype, amx, budget, monkeypatch):
    capabilities = {"avx512_bf16": True, "amx_bf16": amx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert FrozenLLM(tiny_model(), device="cpu", dtype=dtype).token_budget == budget


@pytest.mark.parametrize("packed", [True, False])
def test_batches_fill_the_token_budget(packed, monkeypatch):
    monkeypatch.setitem(TOKEN_BUDGET, "cpu", 60)
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    if not packed:
        monkeypatch.setattr(llm._forward_pass, "packing", lambda layer: None)
    batches = record_batches(llm, monkeypatch)
    lengths = np.random.default_rng(0).integers(1, 80, 100)
    read(llm, ["x" * n for n in lengths], 1)
    assert sorted(itertools.chain.from_iterable(batches)) == sorted(lengths)
    assert all(len(batch) == 1 or sum(batch) <= 60 for batch in batches)
    longest = [batch[0] for batch in batches]
    assert longest == sorted(longest, reverse=True)
    if packed:  # the next text does not fit
        for batch, following in itertools.pairwise(batches):
            assert sum(batch) + following[0] > 60
    else:  # texts of one length
        assert all(len(set(batch)) == 1 for batch in batches)
        assert max(map(len, batches)) > 2


def test_padded_batches_have_texts_of_similar_length(monkeypatch):
    monkeypatch.setitem(MIN_LENGTH_RATIO, "cpu", 0.875)
    lengths = np.random.default_rng(0).integers(1, 80, 200)
    texts = ["x" * n for n in lengths]
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    monkeypatch.setattr(llm._forward_pass, "packing", lambda layer: None)
    batches = record_batches(llm, monkeypatch)
    padded, _ = read(llm, texts, 1, max_length=99)
    assert [len(states) for states in padded] == lengths.tolist()
    assert all(min(batch) >= 0.875 * max(batch) for batch in batches)
    assert any(len(set(batch)) > 1 for batch in batches)
    alone = [read(llm, [text], 1)[0][0] for text in texts[:20]]
    torch.testing.assert_close(padded[:20], alone, rtol=1e-4, atol=1e-5)


def test_batches_that_do_not_fit_into_memory_are_read_in_smaller_ones(monkeypatch):
    texts = [letter * n for n in range(1, 21) for letter in "abc"]
    expected, _ = read(FrozenLLM(tiny_model(), device="cpu", dtype="float32"), texts, 2)
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    states_at = llm._forward_pass.states_at

    def limited(layers, input_ids, **inputs):
        if input_ids.numel() > 25:
            raise torch.OutOfMemoryError("not enough")
        return states_at(layers, input_ids=input_ids, **inputs)

    monkeypatch.setattr(llm._forward_pass, "states_at", limited)
    with pytest.warns(UserWarning, match="too much for the memory of cpu") as warnings:
        states, _ = read(llm, texts, 2)
    assert [str(warning.message).split()[3] for warning in warnings] == ["60", "30"]  # tokens
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
    assert llm.token_budget == 15

    with pytest.raises(torch.OutOfMemoryError):
        read(llm, ["x" * 26], 2)


def test_texts_in_windows_are_returned_before_all_are_read(monkeypatch):
    monkeypatch.setattr("sklearn_relish.llm.batching.GROUP_BUDGETS", 1)
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    llm.token_budget = 256
    batches = record_batches(llm, monkeypatch)
    reading = llm.read(
        [chr(97 + i) * 300 for i in range(20)], layers=[2], max_length=64, windows=True
    )
    next(reading)
    assert 0 < sum(map(len, batches)) < 20  # of 120 windows
    assert len({int(row) for rows, *_ in reading for row in rows}) == 19


def test_the_cost_of_windows_is_linear_in_the_length(monkeypatch):
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    batches = record_batches(llm, monkeypatch)
    n_read = {}
    for n in (10_000, 20_000):
        batches.clear()
        read(llm, ["a" * n], 2, max_length=128, windows=True)
        n_read[n] = sum(itertools.chain.from_iterable(batches))
    assert 10_000 < n_read[10_000] < 1.35 * 10_000
    assert n_read[20_000] == pytest.approx(2 * n_read[10_000], rel=0.02)


@pytest.mark.parametrize("kind", ["cpu", "mps", "cuda"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_has_a_text_and_keeps_the_budget(kind, packed):
    lengths = np.sort(np.random.default_rng(0).integers(1, 600, 300))[::-1]
    for token_budget in (1, 100, 5_000, 100_000):
        n_texts = batch_size(lengths, kind=kind, token_budget=token_budget, packed=packed)
        n_tokens = lengths[:n_texts].sum() if packed else n_texts * lengths[0]
        assert n_texts == 1 or n_tokens <= token_budget


def test_small_padded_batches_may_have_any_lengths():
    lengths = np.array([100, *[10] * 30, *[1] * 30])
    assert batch_size(lengths, kind="cuda", token_budget=16_384, packed=False) == 40
    assert batch_size(lengths, kind="cpu", token_budget=16_384, packed=False) == 1


def test_windows_are_grouped_by_complete_texts_up_to_the_number_of_tokens():
    pieces = [Piece(0, np.arange(9), 0, 9, 1)]
    pieces += [Piece(row, np.arange(10), 0, 10, 3) for row in range(1, 6) for _ in range(3)]
    groups = [[piece.row for piece in group] for group in group_pieces(pieces, 50)]
    assert groups == [[0], [1, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4], [5, 5, 5]]


def test_windows_are_joined_without_their_overlap():
    pieces = [Piece(0, np.arange(4), 0, 4, 2), Piece(0, np.arange(4), 1, 4, 2)]
    states = TokenStates.from_lengths(torch.arange(8.0)[:, None], torch.tensor([4, 4]))
    ((rows, (joined,)),) = join_windows(iter([(np.array([1, 0]), [states])]), pieces)
    assert rows.tolist() == [0]
    assert next(iter(joined)).flatten().tolist() == [4, 5, 6, 7, 1, 2, 3]

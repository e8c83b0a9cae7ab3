"""Batches of similar length, their size, and their padding."""

import pytest
import torch

from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training import batching
from sklearn_relish.training.batching import (
    BatchLoader,
    prediction_batches,
    shuffled_batches,
    split_batch,
)

CPU = torch.device("cpu")


def ragged(dtype=torch.bfloat16):
    lengths = torch.tensor([5, 1, 9, 3, 3])
    values = torch.randn(21, 4, generator=torch.Generator().manual_seed(0))
    return TokenStates.from_lengths(values.to(dtype), lengths)


def many_lengths():
    return torch.randint(1, 100, (1000,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_padding_is_zero_though_memory_is_reused(dtype):
    states = ragged()
    loader = BatchLoader(states, CPU, dtype)
    for rows in ([2, 2], [0, 1], [1], [4, 3]):
        expected, expected_mask = states.batch(torch.tensor(rows))
        batch, mask = loader.load(torch.tensor(rows))
        assert batch.dtype == dtype
        assert torch.equal(batch, expected.to(dtype))
        assert torch.equal(mask, expected_mask)
        assert not batch[~mask].any()


def test_states_of_the_right_dtype_are_not_converted():
    batch, _ = BatchLoader(ragged(torch.float32), CPU, torch.float32).load(torch.tensor([1, 2]))
    assert batch.dtype == torch.float32
    assert not batch[0, 1:].any()


def test_other_devices_get_the_states_in_their_own_dtype():
    batch, mask = BatchLoader(ragged(), torch.device("meta"), torch.float32).load(torch.arange(5))
    assert batch.device.type == mask.device.type == "meta"
    assert batch.dtype == torch.bfloat16
    assert batch.shape == (5, 9, 4)


def test_training_batches_have_every_row_once_and_similar_lengths():
    lengths = many_lengths()
    generator = torch.Generator().manual_seed(0)
    first, second = (shuffled_batches(lengths, 32, generator) for _ in range(2))
    assert torch.equal(torch.cat(first).sort().values, torch.arange(1000))
    assert [len(batch) for batch in first].count(32) == 31
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in first)
    assert padded / int(lengths.sum()) < 1.15
    assert [batch.tolist() for batch in first] != [batch.tolist() for batch in second]


def test_a_large_training_batch_is_split(monkeypatch):
    monkeypatch.setattr(batching, "STEP_TOKENS", 30)
    lengths = torch.tensor([1, 10, 2, 7, 40])
    states = TokenStates.from_lengths(torch.zeros(60, 4), lengths)
    assert [part.tolist() for part in split_batch(torch.arange(4), states)] == [[0, 1, 2], [3]]
    assert [part.tolist() for part in split_batch(torch.tensor([0, 4]), states)] == [[0], [4]]


def test_prediction_batches_have_every_row_once_and_few_tokens(monkeypatch):
    monkeypatch.setattr(batching, "PREDICT_TOKENS", 90)
    lengths = many_lengths()
    batches = prediction_batches(lengths, hidden_size=4)
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(1000))
    sizes = [(len(batch), len(batch) * int(lengths[batch].max())) for batch in batches]
    assert all(n_texts == 1 or n_tokens <= 90 for n_texts, n_tokens in sizes)
    assert max(n_tokens for _, n_tokens in sizes) == 99  # a text that is longer alone
    assert max(n_texts for n_texts, _ in sizes) > 20

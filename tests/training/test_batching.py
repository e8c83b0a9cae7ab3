import math

import pytest
import torch

from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training.batching import BatchLoader, round_up
from sklearn_relish.training.trainer import mixed_precision

CPU = torch.device("cpu")


def ragged(dtype=torch.bfloat16):
    lengths = torch.tensor([5, 1, 9, 3, 3])
    return TokenStates.from_lengths(torch.randn(21, 4).to(dtype), lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_batch_is_padded_with_zeros_whatever_was_there_before(dtype):
    states = ragged()
    batches = [torch.tensor(rows) for rows in ([2, 2], [0, 1], [1], [4, 3])]
    n_loaded = 0
    for expected, (rows, batch, mask) in zip(
        batches, BatchLoader(states, CPU, dtype).load(batches), strict=True
    ):
        assert torch.equal(rows, expected)
        theirs, their_mask = states.batch(rows)
        assert batch.dtype == dtype
        assert torch.equal(batch, theirs.to(dtype))
        assert torch.equal(mask, their_mask)
        n_loaded += 1
    assert n_loaded == 4


def test_states_of_the_wanted_dtype_are_not_converted():
    ((_, batch, _),) = BatchLoader(ragged(torch.float32), CPU, torch.float32).load(
        [torch.tensor([1, 2])]
    )
    assert batch.dtype == torch.float32
    assert not batch[0, 1:].any()


def test_shapes_are_few_and_waste_little():
    widths = [round_up(n) for n in range(1, 1025)]
    assert all(0 <= width - n < max(8, n / 4) for n, width in enumerate(widths, start=1))
    assert len(set(widths)) == 4 + 4 * math.log2(1024 / 32)


def test_mixed_precision_is_cuda_s_alone():
    with mixed_precision(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32

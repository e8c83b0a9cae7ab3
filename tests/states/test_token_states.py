from dataclasses import replace

import pytest
import torch

from sklearn_relish.states.quantization import QUANTIZERS, n_rows
from sklearn_relish.states.token_states import TokenStates


def make():
    """Texts of 2, 4 and 1 tokens in one array, and of 3 in another."""
    return TokenStates(
        arrays=(torch.arange(14.0).reshape(7, 2), -torch.arange(8.0).reshape(4, 2)),
        array_index=torch.tensor([0, 0, 0, 1]),
        starts=torch.tensor([0, 2, 6, 1]),
        lengths=torch.tensor([2, 4, 1, 3]),
    )


def test_batch_pads_to_its_own_longest_text():
    states, mask = make().batch(torch.tensor([2, 0]))
    assert mask.tolist() == [[True, False], [True, True]]
    assert states.tolist() == [[[12.0, 13.0], [0.0, 0.0]], [[0.0, 1.0], [2.0, 3.0]]]


def test_batch_takes_texts_from_several_arrays():
    states, mask = make().batch(torch.tensor([3, 2, 3]))
    assert mask.sum(dim=1).tolist() == [3, 1, 3]
    assert states[0].tolist() == states[2].tolist() == [[-2.0, -3.0], [-4.0, -5.0], [-6.0, -7.0]]
    assert states[1, 0].tolist() == [12.0, 13.0]


def test_selection_shares_the_arrays_and_may_repeat_texts():
    states = make()
    chosen = states[torch.tensor([1, 1, 2])]
    assert chosen.arrays is states.arrays
    assert chosen.lengths.tolist() == [4, 4, 1]
    assert [len(text) for text in chosen] == [4, 4, 1]
    assert next(iter(chosen)).data_ptr() == states.arrays[0][2:].data_ptr()


@pytest.mark.parametrize("bits", [None, *QUANTIZERS])
def test_a_batch_has_the_states_of_each_text_and_zeros(bits):
    states = make()
    if bits is not None:
        wide = [torch.cat([array, array], dim=1) for array in states.arrays]  # of size 4
        lengths = [torch.tensor([2, 4, 1]), torch.tensor([1, 3])]
        arrays = tuple(map(QUANTIZERS[bits].quantize_texts, wide, lengths))
        extra = n_rows(arrays[0], 0)
        starts = torch.tensor([0, 2 + extra, 6 + 2 * extra, 1 + extra])
        states = replace(states, arrays=arrays, starts=starts)
        unused = n_rows(arrays[1], 1) * arrays[1][0].nbytes
        assert states.n_bytes == sum(array.nbytes for array in arrays) - unused
    rows = torch.tensor([3, 0, 1, 1, 2])
    batch, mask = states.batch(rows)
    for padded, is_token, text in zip(batch, mask, states[rows], strict=True):
        assert torch.equal(padded[is_token], text)
        assert not padded[~is_token].any()

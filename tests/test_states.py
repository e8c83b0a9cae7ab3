import torch

from sklearn_relish.states import TokenStates


def make():
    return TokenStates.from_lengths(torch.arange(14.0).reshape(7, 2), torch.tensor([2, 4, 1]))


def test_batch_pads_to_its_own_longest_text():
    states, mask = make().batch(torch.tensor([2, 0]))
    assert mask.tolist() == [[True, False], [True, True]]
    assert states[mask].tolist() == [[12.0, 13.0], [0.0, 1.0], [2.0, 3.0]]


def test_selection_shares_the_values_and_may_repeat_texts():
    states = make()
    chosen = states[torch.tensor([1, 1, 2])]
    assert chosen.values is states.values
    assert chosen.lengths.tolist() == [4, 4, 1]
    assert chosen.starts.tolist() == [2, 2, 6]


def test_compact_holds_the_chosen_tokens_alone():
    compact = make()[torch.tensor([2, 0])].compact()
    assert compact.values.tolist() == [[12.0, 13.0], [0.0, 1.0], [2.0, 3.0]]
    assert compact.starts.tolist() == [0, 1]

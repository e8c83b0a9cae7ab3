"""Pairs that are read in both orders: heads compare the states of the same token in both."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_model

from sklearn_relish import FrozenLLM, RelishRegressor, StateStore, preview
from sklearn_relish.states.pairs import NO_MATCH, counterparts
from sklearn_relish.training import windows
from sklearn_relish.training.batching import BatchLoader
from sklearn_relish.training.estimate import training_seconds
from sklearn_relish.utils import progress

ORDERS = ["One: {first}\nTwo: {second}\nSame:", "Two: {second}\nOne: {first}\nSame:"]
NAMES = ["A: {first}\nB: {second}\nSame:", "B: {second}\nA: {first}\nSame:"]
CPU = torch.device("cpu")


class CountingLLM(FrozenLLM):
    """Counts the texts that it reads."""

    n_read = 0

    def read(self, texts, **options):
        self.n_read += len(texts)
        return super().read(texts, **options)


@pytest.fixture(scope="module")
def llm():
    return CountingLLM(tiny_model("llama", n_layers=9), device="cpu", dtype="float32")


def rows_of_pairs(n_rows=60, seed=0):
    """Two texts of three to six letters in each row; the target is how many are the same."""
    random, letters = np.random.RandomState(seed), list("abcdef")
    texts = [
        ["".join(random.permutation(letters)[: random.randint(3, 7)]) for _ in range(2)]
        for _ in range(n_rows)
    ]
    X = pd.DataFrame(texts, columns=["first", "second"])
    return X, np.array([len(set(a) & set(b)) for a, b in texts], dtype=float)


def regressor(llm, **parameters):
    sizes = {"latent_size": 16, "n_heads": 2, "max_epochs": 1, "n_estimators": 2}
    return RelishRegressor(
        llm, **sizes | {"prompt": ORDERS, "memory": StateStore(), "random_state": 0} | parameters
    )


@pytest.mark.parametrize("max_length", [512, 20])
@pytest.mark.filterwarnings("ignore:.* texts are longer:UserWarning")
def test_a_counterpart_is_the_same_token_in_the_other_order(llm, max_length):
    X, y = rows_of_pairs()
    X.loc[0, "first"] = "a"
    fitted = regressor(llm, max_length=max_length).fit(X, y)
    ((places, of_orders),) = fitted._stream_views(X)
    texts = [[prompt.format(**X.iloc[place]) for place in places] for prompt in ORDERS]
    tokens = [[pieces for pieces, _ in llm.tokens(each, max_length=max_length)] for each in texts]
    n_cut = 0
    for order, states in enumerate(of_orders):
        loader = BatchLoader(states, CPU, torch.float32)
        for row in range(len(places)):
            own, mask, matches, others = loader.load(torch.tensor([row]))
            other = of_orders[1 - order]
            other_states, other_mask = other.batch(torch.tensor([row]))
            other_matches = other.matches.batch(torch.tensor([row]))[0][:, :, 0].long()
            (positions,) = counterparts(matches, mask, other_matches, other_mask)
            cells = {letter for cell in X.iloc[places[row]] for letter in cell}
            for place, position in enumerate(positions.tolist()):
                if position == NO_MATCH:
                    assert torch.equal(others[0, place], own[0, place])
                    continue
                assert tokens[order][row][place] == tokens[1 - order][row][position]
                assert torch.equal(others[0, place], other_states[0, position])
                cells -= set(tokens[order][row][place])
            n_cut += bool(cells)  # otherwise each letter has a counterpart
    assert (n_cut > 0) == (max_length == 20)


def test_counterparts_of_a_batch_are_those_of_each_text():
    generator = torch.Generator().manual_seed(0)
    batch = [_random_matches(generator) for _ in range(50)]
    padded = [
        torch.nn.utils.rnn.pad_sequence([text[i] for text in batch], batch_first=True)
        for i in (0, 1)
    ]
    masks = [
        torch.arange(each.shape[1]) < torch.tensor([len(text[i]) for text in batch])[:, None]
        for i, each in enumerate(padded)
    ]
    found = counterparts(padded[0], masks[0], padded[1], masks[1])
    for row, (matches, other_matches) in enumerate(batch):
        alone = [torch.ones(1, len(each), dtype=torch.bool) for each in (matches, other_matches)]
        (expected,) = counterparts(matches[None], alone[0], other_matches[None], alone[1])
        assert torch.equal(found[row, : len(matches)], expected)
        assert (found[row, len(matches) :] == NO_MATCH).all()


def _random_matches(generator):
    """Matches of a text with parts of one to five tokens, in both orders."""
    n_first, n_second, before, between, after = (
        torch.randint(1, 6, (5,), generator=generator).sub(torch.tensor([0, 0, 1, 1, 1])).tolist()
    )
    both = []
    for one, two in ((n_first, n_second), (n_second, n_first)):
        first = torch.arange(before, before + one)
        second = torch.arange(before + one + between, before + one + between + two)
        matches = torch.arange(before + one + between + two + after)
        matches[first] = second[torch.randint(two, (one,), generator=generator)]
        matches[second] = first[torch.randint(one, (two,), generator=generator)]
        both.append(matches)
    return both


def test_a_part_without_tokens_has_no_counterparts():
    matches, other_matches = torch.tensor([[0, NO_MATCH, 2]]), torch.tensor([[0, 2, 1]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert (counterparts(matches, mask, other_matches, mask) == NO_MATCH).all()
    assert (counterparts(other_matches, mask, matches, mask) == NO_MATCH).all()


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (ORDERS, [1, 0]),
        ([*ORDERS, *NAMES], [1, 0, 1, 0]),
        ([ORDERS[0], NAMES[1]], [1, 0]),
        ([ORDERS[0], NAMES[0]], None),
        ([*ORDERS, "{first}\n{second}"], [1, 0, 1]),
        (["{first}", "{second}"], None),
        (ORDERS[:1], None),
    ],
)
def test_heads_compare_both_orders_if_each_prompt_has_another_order(llm, prompts, expected):
    X, y = rows_of_pairs(20)
    fitted = regressor(llm, prompt=prompts, max_epochs=1).fit(X, y)
    assert fitted._other_orders() == expected
    sizes = fitted.head_.heads[0].sizes
    assert sizes["both_orders"] == (expected is not None) == fitted._head_inputs()["both_orders"]
    assert sizes["pair"] == fitted._head_inputs()["pair"] == ("second" in prompts[0])


def test_predictions_follow_the_difference_between_the_orders(llm):
    X, y = rows_of_pairs()
    fitted = regressor(llm, linear_path=False).fit(X, y)
    before = fitted.predict(X)
    for head in fitted.head_.heads:
        head.order_difference.weight.data = -head.order_difference.weight.data
    assert np.abs(fitted.predict(X) - before).min() > 1e-4


def test_a_prediction_reads_each_text_once_and_depends_on_no_other_row(llm):
    X, y = rows_of_pairs()
    fitted = regressor(llm).fit(X, y)
    new, _ = rows_of_pairs(30, seed=1)
    llm.n_read = 0
    together = fitted.predict(new)
    assert llm.n_read == 2 * len(new.drop_duplicates())
    alone = [fitted.predict(new.iloc[row : row + 1])[0] for row in range(len(new))]
    np.testing.assert_array_equal(alone, together)


def test_cut_texts_of_all_orders_are_one_warning(llm):
    X, y = rows_of_pairs()
    fitted = regressor(llm, max_length=24)
    with pytest.warns(UserWarning, match="were cut"):
        fitted.fit(X, y)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted.predict(X)
    (message,) = [str(each.message) for each in caught]
    assert "of 120 texts are longer than max_length=24" in message


def test_missing_cells_have_no_counterparts(llm):
    X, y = rows_of_pairs()
    X.loc[[0, 1], "first"], X.loc[2, "second"] = None, None
    fitted = regressor(llm).fit(X, y)
    assert np.isfinite(fitted.predict(X)).all()


def test_a_training_set_larger_than_memory(llm, tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "MIN_MEMORY", 0)
    monkeypatch.setattr(windows, "UNIT_BYTES", 1_000)
    X, y = rows_of_pairs(200)
    expected = regressor(llm, memory=StateStore(tmp_path)).fit(X, y)
    loaded = []
    load = windows.Windows.load

    def record(self, rows):
        loaded.append(self.n_bytes)
        return load(self, rows)

    monkeypatch.setattr(windows.Windows, "load", record)
    small = StateStore(tmp_path, max_memory=200_000)
    fitted = regressor(llm, memory=small).fit(X, y)
    assert {50_000.0} == {n_bytes for n_bytes in loaded if n_bytes < 100_000}
    assert np.corrcoef(fitted.predict(X), expected.predict(X))[0, 1] > 0.9


@pytest.mark.parametrize("first", ["fit", "partial_fit"])
def test_the_heads_of_both_orders_are_trained_further(llm, first):
    X, y = rows_of_pairs()
    fitted = getattr(regressor(llm), first)(X, y)
    before = fitted.predict(X)
    fitted.partial_fit(X, y)
    assert fitted.head_.heads[0].sizes["both_orders"]
    assert not np.allclose(fitted.predict(X), before)


def test_the_time_of_a_first_fit_in_both_orders_is_estimated(llm, monkeypatch):
    """Before the regressor has its columns."""
    estimated = []

    def estimate(plan, states):
        estimated.append(plan.trainings[0][0].sizes["both_orders"])
        return training_seconds(plan, states)

    monkeypatch.setattr(preview, "training_seconds", estimate)
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0)
    X, y = rows_of_pairs(200)
    assert regressor(llm).preview(X).train_seconds > 0
    regressor(llm, verbose=1).fit(X, y)
    assert len(estimated) > 1
    assert set(estimated) == {True}


def test_a_saved_regressor_compares_both_orders(llm, tmp_path):
    X, y = rows_of_pairs()
    fitted = regressor(llm).fit(X, y)
    fitted.save_pretrained(tmp_path)
    loaded = RelishRegressor.from_pretrained(tmp_path, model=llm)
    assert loaded.head_.heads[0].sizes["both_orders"]
    np.testing.assert_array_equal(loaded.predict(X), fitted.predict(X))


def test_a_model_without_spans_compares_no_orders():
    class NoSpans(FrozenLLM):
        def tokens(self, texts, **options):
            raise ValueError("This model does not know spans.")

    X, y = rows_of_pairs()
    model = NoSpans(tiny_model("llama", n_layers=9), device="cpu", dtype="float32")
    fitted = regressor(model).fit(X, y)
    assert not fitted.head_.heads[0].sizes["both_orders"]
    assert np.isfinite(fitted.predict(X)).all()

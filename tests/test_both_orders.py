"""Pairs that are read in both orders: heads compare the states of the same token in both."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_model

from sklearn_relish import FrozenLLM, RelishRegressor, StateStore, preview
from sklearn_relish.states import reading
from sklearn_relish.states.pairs import NO_MATCH, PairTemplate, counterparts
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
@pytest.mark.parametrize("prompts", [ORDERS, ["{first} = {second}.", "{second} = {first}."]])
@pytest.mark.filterwarnings("ignore:.* texts are longer:UserWarning")
def test_a_counterpart_is_the_same_token_in_the_other_order(llm, prompts, max_length):
    X, y = rows_of_pairs()
    X.loc[0, "first"], X.loc[1, "second"] = "a", "é 中文 🙂 é"
    fitted = regressor(llm, prompt=prompts, max_length=max_length).fit(X, y)
    ((places, of_orders),) = fitted._stream_views(X)
    texts = [[prompt.format(**X.iloc[place]) for place in places] for prompt in prompts]
    tokens = [[pieces for pieces, _ in llm.tokens(each, max_length=max_length)] for each in texts]
    n_missing = 0
    for order, states in enumerate(of_orders):
        loader, other = BatchLoader(states, CPU, torch.float32), of_orders[1 - order]
        _, mask, _, others = loader.load(torch.arange(len(places)))
        for row in range(len(places)):
            own, found = next(iter(states[torch.tensor([row])])), others[row][mask[row]]
            other_states = next(iter(other[torch.tensor([row])]))
            positions = next(iter(states.counterparts[torch.tensor([row])]))[:, 0].tolist()
            letters = [letter for cell in X.iloc[places[row]] for letter in cell.replace(" ", "")]
            for place, position in enumerate(positions):
                if position == NO_MATCH:
                    assert torch.equal(found[place], own[place])
                    continue
                piece = tokens[order][row][place].strip()
                assert tokens[1 - order][row][position].strip() == piece
                assert torch.equal(found[place], other_states[position])
                letters = [letter for letter in letters if letter not in piece]
            real = [position for position in positions if position != NO_MATCH]
            assert len(set(real)) == len(real)
            n_missing += bool(letters)  # otherwise each letter has a counterpart
    assert (n_missing > 0) == (max_length == 20)


def test_counterparts_have_the_same_place_in_the_same_part():
    template, other = PairTemplate("", " = ", ""), PairTemplate("", " = ", "!")
    # "un|belie|ve| =| ok" and "ok| =| unbelie|ve|!": the beginning is divided into other tokens
    places = template.places(
        "unbelieve = ok", np.array([[0, 2], [2, 7], [7, 9], [9, 11], [11, 14]])
    )
    assert places.tolist() == [[0, 0, 2], [0, 2, 7], [0, 7, 9], [-1, -1, -1], [1, 0, 2]]
    of_other = np.array([[0, 2], [2, 4], [4, 12], [12, 14], [14, 15]])
    other_places = other.places("ok = unbelieve!", of_other)
    found = counterparts(places, other_places)
    assert found.tolist() == [NO_MATCH, NO_MATCH, 3, NO_MATCH, 0]
    assert counterparts(other_places, places).tolist() == [4, NO_MATCH, NO_MATCH, 2, NO_MATCH]
    cut = counterparts(places, other_places[3:])  # a tokenizer that cuts the beginning
    assert cut.tolist() == [NO_MATCH, NO_MATCH, 0, NO_MATCH, NO_MATCH]


def test_tokens_that_form_a_character_have_counterparts_of_their_own():
    places = np.array([[0, 0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2], [1, 1, 2], [1, 1, 2]])
    assert counterparts(places, places).tolist() == [NO_MATCH, 4, 5, NO_MATCH, 1, 2]


def test_a_part_without_tokens_has_no_counterparts():
    places, other_places = np.array([[0, 0, 1], [-1, -1, -1]]), np.array([[0, 0, 1]])
    assert counterparts(places, other_places).tolist() == [NO_MATCH, NO_MATCH]
    assert counterparts(places[:0], other_places).tolist() == []


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
    fitted = regressor(llm, prompt=prompts).fit(X, y)
    assert fitted._other_orders() == expected
    sizes = fitted.head_.heads[0].sizes
    assert sizes["both_orders"] == (expected is not None) == fitted._head_options()["both_orders"]
    assert sizes["pair"] == fitted._head_options()["pair"] == ("second" in prompts[0])


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


def test_rows_with_missing_cells_have_predictions(llm):
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
    assert 50_000.0 in loaded  # of half of the memory, one half for each order
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
        knows = False

        def tokens(self, texts, **options):
            if not self.knows:
                raise ValueError("This model does not know spans.")
            return super().tokens(texts, **options)

    X, y = rows_of_pairs()
    model = NoSpans(tiny_model("llama", n_layers=9), device="cpu", dtype="float32")
    fitted = regressor(model).fit(X, y)
    assert not fitted.head_.heads[0].sizes["both_orders"]
    assert np.isfinite(fitted.predict(X)).all()
    model.knows = True
    X, y = rows_of_pairs(seed=1)
    fitted = regressor(model).fit(X, y)
    model.knows = False
    with pytest.raises(ValueError, match="pass others, or a model that maps tokens to pieces"):
        fitted.predict(X)


@pytest.mark.filterwarnings("ignore:All rows are connected:UserWarning")
def test_repeated_texts_of_one_prompt_are_read_in_small_batches(llm, monkeypatch):
    monkeypatch.setattr(reading, "STREAM_BYTES", 2_000)
    X, y = rows_of_pairs(200)
    X["first"] = np.resize(["a", "b"], len(X))
    fitted = regressor(llm, prompt=["{first}", "{second}"]).fit(X, y)
    sizes = [[each.n_bytes for each in states] for _, states in fitted._stream_views(X)]
    assert len(sizes) > 10
    assert max(second for _, second in sizes) < 4_000
    batches = [rows for rows, _ in fitted._stream_views(X)]
    assert sorted(np.concatenate(batches)) == list(range(len(X)))


def test_attention_reads_only_the_prompts_that_it_needs(llm):
    X, y = rows_of_pairs()
    new, _ = rows_of_pairs(1, seed=1)
    for prompts, n_read in ((["{first}", "{second}"], 1), (ORDERS, 2)):
        fitted = regressor(llm, prompt=prompts).fit(X, y)
        llm.n_read = 0
        fitted.attention(new)
        assert llm.n_read == n_read


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_states_in_both_orders(llm, bits):
    X, y = rows_of_pairs()
    exact = regressor(llm).fit(X, y).predict(X)
    quantized = regressor(llm, memory=StateStore(bits=bits)).fit(X, y).predict(X)
    assert np.corrcoef(quantized, exact)[0, 1] > 0.9

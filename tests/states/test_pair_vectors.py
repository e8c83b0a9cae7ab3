"""Pairs: which tokens belong to which part of a text, and the vectors that compare the parts."""

import numpy as np
import pytest
import torch
from store_helpers import CountingLLM, fetch, forget_indexes
from tiny import tiny_model

from sklearn_relish import StateStore
from sklearn_relish.states import pairs
from sklearn_relish.states.pairs import N_PAIR_VECTORS, PairTemplate, pair_vectors
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.states.vectors import N_VECTORS, text_vectors

TEMPLATE = PairTemplate("A: ", "\nB: ", "\nScore:")
ROWS = [("a dull film", "dull"), ("fine", "a fine film indeed"), ("x", "x"), ("dull", "fine")]
TEXTS = [f"A: {first}\nB: {second}\nScore:" for first, second in ROWS]


def cut_out(text, template):
    return [text[begin:end] for begin, end in template.parts(text)]


def with_pair(store, texts, llm, pair=TEMPLATE, **options):
    options = {"layer": 3, "max_length": 512, "progress": False} | options
    return store.fetch(texts, llm, pair=pair, **options)


@pytest.mark.parametrize(
    ("first", "second"), [*ROWS, ("", "b"), ("a", ""), ("", ""), ("B:", "A: ")]
)
def test_the_parts_are_the_cells(first, second):
    assert cut_out(f"A: {first}\nB: {second}\nScore:", TEMPLATE) == [first, second]


def test_parts_reach_to_the_ends_of_the_text_if_nothing_else_is_there():
    assert cut_out("a man = a boy", PairTemplate("", " = ", "")) == ["a man", "a boy"]
    assert cut_out("a man = a boy", PairTemplate("cut ", " = ", " cut")) == ["a man", "a boy"]
    assert PairTemplate("", " = ", "").parts("only one, since a cell was missing") is None


def test_the_first_part_ends_where_the_text_between_begins():
    assert cut_out("A: a\nB: b\nB: c\nScore:", TEMPLATE) == ["a", "b\nB: c"]


def test_special_tokens_belong_to_no_part():
    spans = np.array([[0, 0], [0, 1], [1, 4], [4, 5], [5, 8], [0, 0]])
    first, second = PairTemplate("", "=", "").tokens_of_parts("a man=a b", spans)
    assert first.tolist() == [False, True, True, True, False, False]
    assert second.tolist() == [False, False, False, False, True, False]


@pytest.mark.parametrize("text", ["no template", "A: \nB: \nScore:"])
def test_a_part_may_have_no_tokens(text):
    first, second = TEMPLATE.tokens_of_parts(text, np.array([[0, 0], [0, 3], [3, 4]]))
    assert not first.any()
    assert not second.any()


def naive(text, first, second):
    a, b, center = text[first], text[second], text.mean(dim=0)

    def nearest(token, others):
        cosines = [torch.cosine_similarity(token - center, o - center, dim=0) for o in others]
        return others[int(torch.stack(cosines).argmax())]

    distances = [
        torch.stack([(token - nearest(token, others)).abs() for token in part]).mean(dim=0)
        for part, others in ((a, b), (b, a))
    ]
    return torch.stack([a.mean(dim=0), b.mean(dim=0), *distances])


@pytest.mark.parametrize(("n_first", "n_second"), [(1, 1), (3, 5), (7, 2)])
def test_pair_vectors_are_means_and_distances_of_matched_tokens(n_first, n_second):
    text = torch.randn(12, 6, generator=torch.Generator().manual_seed(n_first))
    places = torch.arange(12)
    first, second = places < n_first, (places >= 12 - n_second)
    torch.testing.assert_close(pair_vectors(text, first, second), naive(text, first, second))


def test_equal_parts_have_no_distance():
    part = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    first = torch.arange(10) < 5
    vectors = pair_vectors(torch.cat([part, part.flip(0)]), first, ~first)
    torch.testing.assert_close(vectors[0], vectors[1])
    assert (vectors[2:] == 0).all()


def test_a_part_without_tokens_is_a_token_in_the_middle_of_the_text():
    states = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    every, none = torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)
    center = states.mean(dim=0)
    vectors = pair_vectors(states, every, none)
    torch.testing.assert_close(vectors[:2], torch.stack([center, center]))
    torch.testing.assert_close(vectors[2], (states - center).abs().mean(dim=0))
    assert (vectors[3] > 0).any()
    assert (pair_vectors(states, none, none)[2:] == 0).all()


def test_of_long_parts_evenly_spaced_tokens_are_compared(monkeypatch):
    monkeypatch.setattr(pairs, "MAX_MATCHED", 4)
    text = torch.randn(11, 6, generator=torch.Generator().manual_seed(0))
    first = torch.arange(11) < 9
    vectors = pair_vectors(text, first, ~first)
    spaced, center = text[[0, 3, 6]], text.mean(dim=0)
    others = text[9:]
    cosine = torch.nn.functional.normalize(spaced - center, dim=1) @ (
        torch.nn.functional.normalize(others - center, dim=1).T
    )
    torch.testing.assert_close(vectors[0], text[:9].mean(dim=0))
    torch.testing.assert_close(vectors[2], (spaced - others[cosine.argmax(1)]).abs().mean(dim=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_of_a_pair_come_after_those_of_any_text(dtype):
    values = 10 * torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    lower = TokenStates.from_lengths(values, torch.tensor([5, 4]))
    parts = [(np.arange(n) < 2, np.arange(n) > 2) for n in (5, 4)]
    vectors = text_vectors(lower, lower, parts)
    assert vectors.shape == (2, N_VECTORS + N_PAIR_VECTORS, 6)
    assert vectors.dtype == dtype
    assert torch.equal(vectors[:, :N_VECTORS], text_vectors(lower, lower))
    alone = TokenStates.from_lengths(values[5:], torch.tensor([4]))
    assert torch.equal(text_vectors(alone, alone, parts[1:])[0], vectors[1])
    normalized = torch.nn.functional.rms_norm(values[:5].float(), (6,), eps=1e-6)
    torch.testing.assert_close(vectors[0, N_VECTORS], normalized[:2].mean(dim=0).to(dtype))


@pytest.mark.parametrize("bits", [None, 4])
def test_a_store_keeps_the_vectors_of_pairs(llm, tmp_path, bits):
    store = StateStore(tmp_path, bits=bits)
    states = with_pair(store, TEXTS, llm)
    assert states.n_vectors == N_VECTORS + N_PAIR_VECTORS
    plain = fetch(store, TEXTS, llm, layer=3)
    assert plain.n_vectors == N_VECTORS
    assert all(map(torch.equal, states, plain))
    for pair, text in zip(states.vectors, plain.vectors, strict=True):
        assert torch.equal(pair[:N_VECTORS], text)
    read = llm.tokens_read
    forget_indexes()
    order = [2, 0, 3, 1]
    again = with_pair(store, [TEXTS[i] for i in order], llm)
    expected = states[torch.tensor(order)].vectors
    assert all(map(torch.equal, again.vectors, expected))
    stream = store.stream(TEXTS[::-1], llm, layer=3, max_length=512, pair=TEMPLATE)
    found = {row: v for rows, piece in stream for row, v in zip(rows, piece.vectors, strict=True)}
    assert all(torch.equal(found[3 - row], v) for row, v in enumerate(states.vectors))
    assert llm.tokens_read == read


def test_another_template_has_states_of_its_own(llm):
    store = StateStore()
    other = PairTemplate("A: ", "B: ", "\nScore:")
    first = with_pair(store, TEXTS, llm)
    second = with_pair(store, TEXTS, llm, pair=other)
    assert all(map(torch.equal, first, second))
    assert not torch.equal(next(iter(first.vectors)), next(iter(second.vectors)))
    assert len(store.info()) == 2
    store.clear()
    assert store.info() == []


def test_info_knows_windows_of_pairs(llm):
    store = StateStore()
    states = with_pair(store, [text * 5 for text in TEXTS], llm, max_length=32, windows=True)
    assert states.n_vectors == N_VECTORS + N_PAIR_VECTORS
    with pytest.warns(UserWarning, match="were cut"):
        with_pair(store, [text * 5 for text in TEXTS], llm, max_length=32)
    assert [row["long_text"] for row in store.info()] == ["window", "truncate"]


class WithoutSpans(CountingLLM):
    def tokens(self, texts, *, max_length, windows=False):
        raise ValueError("no spans of tokens")


def test_a_model_that_knows_no_spans_gives_the_vectors_of_any_text():
    llm = WithoutSpans(tiny_model(), device="cpu", dtype="float32")
    assert with_pair(StateStore(), TEXTS, llm).n_vectors == N_VECTORS


@pytest.mark.parametrize("folder", [False, True])
def test_shards_with_and_without_vectors_of_pairs_are_not_merged(llm, tmp_path, folder):
    """As of a reader that has learned to map its tokens."""
    store = StateStore(tmp_path if folder else None, max_memory=2**20)
    other = WithoutSpans(tiny_model(), device="cpu", dtype="float32")
    texts = [f"A: {n}\nB: {n + 1}\nScore:" for n in range(80)]
    for number, text in enumerate(texts):
        with_pair(store, [text], other if number % 2 else llm)
    assert [
        states.n_vectors for states in (with_pair(store, texts[k::2], llm) for k in (0, 1))
    ] == [
        N_VECTORS + N_PAIR_VECTORS,
        N_VECTORS,
    ]
    assert with_pair(store, texts, llm).n_vectors == N_VECTORS


def test_no_texts_have_no_vectors(llm):
    assert with_pair(StateStore(), [], llm).n_vectors == 0

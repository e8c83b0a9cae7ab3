"""Pairs: which tokens belong to which part of a text, and the vectors that compare the parts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from store_helpers import CountingLLM, fetch, forget_indexes
from tiny import tiny_model

from sklearn_relish import StateStore
from sklearn_relish.states import pairs
from sklearn_relish.states.pairs import (
    N_PAIR_VECTORS,
    NO_MATCH,
    PairTemplate,
    match_tokens,
    pair_vectors,
)
from sklearn_relish.states.shard import Shard
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
    only = "one, since a cell was missing"
    assert cut_out(only, PairTemplate("", " = ", "")) == [only, ""]


def test_the_first_part_ends_where_the_text_between_begins():
    assert cut_out("A: a\nB: b\nB: c\nScore:", TEMPLATE) == ["a", "b\nB: c"]


def test_special_tokens_belong_to_no_part():
    spans = np.array([[0, 0], [0, 1], [1, 4], [4, 5], [5, 8], [0, 0]])
    first, second = PairTemplate("", "=", "").tokens_of_parts("a man=a b", spans)
    assert first.tolist() == [False, True, True, True, False, False]
    assert second.tolist() == [False, False, False, False, True, False]


@pytest.mark.parametrize(
    ("text", "of_first"), [("no template", [0, 1, 1]), ("A: \nB: \nScore:", [0, 0, 0])]
)
def test_a_part_may_have_no_tokens(text, of_first):
    first, second = TEMPLATE.tokens_of_parts(text, np.array([[0, 0], [0, 3], [3, 4]]))
    assert first.tolist() == of_first
    assert not second.any()


def test_a_missing_text_is_compared_like_an_empty_one(llm):
    template = PairTemplate("", "\nB: ", "")
    missing, empty = with_pair(StateStore(), ["x yz", "x yz\nB: "], llm, template).matches
    assert set(missing.flatten().tolist()) == {NO_MATCH}
    n_same = len(missing)
    assert empty[: n_same - 1].flatten().tolist() == [NO_MATCH] * (n_same - 1)


def random_text(n_tokens, seed=0):
    return torch.randn(n_tokens, 6, generator=torch.Generator().manual_seed(seed))


def vectors_of(text, first, second):
    return pair_vectors(text, first, second, match_tokens(text, first, second))


def naive_match(text, number, candidates):
    center = text.mean(dim=0)
    token = text[number] - center
    cosines = [torch.cosine_similarity(token, text[i] - center, dim=0) for i in candidates]
    return candidates[int(torch.stack(cosines).argmax())]


@pytest.mark.parametrize(("n_first", "n_second"), [(1, 1), (3, 5), (7, 2)])
def test_a_match_is_the_most_similar_token_of_the_other_part(n_first, n_second):
    text, n_between = random_text(12, n_first), 12 - n_first - n_second
    places = torch.arange(12)
    first, second = places < n_first, (places >= 12 - n_second)
    matches = match_tokens(text, first, second)
    of_first, between, of_second = (
        matches.tolist()[:n_first],
        *[
            matches.tolist()[begin : begin + n]
            for begin, n in ((n_first, n_between), (12 - n_second, n_second))
        ],
    )
    A, B = list(range(n_first)), list(range(12 - n_second, 12))
    assert of_first == [naive_match(text, i, B) for i in A]
    assert of_second == [naive_match(text, i, A) for i in B]
    assert between == list(range(n_first, 12 - n_second))
    a, b = text[:n_first], text[12 - n_second :]
    distances = [(a - text[of_first]).abs(), (b - text[of_second]).abs()]
    expected = torch.stack([part.mean(dim=0) for part in (a, b, *distances)])
    torch.testing.assert_close(pair_vectors(text, first, second, matches), expected)


def test_equal_parts_have_no_distance():
    part = random_text(5)
    first = torch.arange(10) < 5
    vectors = vectors_of(torch.cat([part, part.flip(0)]), first, ~first)
    torch.testing.assert_close(vectors[0], vectors[1])
    assert (vectors[2:] == 0).all()


@pytest.mark.parametrize("empty", [0, 1])
def test_without_a_part_the_other_one_is_compared_with_the_mean_of_the_text(empty):
    text, part = random_text(5), torch.arange(5) < 3
    parts = [part, part]
    parts[empty] = torch.zeros_like(part)
    matches = match_tokens(text, *parts)
    assert matches.tolist() == [NO_MATCH] * 3 + [3, 4]
    center = text.mean(dim=0)
    vectors = pair_vectors(text, *parts, matches)
    torch.testing.assert_close(vectors[1 - empty], text[:3].mean(dim=0))
    torch.testing.assert_close(vectors[empty], center)
    distance = (text[:3] - center).abs().mean(dim=0)
    torch.testing.assert_close(vectors[2:], torch.stack([distance, distance]))


def test_a_text_without_parts_has_no_distance():
    text, none = random_text(5), torch.zeros(5, dtype=torch.bool)
    vectors = vectors_of(text, none, none)
    torch.testing.assert_close(vectors[:2], text.mean(dim=0).expand(2, 6))
    assert (vectors[2:] == 0).all()


def test_in_long_parts_evenly_spaced_tokens_are_candidates(monkeypatch):
    text = random_text(11)
    first = torch.arange(11) < 9
    exact = match_tokens(text, first, ~first)
    monkeypatch.setattr(pairs, "MAX_MATCHED", 4)
    matches = match_tokens(text, first, ~first)
    assert matches[:9].tolist() == exact[:9].tolist()  # two candidates, in pieces of four tokens
    assert matches[9:].tolist() == [naive_match(text, i, [0, 3, 6]) for i in (9, 10)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_of_a_pair_come_after_those_of_any_text(dtype):
    values = 10 * torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    lower = TokenStates.from_lengths(values, torch.tensor([5, 4]))
    parts = [(np.arange(n) < 2, np.arange(n) > 2) for n in (5, 4)]
    vectors, matches = text_vectors(lower, lower, parts)
    assert vectors.shape == (2, N_VECTORS + N_PAIR_VECTORS, 6)
    assert vectors.dtype == dtype
    assert torch.equal(vectors[:, :N_VECTORS], text_vectors(lower, lower)[0])
    alone = TokenStates.from_lengths(values[5:], torch.tensor([4]))
    own_vectors, own_matches = text_vectors(alone, alone, parts[1:])
    assert torch.equal(own_vectors[0], vectors[1])
    assert torch.equal(own_matches, matches[5:])
    normalized = torch.nn.functional.rms_norm(values[:5].float(), (6,), eps=1e-6)
    expected = match_tokens(normalized, *map(torch.from_numpy, parts[0]))
    assert matches.shape == (9, 1)
    assert torch.equal(matches[:5, 0], expected)
    without = text_vectors(lower, None, parts)
    assert without[0].shape == (2, 0, 6)
    assert torch.equal(without[1], matches)  # by the layer itself, the same here
    torch.testing.assert_close(vectors[0, N_VECTORS], normalized[:2].mean(dim=0).to(dtype))


@pytest.mark.parametrize("bits", [None, 4])
def test_a_store_keeps_the_vectors_and_matches_of_pairs(llm, tmp_path, bits):
    store = StateStore(tmp_path, bits=bits)
    states = with_pair(store, TEXTS, llm)
    assert states.n_vectors == N_VECTORS + N_PAIR_VECTORS
    plain = fetch(store, TEXTS, llm, layer=3)
    assert plain.n_vectors == N_VECTORS
    assert plain.matches is None
    assert all(map(torch.equal, states, plain))
    assert states.matches.lengths.tolist() == states.lengths.tolist()
    assert all(0 <= match < len(text) for text in states.matches for match in text)
    assert next(iter(states.matches))[:, 0].tolist() != list(range(int(states.lengths[0])))
    for pair, text in zip(states.vectors, plain.vectors, strict=True):
        assert torch.equal(pair[:N_VECTORS], text)
    read = llm.tokens_read
    forget_indexes()
    order = [2, 0, 3, 1]
    again = with_pair(store, [TEXTS[i] for i in order], llm)
    expected = states[torch.tensor(order)].vectors
    assert all(map(torch.equal, again.vectors, expected))
    assert all(map(torch.equal, again.matches, states[torch.tensor(order)].matches))
    stream = store.stream(TEXTS[::-1], llm, layer=3, max_length=512, pair=TEMPLATE)
    found = {
        row: of_text
        for rows, piece in stream
        for row, *of_text in zip(rows, piece.vectors, piece.matches, strict=True)
    }
    for row, of_text in enumerate(zip(states.vectors, states.matches, strict=True)):
        assert all(map(torch.equal, found[3 - row], of_text))
    assert llm.tokens_read == read


def test_states_that_a_prediction_has_read_keep_their_matches(llm):
    store = StateStore()
    stream = store.stream(TEXTS, llm, layer=3, max_length=512, pair=TEMPLATE)
    read = {
        row: (text, match)
        for rows, piece in stream
        for row, text, match in zip(rows, piece, piece.matches, strict=True)
    }
    n_read = llm.tokens_read
    kept = with_pair(store, TEXTS, llm)
    assert llm.tokens_read == n_read
    for row, of_text in enumerate(zip(kept, kept.matches, strict=True)):
        assert all(map(torch.equal, read[row], of_text))


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
    states = with_pair(StateStore(), TEXTS, llm)
    assert states.n_vectors == N_VECTORS
    assert states.matches is None


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
    both = with_pair(store, texts, llm)
    assert both.n_vectors == N_VECTORS
    assert both.matches is None


@pytest.mark.parametrize("wrong", [-2, 2**20])
def test_a_match_outside_of_its_text_is_not_used(llm, tmp_path, wrong):
    """Even if all checksums agree."""
    states = with_pair(StateStore(tmp_path), TEXTS, llm)
    (path,) = tmp_path.rglob("*.safetensors")
    shard = Shard.open(path)
    matches = shard.matches.clone()
    matches[-1] = wrong
    path.unlink()
    replace(shard, matches=matches).save(path)
    forget_indexes()
    n_read = llm.tokens_read
    with pytest.warns(UserWarning, match="could not be used"):
        again = with_pair(StateStore(tmp_path), TEXTS, llm)
    assert llm.tokens_read == 2 * n_read
    assert all(map(torch.equal, again.matches, states.matches))


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("folder", [False, True])
def test_a_call_may_find_texts_that_were_read_without_spans(llm, tmp_path, folder, layer):
    """Their states are in shards of their own."""
    store = StateStore(tmp_path if folder else None)
    other = WithoutSpans(tiny_model(), device="cpu", dtype="float32")
    options = {"layer": layer, "max_length": 512, "pair": TEMPLATE}
    for _ in store.stream(TEXTS[:2], other, **options):  # kept in memory
        pass
    assert with_pair(store, TEXTS, llm, layer=layer).matches is None
    found = with_pair(store, TEXTS[2:], llm, layer=layer)
    expected = with_pair(StateStore(), TEXTS[2:], llm, layer=layer)
    assert all(map(torch.equal, found.matches, expected.matches))


def test_no_texts_have_no_vectors(llm):
    assert with_pair(StateStore(), [], llm).n_vectors == 0

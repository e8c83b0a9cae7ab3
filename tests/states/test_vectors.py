"""Vectors of texts: pooled states of a lower layer, kept with the states of a layer."""

import numpy as np
import pytest
import torch
from store_helpers import TEXTS, fetch, forget_indexes, n_tokens, same

from sklearn_relish import StateStore
from sklearn_relish.head.ensemble import LINEAR_POOLINGS
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.states.vectors import N_VECTORS, layers_to_read, lower_layer, text_vectors
from sklearn_relish.training.inference import pool_states

LAYER, LOWER = 3, 2


def vectors_of(states):
    return [text.clone() for text in states.vectors]


@pytest.fixture
def expected(llm):
    """The vectors of `TEXTS`, computed from the states of the lower layer."""
    lower = fetch(StateStore(), TEXTS, llm, layer=LOWER)
    vectors = list(text_vectors(lower, lower)[0])
    llm.tokens_read = 0
    return vectors


def test_the_lower_layer_is_below_the_layer():
    assert lower_layer(18) == 15  # SmolLM2-135M, at 60 % of the depth
    assert lower_layer(11) == 9  # Gemma-3-270M
    assert lower_layer(1) is None
    assert lower_layer(2) is None
    assert all(1 <= lower_layer(layer) < layer for layer in range(3, 200))
    assert layers_to_read([18, 15, 2]) == [18, 15, 2, 12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_are_the_poolings_of_the_linear_path(dtype):
    lengths = torch.tensor([3, 1, 4])
    values = 10 * torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    lower = TokenStates.from_lengths(values, lengths)
    before = values.clone()
    vectors, matches = text_vectors(lower, lower)
    assert matches.shape == (0, 1)
    assert torch.equal(values, before)
    assert vectors.shape == (3, N_VECTORS, 6)
    assert vectors.dtype == dtype
    poolings = [pool_states(lower, pooling, "rms") for pooling in LINEAR_POOLINGS]
    torch.testing.assert_close(vectors, torch.stack(poolings, dim=1).to(dtype))
    alone = lower[torch.tensor([1])]
    alone = TokenStates.from_lengths(values[3:4], alone.lengths)
    assert torch.equal(text_vectors(alone, alone)[0][0], vectors[1])


def test_there_are_no_vectors_without_a_lower_layer_of_the_same_size(llm):
    states = fetch(StateStore(), TEXTS, llm, layer=2)
    assert states.vectors is None
    states = TokenStates.from_lengths(torch.ones(3, 6), torch.tensor([1, 2]))
    narrow = TokenStates.from_lengths(torch.ones(3, 4), torch.tensor([1, 2]))
    for lower in (narrow, None):
        vectors, _ = text_vectors(states, lower)
        assert vectors.shape == (2, 0, 6)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_one_pass_gives_states_and_vectors(llm, expected, tmp_path, on_disk, bits):
    store = StateStore(tmp_path if on_disk else None, bits=bits)
    states = fetch(store, TEXTS, llm, layer=LAYER)
    assert llm.tokens_read == n_tokens(TEXTS)
    assert same(vectors_of(states), expected)
    chosen = states[torch.tensor([3, 1, 3])]
    assert same(vectors_of(chosen), [expected[3], expected[1], expected[3]])
    if on_disk:
        forget_indexes()
    again = fetch(store, TEXTS[::-1], llm, layer=LAYER)
    assert llm.tokens_read == n_tokens(TEXTS)
    assert same(vectors_of(again), expected[::-1])


@pytest.mark.parametrize("kept", [0, 7, len(TEXTS)])
def test_a_stream_yields_states_with_their_vectors(llm, expected, kept):
    store = StateStore()
    if kept:
        fetch(store, TEXTS[:kept], llm, layer=LAYER)
    texts, found = TEXTS + TEXTS[:3], {}
    for rows, piece in store.stream(texts, llm, layer=LAYER, max_length=512):
        found |= dict(zip(rows.tolist(), vectors_of(piece), strict=True))
    assert same([found[row] for row in range(len(texts))], expected + expected[:3])
    states = fetch(store, TEXTS, llm, layer=LAYER)  # keeps what the stream has read
    assert llm.tokens_read == n_tokens(TEXTS)
    assert same(vectors_of(states), expected)


def test_merged_shards_keep_the_vectors_of_each_text(llm, expected, tmp_path):
    store = StateStore(tmp_path)
    for text in TEXTS * 2:
        fetch(store, [text], llm, layer=LAYER)
    for number in range(40):
        fetch(store, [f"{number} more"], llm, layer=LAYER)
    assert len(list(tmp_path.glob("*/layer3-*/*.safetensors"))) < 40  # they were merged
    forget_indexes()
    states = fetch(store, TEXTS, llm, layer=LAYER)
    assert same(vectors_of(states), expected)


def test_damaged_vectors_are_read_again(llm, expected, tmp_path):
    store = StateStore(tmp_path)
    fetch(store, TEXTS, llm, layer=LAYER)
    (file,) = tmp_path.glob("*/layer3-float32-512/*.safetensors")
    content = file.read_bytes()
    place = content.index(expected[4].numpy().tobytes())
    damaged = bytearray(content)
    damaged[place : place + 40] = bytes(np.random.RandomState(0).bytes(40))
    file.write_bytes(damaged)
    forget_indexes()
    with pytest.warns(UserWarning, match="could not be used"):
        assert same(vectors_of(fetch(store, TEXTS, llm, layer=LAYER)), expected)
    assert llm.tokens_read == 2 * n_tokens(TEXTS)

"""What a store reads, keeps and finds again."""

import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from joblib import Memory
from sklearn.base import clone
from store_helpers import TEXTS, fetch, forget_indexes, n_tokens, reference, same, streamed
from tiny import SIZE, tiny_model

from sklearn_relish import FrozenLLM, LLMEncoder, StateStore, TokenStateReader
from sklearn_relish.llm.batching import TOKEN_BUDGET
from sklearn_relish.states.token_states import TokenStates


@pytest.mark.parametrize("on_disk", [False, True])
def test_each_text_is_read_once_in_any_order_and_selection(llm, tmp_path, on_disk):
    store = StateStore(tmp_path if on_disk else None)
    first = fetch(store, TEXTS + TEXTS[:5], llm)
    assert llm.tokens_read == n_tokens(TEXTS)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    again = fetch(store, [TEXTS[i] for i in order], llm)
    assert llm.tokens_read == n_tokens(TEXTS)
    assert same(again, first[torch.from_numpy(order)])
    mixed = fetch(store, ["new one", TEXTS[3], "new two", TEXTS[3]], llm)
    assert llm.tokens_read == n_tokens(TEXTS) + n_tokens(["new one", "new two"])
    assert same(mixed[torch.tensor([1, 3])], first[torch.tensor([3, 3])])
    assert mixed.lengths.tolist() == [7, len(TEXTS[3]), 7, len(TEXTS[3])]


def test_one_pass_gives_the_states_of_other_layers_too(llm, tmp_path):
    store = StateStore(tmp_path)
    settings = {"max_length": 512, "progress": False}
    fetched = store.fetch(TEXTS, llm, layer=3, also=[1, 2], **settings)
    assert llm.tokens_read == n_tokens(TEXTS)
    assert same(fetch(store, TEXTS, llm, layer=2), reference(TEXTS))
    assert same(fetched, fetch(StateStore(), TEXTS, llm, layer=3))
    before = llm.tokens_read
    assert same(fetch(store, TEXTS, llm, layer=1), fetch(StateStore(), TEXTS, llm, layer=1))
    assert llm.tokens_read == before + n_tokens(TEXTS)  # of the second store alone
    assert sorted(row["layer"] for row in store.info()) == [1, 2, 3]


@pytest.mark.parametrize("on_disk", [False, True])
def test_states_of_additional_layers_are_not_kept_twice(llm, tmp_path, on_disk):
    store = StateStore(tmp_path if on_disk else None)
    fetch(store, TEXTS, llm, layer=1)
    (before,) = store.info()
    forget_indexes()
    settings = {"max_length": 512, "progress": False}
    store = StateStore(tmp_path if on_disk else None)
    fetch(store, TEXTS, llm, layer=1)
    store.fetch(TEXTS, llm, layer=2, also=[1], **settings)
    assert {row["layer"]: row["n_bytes"] for row in store.info()} == {
        1: before["n_bytes"],
        2: before["n_bytes"],
    }


def test_what_changes_the_states_changes_the_key(llm):
    store = StateStore()
    fetch(store, TEXTS, llm)
    for change in ({"layer": 1}, {"max_length": 300}):
        before = llm.tokens_read
        fetch(store, TEXTS, llm, **change)
        assert llm.tokens_read == before + n_tokens(TEXTS)
    other = FrozenLLM(tiny_model(), device="cpu", dtype="bfloat16")
    assert fetch(store, TEXTS, other).arrays[0].dtype == torch.bfloat16


def test_another_process_finds_the_states_without_the_model(llm, tmp_path, monkeypatch):
    first = fetch(StateStore(tmp_path), TEXTS, llm)
    fresh = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    monkeypatch.setattr(FrozenLLM, "network", property(lambda _: pytest.fail("model loaded")))
    monkeypatch.setattr(FrozenLLM, "tokenizer", property(lambda _: pytest.fail("tokenizer loaded")))
    assert same(fetch(StateStore(tmp_path), TEXTS, fresh), first)


def test_shards_that_appear_later_are_found(llm, tmp_path):
    early, late = StateStore(tmp_path), StateStore(tmp_path)
    fetch(early, TEXTS[:5], llm)
    fetch(late, TEXTS[5:], llm)
    before = llm.tokens_read
    fetch(early, TEXTS, llm)
    assert llm.tokens_read == before


def test_what_was_read_before_an_interruption_is_kept(llm, tmp_path, monkeypatch):
    monkeypatch.setitem(TOKEN_BUDGET, "cpu", 64)
    forward, calls = llm._read_batch, []

    def interrupted(tokens, layers):
        calls.append(tokens)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(tokens, layers)

    monkeypatch.setattr(llm, "_read_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(StateStore(tmp_path), TEXTS, llm)
    kept = llm.tokens_read
    assert kept > 0
    fetch(StateStore(tmp_path), TEXTS, llm)
    assert llm.tokens_read == n_tokens(TEXTS)


def test_files_have_the_permissions_of_their_folder(llm, tmp_path):
    before = os.umask(0o002)
    try:
        fetch(StateStore(tmp_path / "shared"), TEXTS, llm)
    finally:
        os.umask(before)
    (file,) = tmp_path.glob("shared/*/*/*.safetensors")
    assert file.stat().st_mode & 0o777 == 0o664


def test_cut_texts_are_counted_in_one_warning_each_time(llm, tmp_path):
    for store in (StateStore(tmp_path), StateStore(tmp_path)):
        with pytest.warns(UserWarning, match="were cut") as caught:
            states = fetch(store, ["short", "x" * 30, "y" * 50], llm, max_length=10)
        assert [str(warning.message) for warning in caught] == [
            "2 of 3 texts are longer than max_length=10 tokens, or do not fit into the model's"
            " context after the prefix, and were cut;"
            " the longest has 50. A larger max_length, or long_text='window', reads more of them."
        ]
        assert states.lengths.tolist() == [5, 10, 10]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fetch(StateStore(tmp_path), ["short"], llm, max_length=10)


def test_states_that_another_process_removes_are_read_again(llm, tmp_path):
    store = StateStore(tmp_path)
    states = fetch(store, TEXTS, llm)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    assert store.info() == []
    assert same(states, reference(TEXTS))  # what was fetched is kept
    fetch(store, TEXTS, llm)
    assert llm.tokens_read == 2 * n_tokens(TEXTS)
    assert store.info()[0]["n_texts"] == len(TEXTS)


@pytest.mark.parametrize("on_disk", [False, True])
def test_predictions_write_nothing_and_a_fit_after_them_reads_nothing(llm, tmp_path, on_disk):
    store = StateStore(tmp_path / "states" if on_disk else None)
    fetch(store, TEXTS[:8], llm)
    files = sorted(tmp_path.rglob("*"))
    texts = TEXTS + TEXTS[5:15]
    for _ in range(2):
        assert same(streamed(store, texts, llm), reference(texts))
        assert llm.tokens_read == n_tokens(TEXTS)
        assert sorted(tmp_path.rglob("*")) == files
        assert store.info()[0]["n_texts"] == 8
    assert same(fetch(store, texts, llm), reference(texts))
    assert llm.tokens_read == n_tokens(TEXTS)
    assert store.info()[0]["n_texts"] == len(TEXTS)
    assert len(store._contents.recent) == store._contents.recent.n_bytes == 0
    forget_indexes()
    fetch(store, TEXTS, llm)
    assert llm.tokens_read == (1 if on_disk else 2) * n_tokens(TEXTS)


def test_a_stream_counts_cut_texts_in_one_warning(llm, monkeypatch):
    monkeypatch.setattr("sklearn_relish.states.reading.STREAM_TEXTS", 1)
    texts = ["short", "x" * 600, "y" * 550, "x" * 600]
    with pytest.warns(UserWarning, match="3 of 4 texts .* the longest has 600") as caught:
        streamed(StateStore(), texts, llm)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"folder": "~nobody-of-this-name/x"}, "can't be resolved.*Pass the folder's full path"),
        ({"max_memory": -1}, "max_memory must be a number of bytes, 0 or more, got -1"),
        ({"max_bytes": "50GB"}, "max_bytes must be a number of bytes, 0 or more, got '50GB'"),
        ({"folder": ""}, "empty name"),
        ({"bits": 3}, "bits must be 8, 4, or None for the model's own dtype, got 3"),
    ],
)
def test_invalid_parameters_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StateStore(**arguments)


@pytest.mark.parametrize(("bits", "scale_bytes", "extra_rows"), [(8, 4, 1), (4, 18, 2)])
def test_quantized_states_take_a_half_or_a_quarter_of_the_bytes(
    bits, scale_bytes, extra_rows, tmp_path
):
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="bfloat16")
    store, small = StateStore(tmp_path), StateStore(tmp_path, bits=bits)
    exact, quantized = fetch(store, TEXTS, llm), fetch(small, TEXTS, llm)
    assert small.misses == 2 * len(TEXTS)
    sizes = {row["dtype"]: row["n_bytes"] for row in store.info()}
    n_rows = n_tokens(TEXTS) + extra_rows * len(set(TEXTS))
    assert sizes == {
        "bfloat16": 2 * n_tokens(TEXTS) * SIZE,
        f"bfloat16-{bits}bit": n_rows * (SIZE * bits // 8 + scale_bytes),
    }
    rows = torch.tensor([3, 1, 3])
    (one, mask), (other, same_mask) = exact.batch(rows), quantized.batch(rows)
    assert torch.equal(mask, same_mask)
    assert one.dtype == other.dtype
    if bits == 8:
        assert torch.allclose(one.float(), other.float(), rtol=2**-4, atol=2**-9)
    assert (one - other).float().norm() < one.float().norm() / (20 if bits == 8 else 8)
    for text, states in zip(quantized, fetch(small, TEXTS, llm), strict=True):
        assert text.shape[1] == SIZE
        assert torch.equal(text, states)
    forget_indexes()
    again = fetch(StateStore(tmp_path, bits=bits), TEXTS, llm)  # from the files
    assert all(map(torch.equal, again, quantized))
    encoder = LLMEncoder(llm, layer=2, memory=small)
    pooled = [encoder.set_params(memory=m).fit_transform(TEXTS) for m in (small, store)]
    np.testing.assert_allclose(*pooled, atol=0.8 / bits)


def test_info_and_clear_go_by_model(llm, tmp_path):
    store = StateStore(tmp_path)
    other = FrozenLLM(tiny_model("gpt2"), device="cpu", dtype="float32")
    fetch(store, TEXTS, llm)
    fetch(store, TEXTS, llm, layer=1)
    fetch(store, TEXTS[:3], other)
    fetch(store, TEXTS, llm)
    assert (store.hits, store.misses) == (20, 43)
    forget_indexes()
    store = StateStore(tmp_path)
    assert (store.hits, store.misses) == (0, 0)
    held = sorted(store.info(), key=lambda row: (row["n_texts"], row["layer"]))
    assert [(row["model"], row["layer"], row["n_texts"], row["n_bytes"]) for row in held] == [
        (str(tiny_model("gpt2")), 2, 3, n_tokens(TEXTS[:3]) * SIZE * 4),
        (str(tiny_model()), 1, 20, n_tokens(TEXTS) * SIZE * 4),
        (str(tiny_model()), 2, 20, n_tokens(TEXTS) * SIZE * 4),
    ]
    store.clear(os.path.relpath(tiny_model()))
    assert [row["n_texts"] for row in store.info()] == [3]
    store.clear(llm)
    assert [row["n_texts"] for row in store.info()] == [3]
    store.clear(other)
    assert store.info() == []
    assert not list(tmp_path.rglob("*.safetensors"))


def test_all_stores_of_a_folder_share_one_index(llm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fetch(StateStore("states"), TEXTS, llm)
    for store in (StateStore(tmp_path / "states"), clone(StateStore("states"), safe=False)):
        assert (store.hits, store.misses) == (0, 20)
    assert (StateStore().hits, StateStore().misses) == (0, 0)
    assert StateStore(Memory("cache", verbose=0)).folder == tmp_path / "cache/sklearn_relish"
    assert StateStore(Memory(None)).folder is None
    store = pickle.loads(pickle.dumps(StateStore("states", max_bytes=10)))
    assert repr(store) == f"StateStore({str(tmp_path / 'states')!r}, max_bytes=10)"


class OneLetterReader(TokenStateReader):
    """The smallest reader: a token is a character, and its state the character's code."""

    model, n_layers, hidden_size = "one-letter", 2, 2
    fingerprint = "f" * 32

    def read(self, texts, *, layers, max_length, windows=False):
        for row in reversed(range(len(texts))):
            codes = torch.tensor([[ord(letter), 1.0] for letter in texts[row][:max_length]])
            states = TokenStates.from_lengths(codes, torch.tensor([len(codes)]))
            yield np.array([row]), [states for _ in layers], np.array([len(texts[row])])


@pytest.mark.parametrize("on_disk", [False, True])
def test_any_reader_of_token_states_can_be_used(llm, tmp_path, on_disk):
    store, reader = StateStore(tmp_path if on_disk else None), OneLetterReader()
    expected = [torch.tensor([[ord(letter), 1.0] for letter in text]) for text in TEXTS]
    assert same(fetch(store, TEXTS[:5], reader), expected[:5])
    assert same(streamed(store, TEXTS, reader), expected)
    fetch(store, TEXTS, llm)
    assert [row["model"] for row in store.info()] == ["one-letter", str(tiny_model())]
    store.clear(reader)
    assert [row["model"] for row in store.info()] == [str(tiny_model())]


def test_states_of_cut_texts_and_of_windows_are_not_confused(llm, tmp_path):
    store, text = StateStore(tmp_path), "a text of more than sixteen tokens"
    with pytest.warns(UserWarning, match="longer than max_length=16"):
        cut = fetch(store, [text], llm, max_length=16)
    windows = store.fetch([text], llm, layer=2, max_length=16, windows=True, progress=False)
    assert cut.lengths.tolist() == [16]
    assert windows.lengths.tolist() == [len(text)]

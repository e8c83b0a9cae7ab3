import warnings

import numpy as np
import pytest
import torch
from joblib import Memory
from safetensors.torch import load_file
from tiny import tiny_model

from sklearn_relish import FrozenLLM
from sklearn_relish.backbone import TOKEN_BUDGET
from sklearn_relish.store import StateStore, shared_store

TEXTS = [f"text number {i}" + " more" * (i % 7) for i in range(20)]


@pytest.fixture
def llm():
    """A tiny model that remembers how many tokens went through it."""
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    llm.tokens_read = 0

    def count(_, args, kwargs):
        llm.tokens_read += int(kwargs["attention_mask"].sum())

    llm.network.register_forward_pre_hook(count, with_kwargs=True)
    return llm


def n_tokens(texts):
    return sum(len(text) for text in texts)  # the tiny model reads bytes


def fetch(store, texts, llm, layer=2, max_length=512):
    return store.fetch(texts, llm, layer=layer, max_length=max_length, progress=False)


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a.values, b.values)
        for a, b in (
            (first[torch.tensor([i])].compact(), second[torch.tensor([i])].compact())
            for i in range(len(first))
        )
    )


@pytest.mark.parametrize("on_disk", [False, True])
def test_each_text_is_read_once_in_any_order_and_company(llm, tmp_path, on_disk):
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


def test_what_changes_the_states_changes_the_key(llm):
    store = StateStore()
    fetch(store, TEXTS, llm)
    for change in ({"layer": 1}, {"max_length": 300}):
        before = llm.tokens_read
        fetch(store, TEXTS, llm, **change)
        assert llm.tokens_read == before + n_tokens(TEXTS)
    other = FrozenLLM(tiny_model(), device="cpu", dtype="bfloat16")
    assert fetch(store, TEXTS, other).values.dtype == torch.bfloat16


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
    forward, calls = llm._forward, []

    def interrupted(tokens, layer):
        calls.append(tokens)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(tokens, layer)

    monkeypatch.setattr(llm, "_forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(StateStore(tmp_path), TEXTS, llm)
    kept = llm.tokens_read
    assert kept > 0
    fetch(StateStore(tmp_path), TEXTS, llm)
    assert llm.tokens_read == n_tokens(TEXTS)


def test_states_are_kept_in_shards_of_bounded_size(llm, tmp_path, monkeypatch):
    monkeypatch.setattr("sklearn_relish.store.SHARD_BYTES", 10_000)
    monkeypatch.setitem(TOKEN_BUDGET, "cpu", 64)
    first = fetch(StateStore(tmp_path), TEXTS, llm)
    shards = list(tmp_path.rglob("*.safetensors"))
    assert len(shards) > 3
    assert sum(len(load_file(shard)["lengths"]) for shard in shards) == len(TEXTS)
    assert same(fetch(StateStore(tmp_path), TEXTS[::-1], llm), first[torch.arange(19, -1, -1)])


def test_a_damaged_shard_is_said_and_read_again(llm, tmp_path):
    first = fetch(StateStore(tmp_path), TEXTS, llm)
    (shard,) = tmp_path.rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="can't be read .* read again by the model"):
        again = fetch(StateStore(tmp_path), TEXTS, llm)
    assert same(again, first)
    assert llm.tokens_read == 2 * n_tokens(TEXTS)


def test_a_folder_that_cannot_be_written_is_said_and_the_work_goes_on(llm, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    store = StateStore(blocked)
    with pytest.warns(UserWarning, match="could not be written to .* they stay in memory"):
        first = fetch(store, TEXTS, llm)
    assert same(fetch(store, TEXTS, llm), first)
    assert llm.tokens_read == n_tokens(TEXTS)


def test_cut_texts_are_counted_in_one_warning_each_time(llm, tmp_path):
    for store in (StateStore(tmp_path), StateStore(tmp_path)):
        with pytest.warns(UserWarning, match="were cut") as caught:
            states = fetch(store, ["short", "x" * 30, "y" * 50], llm, max_length=10)
        assert [str(warning.message) for warning in caught] == [
            "2 of 3 texts are longer than max_length=10 tokens or the model's window and were cut;"
            " the longest has 50."
        ]
        assert states.lengths.tolist() == [5, 10, 10]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fetch(StateStore(tmp_path), ["short"], llm, max_length=10)


def test_one_store_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shared_store("states") is shared_store(tmp_path / "states")
    assert shared_store(None) is shared_store(Memory(None))
    assert shared_store(Memory("cache", verbose=0)).folder == tmp_path / "cache/sklearn_relish"

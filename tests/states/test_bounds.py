"""Bounds of a store: memory, files, pieces, and what is evicted beyond them."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from store_helpers import (
    TEXTS,
    fetch,
    forget_indexes,
    kept_in_memory,
    n_tokens,
    reference,
    same,
    streamed,
)
from tiny import SIZE

import sklearn_relish.states.contents
import sklearn_relish.states.index
import sklearn_relish.states.reading
import sklearn_relish.states.retention
from sklearn_relish import StateStore
from sklearn_relish.llm.batching import TOKEN_BUDGET
from sklearn_relish.states.reading import Reading
from sklearn_relish.states.temporary import temporary_folder


def test_states_of_additional_layers_are_not_evicted_first(llm, tmp_path):
    n_bytes = sum(map(len, TEXTS)) * 32 * 4
    store = StateStore(tmp_path, max_bytes=2.5 * n_bytes)
    fetch(store, [f"older {text}" for text in TEXTS], llm, layer=1)
    store.fetch(TEXTS, llm, layer=3, also=[2], max_length=512, progress=False)
    before = llm.tokens_read
    fetch(store, TEXTS, llm, layer=2)
    assert llm.tokens_read == before


def test_states_are_kept_in_shards_of_bounded_size(llm, tmp_path, monkeypatch):
    monkeypatch.setattr("sklearn_relish.states.retention.SHARD_BYTES", 10_000)
    monkeypatch.setitem(TOKEN_BUDGET, "cpu", 64)
    first = fetch(StateStore(tmp_path), TEXTS, llm)
    shards = list(tmp_path.rglob("*.safetensors"))
    assert len(shards) > 3
    assert sum(len(load_file(shard)["lengths"]) for shard in shards) == len(TEXTS)
    assert same(fetch(StateStore(tmp_path), TEXTS[::-1], llm), first[torch.arange(19, -1, -1)])


def test_states_beyond_max_memory_move_to_a_temporary_folder(llm, monkeypatch):
    monkeypatch.setitem(TOKEN_BUDGET, "cpu", 64)
    texts = [f"text number {i} " + "and more " * (i % 20) for i in range(1000)]
    store = StateStore(max_memory=2 * 2**20)
    first = fetch(store, texts, llm)
    assert n_tokens(texts) * SIZE * 4 > 6 * store.max_memory
    (index,) = store._contents.indexes.values()
    assert 0 < index.memory_bytes <= store.max_memory
    files = [shard.path for shard in index.shards if shard.path is not None]
    assert {path.parent for path in files} == {temporary_folder().path}
    assert temporary_folder().path.stat().st_mode & 0o77 == 0
    assert same(fetch(store, texts[::-1], llm), first[torch.arange(len(texts) - 1, -1, -1)])
    assert llm.tokens_read == n_tokens(texts)


def test_states_on_disk_are_mapped_and_not_copied(llm, tmp_path, monkeypatch):
    monkeypatch.setattr("sklearn_relish.states.shard.SMALL_BYTES", 0)
    monkeypatch.setattr("sklearn_relish.states.retention.SHARD_BYTES", 10_000)
    monkeypatch.setitem(TOKEN_BUDGET, "cpu", 64)
    first, again = (fetch(StateStore(tmp_path), TEXTS, llm) for _ in range(2))
    assert len(first.arrays) > 3
    assert {a.data_ptr() for a in first.arrays} == {a.data_ptr() for a in again.arrays}
    maps = Path("/proc/self/maps")
    if maps.exists():
        mapped = maps.read_text()
        assert all(str(file) in mapped for file in tmp_path.rglob("*.safetensors"))


def test_many_small_files_are_merged(llm, tmp_path):
    store = StateStore(tmp_path)
    texts = [f"question {i}" for i in range(200)]
    for text in texts:
        fetch(store, [text], llm)
    assert len(list(tmp_path.rglob("*.safetensors"))) < 45
    (row,) = store.info()
    assert row["n_texts"] == 200
    forget_indexes()
    alone = StateStore()
    assert same(fetch(StateStore(tmp_path), texts, llm), fetch(alone, texts, llm))
    assert (store.hits, store.misses) == (200, 0)


def test_max_bytes_evicts_the_least_recently_used_states(llm, tmp_path):
    size = len("text a") * SIZE * 4
    store = StateStore(tmp_path, max_bytes=3 * size)
    for i, text in enumerate(["text a", "text b", "text c", "text a", "text d"]):
        fetch(store, [text], llm)
        for file in tmp_path.rglob("*.safetensors"):  # as if a second had passed
            stat = file.stat()
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns - 10**9))
        assert store.info()[0]["n_bytes"] == min(3, i + 1) * size
    before = llm.tokens_read
    fetch(store, ["text a", "text c", "text d"], llm)
    assert llm.tokens_read == before
    fetch(store, ["text b"], llm)
    assert llm.tokens_read == before + len("text b")
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3


def test_max_bytes_holds_in_memory_too(llm):
    size = len("text a") * SIZE * 4
    store = StateStore(max_bytes=2 * size)
    for text in ("text a", "text b", "text a", "text c"):
        fetch(store, [text], llm)
    assert store.misses == 3
    fetch(store, ["text a", "text c"], llm)
    assert store.misses == 3
    assert store.info()[0]["n_bytes"] == 2 * size


def test_a_call_larger_than_max_bytes_returns_all_its_states(llm, tmp_path):
    store, n_bytes = StateStore(tmp_path, max_bytes=1000), n_tokens(TEXTS) * SIZE * 4
    with pytest.warns(
        UserWarning, match=f"bound of 1000 bytes is less than the {n_bytes} bytes of one call's"
    ):
        states = fetch(store, TEXTS, llm)
    assert same(states, fetch(StateStore(), TEXTS, llm))
    assert store.info() == []


def test_max_memory_holds_for_all_collections_together(llm):
    store = StateStore(max_memory=10 * len("question 1") * SIZE * 4)
    fetch(store, [f"question {i}" for i in range(10)], llm)
    for i in range(100):
        fetch(store, [f"question {i % 10}{i // 10}"], llm, layer=1)
    indexes = store._contents.indexes.values()
    assert sum(index.memory_bytes for index in indexes) <= store.max_memory
    n_files = len({shard.path for index in indexes for shard in index.shards})
    assert n_files < 20


def test_single_texts_in_memory_are_merged(llm):
    texts = [f"question {i}" for i in range(200)]
    for text in texts:
        fetch(StateStore(), [text], llm)
    (index,) = StateStore()._contents.indexes.values()
    assert len(index.shards) < 70
    assert index.memory_bytes == index.n_bytes == n_tokens(texts) * SIZE * 4
    assert same(fetch(StateStore(), texts, llm), reference(texts))


@pytest.mark.parametrize("folder", [None, "folder"])
def test_little_memory_makes_small_shards(llm, tmp_path, monkeypatch, folder):
    monkeypatch.setattr("sklearn_relish.states.retention.SMALL_BYTES", 3 * 2**19)
    monkeypatch.setitem(TOKEN_BUDGET, "cpu", 64)
    texts = [f"text number {i} " + "and more " * (i % 20) for i in range(350)]
    states = fetch(StateStore(folder and tmp_path / folder, max_memory=4 * 2**20), texts, llm)
    least = 2**20 if folder is None else 3 * 2**19
    assert n_tokens(texts) * SIZE * 4 > 2 * least
    sizes = [array.nbytes for array in states.arrays]
    assert least <= max(sizes) < least + 2**18


@pytest.mark.parametrize("folder", [None, "file"])
def test_states_that_fit_nowhere_are_dropped_and_read_again(llm, tmp_path, monkeypatch, folder):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    monkeypatch.setattr("sklearn_relish.states.temporary._made", {})
    monkeypatch.setitem(TOKEN_BUDGET, "cpu", 64)
    if folder is not None:  # its folder can't be written either
        folder = tmp_path / folder
        folder.write_text("no folder")
    store = StateStore(folder, max_memory=10_000)
    for texts in (TEXTS, TEXTS[::-1]):
        with pytest.warns(UserWarning, match="could not be written to") as caught:
            assert same(fetch(store, texts, llm), reference(texts))
        (said,) = [str(w.message) for w in caught if "/nowhere" in str(w.message)]
        assert "states beyond max_memory=10000 are dropped" in said
        assert len(caught) == 1 + (folder is not None)
        new = ["new one", "new two"]
        assert same(streamed(store, new, llm), reference(new))
        assert kept_in_memory(store) <= store.max_memory
        assert not store._contents.calls
    assert store.misses > len(TEXTS)


@pytest.mark.parametrize("on_disk", [False, True])
def test_predictions_do_not_grow_memory_or_files(llm, tmp_path, on_disk):
    store = StateStore(tmp_path / "states" if on_disk else None, max_memory=200_000)
    fetch(store, TEXTS, llm)
    contents, files = store._contents, sorted(tmp_path.rglob("*"))
    (index,) = contents.indexes.values()
    for i in range(20):
        texts = [f"{i} {j}" for j in range(100)]
        assert len(streamed(store, texts, llm)) == 100
        assert contents.recent.n_bytes <= store.max_memory / 4
        assert kept_in_memory(store) <= store.max_memory
        assert len(contents.recent) < 100
        assert len(index.entries) == len(TEXTS)
        assert not contents.reserved
        assert not contents.calls
    assert sorted(tmp_path.rglob("*")) == files
    before = llm.tokens_read
    last = max(contents.recent._entries)
    assert contents.recent.get(last)
    streamed(store, texts, llm)
    assert llm.tokens_read < before + n_tokens(texts)  # the last ones are remembered


def test_a_stream_holds_a_piece_at_a_time(llm, monkeypatch):
    monkeypatch.setattr("sklearn_relish.states.reading.STREAM_TEXTS", 4)
    monkeypatch.setitem(TOKEN_BUDGET, "cpu", 64)
    store = StateStore(max_memory=0)
    pieces = list(store.stream(TEXTS, llm, layer=2, max_length=512))
    assert len(pieces) >= 4
    assert max(len(rows) for rows, _ in pieces) < 10
    assert sorted(row for rows, _ in pieces for row in rows) == list(range(len(TEXTS)))


@pytest.mark.parametrize("n_repeats", [1, 3])
def test_a_stream_has_the_keys_of_a_block_of_texts_at_a_time(llm, monkeypatch, n_repeats):
    monkeypatch.setattr("sklearn_relish.states.store.BLOCK_TEXTS", 6)
    blocks = []
    stream = Reading.stream
    monkeypatch.setattr(
        Reading,
        "stream",
        lambda self, texts, layer: blocks.append(len(texts)) or stream(self, texts, layer),
    )
    texts = [f"text {i * i}" for i in range(20)] * n_repeats
    store = StateStore(max_memory=0)
    assert same(streamed(store, texts, llm), reference(texts))
    assert blocks == ([6, 6, 6, 2] if n_repeats == 1 else [2] * 10)
    assert llm.tokens_read == n_tokens(texts[:20])


def test_a_text_on_the_border_of_two_blocks(llm, monkeypatch):
    monkeypatch.setattr("sklearn_relish.states.store.BLOCK_TEXTS", 4)
    texts = ["a", "b", "c", "a", "a", "a", "b", "a", "x" * 600]
    store = StateStore(max_memory=0)
    with pytest.warns(UserWarning, match="1 of 9 texts .* the longest has 600") as caught:
        states = streamed(store, texts, llm)
    assert len(caught) == 1
    assert [len(state) for state in states] == [1, 1, 1, 1, 1, 1, 1, 1, 512]
    assert store.misses == 4 + 1  # "a" is in two blocks


def test_only_the_indexes_of_recent_folders_stay_in_memory(llm, tmp_path):
    for i in range(20):
        fetch(StateStore(tmp_path / str(i)), ["text"], llm)
    cached = sklearn_relish.states.contents._cached
    assert list(cached) == [tmp_path / str(i) for i in range(4, 20)]
    shutil.rmtree(tmp_path)
    fetch(StateStore(tmp_path / "new"), ["text"], llm)
    assert list(cached) == [tmp_path / "new"]


def test_recent_states_leave_room_for_kept_ones(llm):
    store = StateStore(max_memory=2**20)
    streamed(store, [f"predicted text {i}" for i in range(200)], llm)
    recent_bytes = store._contents.recent.n_bytes
    assert recent_bytes > 0.2 * store.max_memory  # up to a quarter
    kept = [f"a text that is longer and kept {i}" for i in range(220)]
    fetch(store, kept, llm)
    assert n_tokens(kept) * SIZE * 4 > store.max_memory - recent_bytes
    assert kept_in_memory(store) <= store.max_memory

import errno
import os
import pickle
import shutil
import signal
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from joblib import Memory
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.base import clone
from tiny import SIZE, tiny_model

import sklearn_relish.states.contents
import sklearn_relish.states.index
import sklearn_relish.states.reading
import sklearn_relish.states.retention
from sklearn_relish import FrozenLLM, LLMEncoder, StateStore
from sklearn_relish.llm.frozen import TOKEN_BUDGET
from sklearn_relish.states.shard import Shard
from sklearn_relish.states.temporary import temporary_folder

TEXTS = [f"text number {i}" + " more" * (i % 7) for i in range(20)]


class CountingLLM(FrozenLLM):
    """Remembers how many tokens of texts went through it."""

    tokens_read = 0

    def _start_pass(self, tokens, layers):
        started = super()._start_pass(tokens, layers)
        self.tokens_read += sum(map(len, tokens))
        return started


@pytest.fixture
def llm():
    return CountingLLM(tiny_model(), device="cpu", dtype="float32")


def n_tokens(texts):
    return sum(len(text) for text in texts)  # the tiny model reads bytes


def fetch(store, texts, llm, layer=2, max_length=512):
    return store.fetch(texts, llm, layer=layer, max_length=max_length, progress=False)


def streamed(store, texts, llm):
    """The states that `stream` gives, by row; each row is given once."""
    states = {}
    for rows, piece in store.stream(texts, llm, layer=2, max_length=512):
        assert rows.dtype == np.int64
        assert not states.keys() & set(rows.tolist())
        states |= zip(rows.tolist(), piece, strict=True)
    return [states[row] for row in range(len(texts))]


def forget():
    """Leave what is on disk alone: what another process would find."""
    sklearn_relish.states.contents._cached.clear()


def reference(texts):
    """States of texts, read in one go and kept nowhere."""
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    states = {}
    for rows, (batch,), _ in llm.read(list(texts), layers=[2], max_length=512):
        states |= dict(zip(rows.tolist(), batch, strict=True))
    return [states[row] for row in range(len(texts))]


def same(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


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


def test_one_pass_gives_the_states_of_other_layers_too(llm, tmp_path):
    store = StateStore(tmp_path)
    settings = {"max_length": 512, "progress": False}
    fetched = store.fetch(TEXTS, llm, layer=3, also=[1, 2], **settings)
    assert llm.tokens_read == n_tokens(TEXTS)
    assert same(fetch(store, TEXTS, llm, layer=2), reference(TEXTS))
    assert same(fetched, fetch(StateStore(), TEXTS, llm, layer=3))
    before = llm.tokens_read
    assert same(fetch(store, TEXTS, llm, layer=1), fetch(StateStore(), TEXTS, llm, layer=1))
    assert llm.tokens_read == before + n_tokens(TEXTS)  # those of the store beside it
    assert sorted(row["layer"] for row in store.info()) == [1, 2, 3]


@pytest.mark.parametrize("on_disk", [False, True])
def test_states_that_are_kept_along_are_not_kept_twice(llm, tmp_path, on_disk):
    store = StateStore(tmp_path if on_disk else None)
    fetch(store, TEXTS, llm, layer=2)
    (before,) = store.info()
    forget()
    settings = {"max_length": 512, "progress": False}
    store = StateStore(tmp_path if on_disk else None)
    fetch(store, TEXTS, llm, layer=2)
    store.fetch(TEXTS, llm, layer=3, also=[2], **settings)
    assert {row["layer"]: row["n_bytes"] for row in store.info()} == {
        2: before["n_bytes"],
        3: before["n_bytes"],
    }


def test_states_that_are_kept_along_are_not_the_first_to_go(llm, tmp_path):
    n_bytes = sum(map(len, TEXTS)) * 32 * 4
    store = StateStore(tmp_path, max_bytes=2.5 * n_bytes)
    fetch(store, [f"older {text}" for text in TEXTS], llm, layer=1)
    store.fetch(TEXTS, llm, layer=3, also=[2], max_length=512, progress=False)
    before = llm.tokens_read
    fetch(store, TEXTS, llm, layer=2)
    assert llm.tokens_read == before


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
    forward, calls = llm._start_pass, []

    def interrupted(tokens, layers):
        calls.append(tokens)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(tokens, layers)

    monkeypatch.setattr(llm, "_start_pass", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(StateStore(tmp_path), TEXTS, llm)
    kept = llm.tokens_read
    assert kept > 0
    fetch(StateStore(tmp_path), TEXTS, llm)
    assert llm.tokens_read == n_tokens(TEXTS)


def test_states_are_kept_in_shards_of_bounded_size(llm, tmp_path, monkeypatch):
    monkeypatch.setattr("sklearn_relish.states.retention.SHARD_BYTES", 10_000)
    monkeypatch.setitem(TOKEN_BUDGET, "cpu", 64)
    first = fetch(StateStore(tmp_path), TEXTS, llm)
    shards = list(tmp_path.rglob("*.safetensors"))
    assert len(shards) > 3
    assert sum(len(load_file(shard)["lengths"]) for shard in shards) == len(TEXTS)
    assert same(fetch(StateStore(tmp_path), TEXTS[::-1], llm), first[torch.arange(19, -1, -1)])


def rewrite(path, change):
    """Change a file's bytes; a new file takes its place, for the old one may be mapped."""
    data = bytearray(path.read_bytes())
    changed = change(data)
    path.unlink()
    path.write_bytes(data if changed is None else changed)


def flip(place):
    def change(data):
        data[place(data)] ^= 1

    return change


def header(data):
    return int.from_bytes(data[:8], "little")


DAMAGES = {
    "cut short": lambda data: data[:-100],
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "foreign": lambda data: b"not a shard" * 100,
    "header's length": flip(lambda data: 1),
    "header": flip(lambda data: 8 + header(data) // 2),
    "metadata": flip(lambda data: bytes(data).index(b"_checksum") + 15),
    "label": flip(lambda data: bytes(data).index(b"max_length") + 14),
    "lengths": flip(lambda data: 8 + header(data) + 100),
    "states": flip(lambda data: (8 + header(data) + len(data)) // 2),
    "keys": flip(lambda data: len(data) - 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_said_and_its_texts_are_read_again(llm, tmp_path, damage):
    first = fetch(StateStore(tmp_path), TEXTS, llm)
    (shard,) = tmp_path.rglob("*.safetensors")
    rewrite(shard, DAMAGES[damage])
    forget()
    with pytest.warns(UserWarning, match="1 damaged files .* read again by the model") as caught:
        again = fetch(StateStore(tmp_path), TEXTS, llm)
    assert len(caught) == 1
    assert same(again, first)
    assert llm.tokens_read == 2 * n_tokens(TEXTS)
    assert not shard.exists()
    forget()
    assert same(fetch(StateStore(tmp_path), TEXTS, llm), first)  # and no warning
    assert llm.tokens_read == 2 * n_tokens(TEXTS)


def test_damaged_claims_and_unfinished_files_are_as_good_as_absent(llm, tmp_path):
    first = fetch(StateStore(tmp_path), TEXTS[:10], llm)
    (shard,) = tmp_path.rglob("*.safetensors")
    (shard.parent / "leases" / "0.lease").write_bytes(b"odd")
    partial = shard.parent / f".{'0' * 32}.partial"
    partial.mkdir()
    (partial / f"{'0' * 32}.safetensors").write_bytes(shard.read_bytes()[:99])
    forget()
    again = fetch(StateStore(tmp_path), TEXTS, llm)
    assert same(again[torch.arange(10)], first)
    assert llm.tokens_read == n_tokens(TEXTS)
    assert not list(tmp_path.rglob("*.lease"))


def test_whoever_may_use_the_folder_may_use_its_files(llm, tmp_path):
    before = os.umask(0o002)
    try:
        fetch(StateStore(tmp_path / "shared"), TEXTS, llm)
    finally:
        os.umask(before)
    (file,) = tmp_path.glob("shared/*/*/*.safetensors")
    assert file.stat().st_mode & 0o777 == 0o664


def test_other_files_in_the_folder_are_left_alone(llm, tmp_path):
    theirs = tmp_path / "models" / "mine" / "model.safetensors"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"precious")
    (tmp_path / ("0" * 32) / "layer2-of-mine").mkdir(parents=True)
    store = StateStore(tmp_path)
    fetch(store, TEXTS, llm)
    assert len(store.info()) == 1
    store.clear()
    assert theirs.read_bytes() == b"precious"
    assert list(tmp_path.rglob("*.safetensors")) == [theirs]


def test_nothing_in_the_folder_is_unpickled(llm, tmp_path, monkeypatch):
    fetch(StateStore(tmp_path), TEXTS, llm)
    (shard,) = tmp_path.rglob("*.safetensors")
    for suffix in (".pkl", ".pt", ".joblib", ".safetensors"):
        shard.with_name("f" * 32 + suffix).write_bytes(pickle.dumps(Bomb()))
    forget()
    with pytest.warns(UserWarning, match="1 damaged files"):
        fetch(StateStore(tmp_path), TEXTS, llm)
    StateStore(tmp_path).info()
    assert llm.tokens_read == n_tokens(TEXTS)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was read",)


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


def test_beyond_its_budget_memory_goes_to_a_temporary_folder(llm, monkeypatch):
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


def test_many_small_files_become_few(llm, tmp_path):
    store = StateStore(tmp_path)
    texts = [f"question {i}" for i in range(200)]
    for text in texts:
        fetch(store, [text], llm)
    assert len(list(tmp_path.rglob("*.safetensors"))) < 45
    (row,) = store.info()
    assert row["n_texts"] == 200
    forget()
    alone = StateStore()
    assert same(fetch(StateStore(tmp_path), texts, llm), fetch(alone, texts, llm))
    assert (store.hits, store.misses) == (200, 0)


def test_damage_is_not_merged_into_a_sound_file(llm, tmp_path):
    texts = [f"question {i}" for i in range(31)]
    for text in texts:
        fetch(StateStore(tmp_path), [text], llm)
    damaged = sorted(tmp_path.rglob("*.safetensors"))[7]
    rewrite(damaged, DAMAGES["states"])
    forget()
    fetch(StateStore(tmp_path), ["one more"], llm)  # enough to merge
    assert damaged.exists()
    before = llm.tokens_read
    with pytest.warns(UserWarning, match="1 damaged files"):
        fetch(StateStore(tmp_path), texts, llm)
    assert llm.tokens_read - before in {len(text) for text in texts}


def test_a_bound_removes_what_was_used_least_recently(llm, tmp_path):
    size = len("text a") * SIZE * 4
    store = StateStore(tmp_path, max_bytes=3 * size)
    for i, text in enumerate(["text a", "text b", "text c", "text a", "text d"]):
        fetch(store, [text], llm)
        for file in tmp_path.rglob("*.safetensors"):  # as if some time went by
            stat = file.stat()
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns - 10**9))
        assert store.info()[0]["n_bytes"] == min(3, i + 1) * size
    before = llm.tokens_read
    fetch(store, ["text a", "text c", "text d"], llm)
    assert llm.tokens_read == before
    fetch(store, ["text b"], llm)
    assert llm.tokens_read == before + len("text b")
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors")) < 5 * size


def test_a_bound_holds_in_memory_too(llm):
    size = len("text a") * SIZE * 4
    store = StateStore(max_bytes=2 * size)
    for text in ("text a", "text b", "text a", "text c"):
        fetch(store, [text], llm)
    assert store.misses == 3
    fetch(store, ["text a", "text c"], llm)
    assert store.misses == 3
    assert store.info()[0]["n_bytes"] == 2 * size


def test_a_call_larger_than_the_bound_gets_all_its_states(llm, tmp_path):
    store = StateStore(tmp_path, max_bytes=1000)
    with pytest.warns(UserWarning, match="bound of 1000 bytes is less than one call's"):
        states = fetch(store, TEXTS, llm)
    assert same(states, fetch(StateStore(), TEXTS, llm))
    assert store.info() == []


def test_one_budget_for_all_models_in_memory(llm):
    store = StateStore(max_memory=10 * len("question 1") * SIZE * 4)
    fetch(store, [f"question {i}" for i in range(10)], llm)
    for i in range(100):
        fetch(store, [f"question {i % 10}{i // 10}"], llm, layer=1)
    indexes = store._contents.indexes.values()
    assert sum(index.memory_bytes for index in indexes) <= store.max_memory
    n_files = len({shard.path for index in indexes for shard in index.shards})
    assert n_files < 20


def test_single_texts_in_memory_are_gathered(llm):
    texts = [f"question {i}" for i in range(200)]
    for text in texts:
        fetch(StateStore(), [text], llm)
    (index,) = StateStore()._contents.indexes.values()
    assert len(index.shards) < 70
    assert index.memory_bytes == index.n_bytes == n_tokens(texts) * SIZE * 4
    assert same(fetch(StateStore(), texts, llm), reference(texts))


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
        assert list(store.stream(["new one", "new two"], llm, layer=2, max_length=512))
        assert kept_in_memory(store) <= store.max_memory
        assert not store._contents.calls
    assert store.misses > len(TEXTS)


def kept_in_memory(store):
    contents = store._contents
    indexes = contents.indexes.values()
    held = sum(s.n_bytes for index in indexes for s in index.shards if s.path is None)
    assert held == contents.memory_bytes
    return held + contents.recent.n_bytes


def test_what_another_process_removes_is_gone_here_too(llm, tmp_path):
    store = StateStore(tmp_path)
    states = fetch(store, TEXTS, llm)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    assert store.info() == []
    assert same(states, reference(TEXTS))  # what was fetched stays
    fetch(store, TEXTS, llm)
    assert llm.tokens_read == 2 * n_tokens(TEXTS)
    assert store.info()[0]["n_texts"] == len(TEXTS)


def test_texts_that_lie_twice_are_counted_once_and_all_cleared(llm, tmp_path):
    fetch(StateStore(tmp_path), TEXTS, llm)
    (file,) = tmp_path.rglob("*.safetensors")
    for name in ("0", "f"):  # as a process leaves it that is killed while it merges
        file.with_name(f"{name * 32}.safetensors").write_bytes(file.read_bytes())
    forget()
    store = StateStore(tmp_path)
    assert store.info()[0]["n_texts"] == len(TEXTS)
    assert same(fetch(store, TEXTS, llm), reference(TEXTS))
    store.clear()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_text_that_lies_twice_is_found_when_one_file_goes(llm, tmp_path):
    store = StateStore(tmp_path)
    fetch(store, TEXTS, llm)
    (file,) = tmp_path.rglob("*.safetensors")
    other = file.with_name(f"{'f' * 32}.safetensors")  # looked at after the first one
    other.write_bytes(file.read_bytes())
    assert store.info()[0]["n_texts"] == len(TEXTS)
    other.unlink()
    for i in range(40):  # enough to merge
        fetch(store, [f"question {i}"], llm)
    before = llm.tokens_read
    assert same(fetch(store, TEXTS, llm), reference(TEXTS))
    forget()
    assert same(fetch(store, TEXTS, llm), reference(TEXTS))
    assert llm.tokens_read == before


def test_a_file_that_takes_anothers_place_is_checked_too(llm, tmp_path, monkeypatch):
    store = StateStore(tmp_path)
    fetch(store, TEXTS[:10], llm)
    (file,) = tmp_path.rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    DAMAGES["states"](data)
    read = llm.read

    def meanwhile(*args, **kwargs):
        if data:
            file.with_name(f"{'f' * 32}.safetensors").write_bytes(data)
            data.clear()
        yield from read(*args, **kwargs)

    monkeypatch.setattr(llm, "read", meanwhile)
    with pytest.warns(UserWarning, match="1 damaged files"):
        states = fetch(store, TEXTS, llm)
    assert same(states, reference(TEXTS))


def test_a_file_that_goes_while_it_is_opened_is_no_trouble(llm, tmp_path, monkeypatch):
    fetch(StateStore(tmp_path), TEXTS, llm)
    forget()

    def gone(path, framework):
        Path(path).unlink()
        return safe_open(path, framework)

    monkeypatch.setattr("sklearn_relish.states.shard.safe_open", gone)
    store = StateStore(tmp_path)
    assert store.info() == []
    monkeypatch.undo()
    assert same(fetch(store, TEXTS, llm), reference(TEXTS))


def test_a_folder_without_locks_serves_too(llm, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="Unix alone has flock")

    def no_locks(fd, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for i in range(40):  # enough to merge, which must not be done
        fetch(StateStore(tmp_path), [f"question {i}"], llm)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 40
    assert same(fetch(StateStore(tmp_path), TEXTS, llm), reference(TEXTS))
    forget()
    before = llm.tokens_read
    assert same(fetch(StateStore(tmp_path), TEXTS, llm), reference(TEXTS))
    assert llm.tokens_read == before


def test_unfinished_files_are_removed_in_time(llm, tmp_path):
    fetch(StateStore(tmp_path), TEXTS, llm)
    (file,) = tmp_path.rglob("*.safetensors")
    old, new = (file.with_name(f".{letter * 32}.partial") for letter in "ab")
    for partial in (old, new):
        partial.mkdir()
        (partial / ".tmp").write_bytes(b"unfinished")
    os.utime(old, (1e9, 1e9))
    for i in range(40):
        fetch(StateStore(tmp_path), [f"question {i}"], llm)
    assert not old.exists()
    assert new.exists()


def test_a_thread_finds_states_while_another_reads(llm, tmp_path, monkeypatch):
    store = StateStore(tmp_path)
    fetch(store, TEXTS[:10], llm)
    forward, reading, found = llm._start_pass, threading.Event(), threading.Event()

    def slow(tokens, layers):
        reading.set()
        assert found.wait(30)
        return forward(tokens, layers)

    monkeypatch.setattr(llm, "_start_pass", slow)
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(fetch, store, TEXTS[10:], llm) for _ in range(2)]
        assert reading.wait(30)
        assert same(fetch(store, TEXTS[:10], llm), reference(TEXTS[:10]))
        found.set()
        assert all(same(other.result(), reference(TEXTS[10:])) for other in others)
    assert llm.tokens_read == n_tokens(TEXTS)


@pytest.mark.parametrize("how", ["fetch", "stream"])
def test_waiting_for_another_process_ends_when_it_lets_go(llm, tmp_path, monkeypatch, how):
    monkeypatch.setattr("sklearn_relish.states.reading.POLL_SECONDS", 1e-4)
    monkeypatch.setattr(
        "sklearn_relish.states.reading.PATIENCE_SECONDS", 0.0
    )  # any wait is a long one
    store = StateStore(tmp_path)
    fetch(store, TEXTS[:1], llm)
    (index,) = store._contents.indexes.values()
    name = next(iter(store._contents.indexes))
    claimed = {sklearn_relish.states.index.text_key(name, text) for text in TEXTS}
    looks = []

    def leased(collection):
        looks.append(1)
        return claimed if len(looks) < 20 else set()

    monkeypatch.setattr(index.backend, "leased", leased)
    read = {"fetch": fetch, "stream": streamed}[how]
    with pytest.warns(UserWarning, match="Another process has been reading") as caught:
        states = read(store, TEXTS, llm)
    assert same(states, reference(TEXTS))
    assert len(caught) == 1
    assert len(looks) == 20


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
    forget()
    fetch(store, TEXTS, llm)
    assert llm.tokens_read == (1 if on_disk else 2) * n_tokens(TEXTS)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_service_stays_as_large_as_it_is(llm, tmp_path, on_disk):
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


def test_a_stream_counts_cut_texts_in_one_warning(llm, monkeypatch):
    monkeypatch.setattr("sklearn_relish.states.reading.STREAM_TEXTS", 1)
    texts = ["short", "x" * 600, "y" * 550, "x" * 600]
    with pytest.warns(UserWarning, match="3 of 4 texts .* the longest has 600") as caught:
        streamed(StateStore(), texts, llm)
    assert len(caught) == 1


@pytest.mark.parametrize("how", [fetch, streamed])
def test_a_thread_does_not_wait_for_other_texts_of_another(llm, tmp_path, monkeypatch, how):
    store = StateStore(tmp_path)
    forward, reading, go = llm._start_pass, threading.Event(), threading.Event()

    def slow(tokens, layers):
        if threading.current_thread() is not threading.main_thread():
            reading.set()
            assert go.wait(60)
        return forward(tokens, layers)

    monkeypatch.setattr(llm, "_start_pass", slow)
    with ThreadPoolExecutor() as pool:
        other = pool.submit(fetch, store, TEXTS[10:], llm)
        try:
            assert reading.wait(60)
            assert same(how(store, TEXTS[:10], llm), reference(TEXTS[:10]))
            assert not other.done()
        finally:
            go.set()
        assert same(other.result(), reference(TEXTS[10:]))
    assert llm.tokens_read == n_tokens(TEXTS)


def test_threads_that_want_the_same_texts_share_the_reading(llm, tmp_path, monkeypatch):
    monkeypatch.setattr("sklearn_relish.states.reading.PIECE_TEXTS", 3)
    monkeypatch.setattr("sklearn_relish.states.reading.PIECE_SECONDS", 0.0)
    store = StateStore()
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(how, store, TEXTS, llm) for how in (fetch, streamed) * 3]
        assert all(same(job.result(60), reference(TEXTS)) for job in jobs)
    assert llm.tokens_read == n_tokens(TEXTS)


def test_a_stream_that_is_left_alone_keeps_no_other_thread_waiting(llm, monkeypatch):
    monkeypatch.setattr("sklearn_relish.states.reading.STREAM_TEXTS", 1)
    monkeypatch.setitem(TOKEN_BUDGET, "cpu", 64)
    store = StateStore()
    stream = store.stream(TEXTS, llm, layer=2, max_length=512)
    next(stream)
    with ThreadPoolExecutor() as pool:
        assert same(pool.submit(fetch, store, TEXTS, llm).result(60), reference(TEXTS))
    stream.close()
    assert not store._contents.reserved


def crafted(shard, change):
    """Write a shard anew, with checksums that agree."""
    made = Shard.open(shard)
    change(made)
    shard.unlink()
    made.save(shard)


def set_lengths(made):
    made.lengths = made.lengths.clone()
    made.lengths[:3] = torch.tensor([2**62, 2**62, 2**62])


CRAFTED = {
    "width": lambda made: setattr(made, "states", made.states[:, :-1].contiguous()),
    "dtype": lambda made: setattr(made, "states", made.states.half()),
    "lengths": set_lengths,
    "not finite": lambda made: setattr(made, "states", made.states / 0),
    "zeros": lambda made: setattr(made, "states", made.states * 0),
    "layer": lambda made: made.label.update(layer="no number"),
    "max_length": lambda made: made.label.update(max_length="9"),
}


@pytest.mark.parametrize("what", CRAFTED)
@pytest.mark.parametrize("how", [fetch, streamed])
def test_a_crafted_file_counts_as_damaged(llm, tmp_path, monkeypatch, what, how):
    fetch(StateStore(tmp_path), TEXTS, llm)
    (shard,) = tmp_path.rglob("*.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("sklearn_relish.states.shard._fits", lambda *args, **kwargs: True)
        crafted(shard, CRAFTED[what])
    forget()
    with pytest.warns(UserWarning, match="1 damaged files") as caught:
        states = how(StateStore(tmp_path), TEXTS, llm)
    assert len(caught) == 1
    assert same(states, reference(TEXTS))
    assert not shard.exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize("what", ["pipe", "link", "sparse", "folder"])
def test_what_is_no_file_is_neither_followed_nor_waited_for(llm, tmp_path, what):
    store = StateStore(tmp_path / "states")
    fetch(store, TEXTS[:5], llm)
    (shard,) = tmp_path.rglob("*.safetensors")
    precious = tmp_path / "precious"
    precious.write_bytes(shard.read_bytes())
    odd = shard.with_name("f" * 32 + ".safetensors")
    if what == "pipe":
        os.mkfifo(odd)
    elif what == "link":
        odd.symlink_to(precious)
    elif what == "folder":
        odd.mkdir()
    else:
        with odd.open("wb") as file:
            file.truncate(2**40)
    with pytest.warns(UserWarning, match="1 damaged files"):
        assert same(fetch(store, TEXTS, llm), reference(TEXTS))
    assert llm.tokens_read == n_tokens(TEXTS)
    store.clear()
    assert precious.exists()


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
@pytest.mark.parametrize("depth", ["model", "layer", "leases"])
def test_a_linked_folder_inside_the_store_is_left_alone(llm, tmp_path, depth):
    fetch(StateStore(tmp_path / "states"), TEXTS, llm)
    (shard,) = tmp_path.rglob("*.safetensors")
    place = {"model": shard.parent.parent, "layer": shard.parent}.get(depth)
    place = shard.parent / "leases" if place is None else place
    outside = tmp_path / "outside"
    place.rename(outside)
    (outside / "0.lease").write_bytes(b"theirs")
    place.symlink_to(outside)
    files = sorted(outside.rglob("*"))
    forget()
    store = StateStore(tmp_path / "states")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert same(fetch(store, [*TEXTS, "new"], llm), reference([*TEXTS, "new"]))
        streamed(store, ["other"], llm)
        store.clear()
    assert sorted(outside.rglob("*")) == files
    said = [str(warning.message) for warning in caught]
    assert any("symbolic link" in message for message in said) == (depth != "leases")


def test_the_indexes_of_few_folders_are_remembered(llm, tmp_path):
    for i in range(20):
        fetch(StateStore(tmp_path / str(i)), ["text"], llm)
    known = sklearn_relish.states.contents._cached
    assert list(known) == [tmp_path / str(i) for i in range(4, 20)]
    shutil.rmtree(tmp_path)
    fetch(StateStore(tmp_path / "new"), ["text"], llm)
    assert list(known) == [tmp_path / "new"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("locked", [False, True])
def test_a_forked_child_does_not_wait_for_its_parents_threads(llm, tmp_path, locked):
    store = StateStore(tmp_path / "states")
    fetch(store, TEXTS[:10], llm)
    contents = store._contents
    held, go = threading.Event(), threading.Event()

    def hold():
        with ExitStack() as stack:
            if locked:
                for lock in (
                    contents.spill_lock,
                    contents.lock,
                    sklearn_relish.states.contents._cached_lock,
                    sklearn_relish.states.temporary._lock,
                ):
                    stack.enter_context(lock)
            contents.reserved.add(sklearn_relish.states.index.text_key(*missing))
            held.set()
            go.wait(60)

    missing = next(iter(contents.indexes)), TEXTS[10]
    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(60)
        child = os.fork()
        if child == 0:  # the model is the parent's: what is tested is the store
            failed = True
            try:
                signal.alarm(60)
                entries = store._contents.indexes
                assert bool(entries) != locked  # it may have been left half changed
                assert not store._contents.reserved
                assert len(store.info()) == 1
                temporary_folder()
                with store._contents.changed, store._contents.spill_lock:
                    failed = False
            finally:
                os._exit(failed)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        go.set()
        thread.join()


@pytest.mark.parametrize("how", ["info", "clear", "fetch"])
def test_a_folder_that_cannot_be_read_is_said(llm, tmp_path, monkeypatch, how):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    store = StateStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("sklearn_relish.states.store.os.scandir", denied)
        if how == "fetch":
            with pytest.warns(UserWarning, match="can't be read .*Pass the path") as caught:
                states = fetch(store, TEXTS, llm)
            assert len(caught) == 1
            assert same(states, reference(TEXTS))
        else:
            with pytest.raises(PermissionError, match=r"can't be read .*Pass the path"):
                getattr(store, how)()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"folder": "~nobody-of-this-name/x"}, "has no meaning here.*Pass the folder's full path"),
        ({"max_memory": -1}, "max_memory must be a number of bytes, 0 or more, got -1"),
        ({"max_bytes": "50GB"}, "max_bytes must be a number of bytes, 0 or more, got '50GB'"),
        ({"folder": ""}, "empty name"),
        ({"bits": 4}, "bits must be 8, or None for the model's own dtype, got 4"),
    ],
)
def test_what_is_no_store_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StateStore(**arguments)


def test_eight_bits_take_half_the_bytes_of_sixteen(tmp_path):
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="bfloat16")
    store, small = StateStore(tmp_path), StateStore(tmp_path, bits=8)
    exact, packed = fetch(store, TEXTS, llm), fetch(small, TEXTS, llm)
    assert small.misses == 2 * len(TEXTS)
    sizes = {row["dtype"]: row["n_bytes"] for row in store.info()}
    n_values = n_tokens(TEXTS) * SIZE
    assert sizes == {"bfloat16": 2 * n_values, "bfloat16-8bit": n_values + 4 * n_tokens(TEXTS)}
    rows = torch.tensor([3, 1, 3])
    (one, mask), (other, same_mask) = exact.batch(rows), packed.batch(rows)
    assert torch.equal(mask, same_mask)
    assert one.dtype == other.dtype
    assert torch.allclose(one.float(), other.float(), rtol=2**-4, atol=2**-9)
    for text, states in zip(packed, fetch(small, TEXTS, llm), strict=True):
        assert text.shape[1] == SIZE
        assert torch.equal(text, states)
    encoder = LLMEncoder(llm, layer=2, memory=small)
    pooled = [encoder.set_params(memory=m).fit_transform(TEXTS) for m in (small, store)]
    np.testing.assert_allclose(*pooled, atol=0.1)


def test_what_a_store_holds_is_told_and_removed_by_model(llm, tmp_path):
    store = StateStore(tmp_path)
    other = FrozenLLM(tiny_model("gpt2"), device="cpu", dtype="float32")
    fetch(store, TEXTS, llm)
    fetch(store, TEXTS, llm, layer=1)
    fetch(store, TEXTS[:3], other)
    fetch(store, TEXTS, llm)
    assert (store.hits, store.misses) == (20, 43)
    forget()
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


def test_all_stores_of_a_folder_share_what_they_know(llm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fetch(StateStore("states"), TEXTS, llm)
    for store in (StateStore(tmp_path / "states"), clone(StateStore("states"), safe=False)):
        assert (store.hits, store.misses) == (0, 20)
    assert (StateStore().hits, StateStore().misses) == (0, 0)
    assert StateStore(Memory("cache", verbose=0)).folder == tmp_path / "cache/sklearn_relish"
    assert StateStore(Memory(None)).folder is None
    store = pickle.loads(pickle.dumps(StateStore("states", max_bytes=10)))
    assert repr(store) == f"StateStore({str(tmp_path / 'states')!r}, max_bytes=10)"

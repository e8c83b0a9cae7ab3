"""One store under several threads, with and without locks, and after a fork."""

import errno
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from store_helpers import (
    TEXTS,
    fetch,
    forget_indexes,
    n_tokens,
    reference,
    same,
    streamed,
)

import sklearn_relish.states.contents
import sklearn_relish.states.index
import sklearn_relish.states.reading
import sklearn_relish.states.retention
from sklearn_relish import StateStore
from sklearn_relish.llm.batching import TOKEN_BUDGET
from sklearn_relish.states.temporary import temporary_folder


def test_a_folder_without_locks_works(llm, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="Unix alone has flock")

    def no_locks(fd, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for i in range(40):  # enough to merge, which must not be done
        fetch(StateStore(tmp_path), [f"question {i}"], llm)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 40
    assert same(fetch(StateStore(tmp_path), TEXTS, llm), reference(TEXTS))
    forget_indexes()
    before = llm.tokens_read
    assert same(fetch(StateStore(tmp_path), TEXTS, llm), reference(TEXTS))
    assert llm.tokens_read == before


def test_a_thread_finds_states_while_another_reads(llm, tmp_path, monkeypatch):
    store = StateStore(tmp_path)
    fetch(store, TEXTS[:10], llm)
    forward, reading, found = llm._read_batch, threading.Event(), threading.Event()

    def slow(tokens, layers):
        reading.set()
        assert found.wait(30)
        return forward(tokens, layers)

    monkeypatch.setattr(llm, "_read_batch", slow)
    with ThreadPoolExecutor() as pool:
        readers = [pool.submit(fetch, store, TEXTS[10:], llm) for _ in range(2)]
        assert reading.wait(30)
        assert same(fetch(store, TEXTS[:10], llm), reference(TEXTS[:10]))
        found.set()
        assert all(same(reader.result(), reference(TEXTS[10:])) for reader in readers)
    assert llm.tokens_read == n_tokens(TEXTS)


@pytest.mark.parametrize("how", ["fetch", "stream"])
def test_waiting_ends_when_another_process_gives_up_its_leases(llm, tmp_path, monkeypatch, how):
    monkeypatch.setattr("sklearn_relish.states.reading.POLL_SECONDS", 1e-4)
    monkeypatch.setattr(
        "sklearn_relish.states.reading.PATIENCE_SECONDS", 0.0
    )  # any wait is a long one
    store = StateStore(tmp_path)
    fetch(store, TEXTS[:1], llm)
    (index,) = store._contents.indexes.values()
    name = next(iter(store._contents.indexes))
    leased_keys = {sklearn_relish.states.index.text_key(name, text) for text in TEXTS}
    checks = []

    def leased(collection):
        checks.append(1)
        return leased_keys if len(checks) < 20 else set()

    monkeypatch.setattr(index.backend, "leased", leased)
    read = {"fetch": fetch, "stream": streamed}[how]
    with pytest.warns(UserWarning, match="Another process has been reading") as caught:
        states = read(store, TEXTS, llm)
    assert same(states, reference(TEXTS))
    assert len(caught) == 1
    assert len(checks) == 20


@pytest.mark.parametrize("how", [fetch, streamed])
def test_a_thread_does_not_wait_for_other_texts_of_another(llm, tmp_path, monkeypatch, how):
    store = StateStore(tmp_path)
    forward, reading, go = llm._read_batch, threading.Event(), threading.Event()

    def slow(tokens, layers):
        if threading.current_thread() is not threading.main_thread():
            reading.set()
            assert go.wait(60)
        return forward(tokens, layers)

    monkeypatch.setattr(llm, "_read_batch", slow)
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


def test_threads_that_want_the_same_texts_each_read_a_part(llm, tmp_path, monkeypatch):
    monkeypatch.setattr("sklearn_relish.states.reading.PIECE_TEXTS", 3)
    monkeypatch.setattr("sklearn_relish.states.reading.PIECE_SECONDS", 0.0)
    store = StateStore()
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(how, store, TEXTS, llm) for how in (fetch, streamed) * 3]
        assert all(same(job.result(60), reference(TEXTS)) for job in jobs)
    assert llm.tokens_read == n_tokens(TEXTS)


def test_an_unfinished_stream_does_not_block_other_threads(llm, monkeypatch):
    monkeypatch.setattr("sklearn_relish.states.reading.STREAM_TEXTS", 1)
    monkeypatch.setitem(TOKEN_BUDGET, "cpu", 64)
    store = StateStore()
    stream = store.stream(TEXTS, llm, layer=2, max_length=512)
    next(stream)
    with ThreadPoolExecutor() as pool:
        assert same(pool.submit(fetch, store, TEXTS, llm).result(60), reference(TEXTS))
    stream.close()
    assert not store._contents.reserved


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("locked", [False, True])
def test_a_forked_child_does_not_wait_for_its_parents_threads(llm, tmp_path, locked, on_disk):
    store = StateStore(tmp_path / "states" if on_disk else None)
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

"""Locks: fair between threads, free in a forked child."""

import multiprocessing
import os
import threading
import time

import pytest
import torch
from tiny import tiny_model

from sklearn_relish import FrozenLLM, RelishRegressor
from sklearn_relish.utils.locks import FairLock, ForkSafeLock, renew_in_forked_child

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def wait_until(condition):
    for _ in range(60_000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("the condition did not become true")


def test_threads_get_the_lock_in_the_order_of_their_requests():
    lock, order = FairLock(), []

    def take(number):
        with lock:
            order.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    with lock:
        for number, thread in enumerate(threads):
            thread.start()
            wait_until(lambda number=number: len(lock._waiting) == number + 1)
    for thread in threads:
        thread.join(60)
    assert order == list(range(8))
    assert not lock._held


def test_only_one_thread_has_the_lock():
    lock, inside, counts = FairLock(), [], []

    def work():
        for _ in range(200):
            with lock:
                inside.append(1)
                time.sleep(0)  # lets another thread run
                counts.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert counts == [1] * 8 * 200


def in_forked_child(function):
    """The result of a function in a forked child, None if the child hangs or dies."""
    receiving, sending = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        try:
            sending.send(function())
        finally:
            os._exit(0)
    sending.close()
    try:
        return receiving.recv() if receiving.poll(120) else None
    except EOFError:
        return None
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@forks
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_locks_are_renewed_in_a_forked_child():
    class Owner:
        lock = threading.Lock()

    owner = Owner()
    renew_in_forked_child(owner, lambda owner: setattr(owner, "lock", threading.Lock()))
    with owner.lock:
        assert in_forked_child(lambda: owner.lock.acquire(timeout=10)) is True


@forks
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_lock_held_by_a_thread_of_the_parent_is_free_in_the_child():
    lock, held, release = ForkSafeLock(), threading.Event(), threading.Event()

    def hold():
        with lock:
            held.set()
            release.wait(60)

    def take():
        with lock:
            return True

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(60)
        assert in_forked_child(take) is True
    finally:
        release.set()
        thread.join(60)


@forks
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_child_forked_from_a_serving_process_predicts():
    """As with gunicorn --preload. Torch has one thread: its threads do not survive a fork."""
    torch.set_num_threads(1)
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    regressor = RelishRegressor(llm, layer=2, latent_size=16, max_epochs=1, random_state=0)
    texts = [f"{word} text number {i}" for i in range(20) for word in ("good", "bad")]
    regressor.fit(texts, [len(text) for text in texts])
    expected = regressor.predict(["a new text"]).tolist()
    stop, serving = threading.Event(), threading.Event()

    def serve():
        for i in range(1_000_000):
            regressor.predict([f"request {i}"])
            serving.set()
            if stop.is_set():
                return

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert serving.wait(60)
        with llm._forward_pass.lock:  # no thread of the child holds it
            found = [in_forked_child(lambda: regressor.predict(["a new text"]).tolist())]
        found += [
            in_forked_child(lambda: regressor.predict(["a new text"]).tolist()) for _ in range(3)
        ]
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert found == [expected] * 4

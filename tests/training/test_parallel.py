"""Trainings at the same time: results, numbers of threads, errors and interruptions."""

import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from test_stacking import fit, linear_examples

from sklearn_relish.training import parallel
from sklearn_relish.training.parallel import max_at_once, run_all
from sklearn_relish.training.trainer import Stopped

CPU = torch.device("cpu")


def test_heads_are_the_same_as_one_after_another(four_threads, monkeypatch):
    examples = linear_examples(80)
    folds = np.array_split(np.arange(80), 5)
    at_once, _ = fit(examples, folds)
    monkeypatch.setattr(parallel, "MAX_PER_THREAD", 0)
    torch.set_num_threads(1)  # as each training has
    alone, _ = fit(examples, folds)
    for weight, expected in zip(at_once.parameters(), alone.parameters(), strict=True):
        assert torch.equal(weight, expected)


def test_tasks_share_the_threads_of_torch(four_threads):
    seen, others = {}, []

    def task(name, stop):
        together.wait()  # all tasks run at the same time
        torch.ones(100_000).sum()
        seen[name] = torch.get_num_threads()
        other = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
        other.start()
        other.join()
        return name

    for n_tasks, expected in ((2, 2), (3, 1), (6, 1)):
        seen.clear()
        together = threading.Barrier(n_tasks)
        tasks = [partial(task, name) for name in range(n_tasks)]
        assert run_all(tasks, CPU) == list(range(n_tasks))
        assert set(seen.values()) == {expected}
        assert torch.get_num_threads() == 4
    assert len(others) == 11
    assert set(others) == {4}  # threads of other code keep the number of the process


def test_one_thread_or_one_task_runs_in_the_calling_thread(four_threads):
    def where(stop):
        return threading.current_thread()

    here = threading.current_thread()
    assert run_all([where], CPU) == [here]
    assert run_all([where, where], CPU, 1) == [here, here]
    assert run_all([where, where], torch.device("meta")) == [here, here]
    assert here not in run_all([where, where], CPU)
    torch.set_num_threads(1)
    assert run_all([where, where], CPU) == [here, here]


def until_stopped(stop):
    if not stop.wait(60):
        raise TimeoutError
    raise Stopped


def test_an_error_stops_the_other_tasks(four_threads):
    def fails(stop):
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"):
        run_all([until_stopped, fails, until_stopped], CPU)


def test_an_interruption_stops_all_tasks(four_threads, monkeypatch):
    begun, ended = threading.Event(), []

    def task(stop):
        begun.set()
        try:
            until_stopped(stop)
        finally:
            ended.append(time.monotonic())

    original = threading.Thread.join

    def interrupted(self, timeout=None):
        monkeypatch.setattr(threading.Thread, "join", original)
        begun.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_all([task, task], CPU)
    assert len(ended) == 2


def test_trainings_beyond_the_memory_run_one_after_another(monkeypatch):
    monkeypatch.setattr("sklearn_relish.training.windows.MIN_MEMORY", 0)
    examples = linear_examples(20)
    n_bytes = examples.states.n_bytes
    assert max_at_once([(examples, None)], n_bytes) is None
    assert max_at_once([(examples, None)], n_bytes - 1) == 1
    assert max_at_once([(examples, None), (examples, examples)], n_bytes) == 1

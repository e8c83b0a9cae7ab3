"""One store under several processes: searches, killed readers, bounded memory."""

import contextlib
import errno
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import joblib
import numpy as np
import processes
import pytest
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError
from processes import (
    LoggedLLM,
    MortalLLM,
    fetch_in_small_pieces,
    fetch_on_a_full_disk,
    passes,
    read_log,
    search_until_stopped,
    small_search,
    spill,
)
from sklearn.model_selection import GridSearchCV, cross_val_score, learning_curve
from tiny import tiny_model

from sklearn_relish import FrozenLLM, RelishRegressor, StateStore
from sklearn_relish.states.temporary import PREFIX, temporary_folder

TEXTS = [f"{word} text number {i}" for i in range(40) for word in ("good", "bad", "fair")]
Y = [{"good": 1.0, "bad": -1.0, "fair": 0.0}[text.split()[0]] for text in TEXTS]
GRID = {"n_iterations": [1, 2], "latent_size": [8, 16]}


def n_tokens(texts):
    return sum(len(text) for text in set(texts))  # the tiny model reads bytes


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log"
    path.touch()
    return str(path)


def make(log, memory):
    return RelishRegressor(
        LoggedLLM(tiny_model(), log),
        memory=memory,
        layer=2,
        latent_size=16,
        max_epochs=1,
        random_state=0,
    )


def search(log, memory, n_jobs):
    GridSearchCV(make(log, memory), GRID, cv=3, n_jobs=n_jobs).fit(TEXTS, Y)


@contextlib.contextmanager
def loky():
    with joblib.parallel_config(backend="loky", n_jobs=2):
        yield


@contextlib.contextmanager
def dask():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        yield


@pytest.mark.parametrize("memory", [None, "folder"])
def test_a_search_reads_each_text_once_and_later_searches_read_none(log, tmp_path, memory):
    memory = memory and str(tmp_path / "states")
    search(log, memory, n_jobs=None)
    assert read_log(log)[0] == n_tokens(TEXTS)
    search(log, memory, n_jobs=None)
    cross_val_score(make(log, memory), TEXTS[::-1], Y[::-1], cv=4)
    learning_curve(make(log, memory), TEXTS, Y, cv=3, shuffle=True, random_state=0)
    make(log, memory).set_params(learning_rate=1e-3, share_weights=True).fit(TEXTS, Y)
    assert read_log(log)[0] == n_tokens(TEXTS)
    make(log, memory).fit([*TEXTS, "new", "new"], [*Y, 0.0, 0.0])
    assert read_log(log)[0] == n_tokens([*TEXTS, "new"])


@pytest.mark.parametrize("backend", [loky, dask])
def test_processes_share_what_they_read_and_load_nothing_when_all_is_read(log, tmp_path, backend):
    memory = str(tmp_path / "states")
    with backend():
        search(log, memory, n_jobs=2)
        tokens, loaded = read_log(log)
        # A process that predicts texts before any has read them for a fit reads them for itself.
        assert n_tokens(TEXTS) <= tokens <= 2 * n_tokens(TEXTS)
        assert str(os.getpid()) not in {pid for pid, _ in loaded}  # the refit found all there
        Path(log).write_text("")
        search(log, memory, n_jobs=2)
    assert Path(log).read_text() == ""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_killed_worker_of_a_search(log, tmp_path):
    texts, y = TEXTS[:48], Y[:48]
    memory, kill = str(tmp_path / "states"), tmp_path / "kill"
    kill.touch()
    regressor = make(log, memory).set_params(model=MortalLLM(tiny_model(), log), n_estimators=1)
    search = GridSearchCV(regressor, {"n_iterations": [1, 2]}, cv=2, n_jobs=2)
    with pytest.raises(TerminatedWorkerError, match="SIGKILL"):
        search.fit(texts, y)
    assert not kill.exists()
    (held,) = StateStore(memory).info()
    Path(log).write_text("")
    search.set_params(n_jobs=None).fit(texts, y)  # workers would be started again
    again = {text for process in passes(log).values() for batch in process for text in batch}
    assert held["n_texts"] > 0
    assert len(again) == len(texts) - held["n_texts"]
    whole = GridSearchCV(regressor.set_params(memory=None), search.param_grid, cv=2).fit(texts, y)
    np.testing.assert_array_equal(search.predict(texts), whole.predict(texts))


@pytest.mark.parametrize("part", ["reading", "training"])
def test_a_killed_search_is_started_again(context, log, tmp_path, part):
    memory = tmp_path / "states"
    process = context.Process(
        target=search_until_stopped, args=(memory, TEXTS, Y, tiny_model(), log, part)
    )
    process.start()
    while "stopped" not in Path(log).read_text() and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    (held,) = StateStore(memory).info()
    assert held["n_texts"] == len(TEXTS) if part == "training" else held["n_texts"] > 8
    Path(log).write_text("")
    store = StateStore(memory)
    found = small_search(LoggedLLM(tiny_model(), log), store).fit(TEXTS, Y)
    assert store.misses == len(TEXTS) - held["n_texts"]
    assert ("read" in Path(log).read_text()) == (part == "reading")
    whole = small_search(LoggedLLM(tiny_model(), log), None).fit(TEXTS, Y)
    np.testing.assert_array_equal(found.predict(TEXTS), whole.predict(TEXTS))


def test_bars_of_worker_processes_do_not_overwrite_each_other(capfd):
    job = joblib.delayed(processes.fit_with_bars)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = joblib.Parallel(n_jobs=2)(job(tiny_model()) for _ in range(2))
    assert "MainProcess" not in names
    shown = capfd.readouterr().err
    assert "Fit" not in shown
    assert "epoch" not in shown


def test_worker_processes_without_a_folder_warn(log):
    with loky():
        (messages,) = joblib.Parallel()([joblib.delayed(warnings_of_fit)(make(log, None))])
    (warning,) = messages
    assert "pass memory= a folder" in warning


def warnings_of_fit(regressor):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        regressor.fit(TEXTS, Y)
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


@pytest.fixture(scope="module")
def context():
    """Starts processes that have imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["sklearn_relish", "transformers.models.llama.modeling_llama", "sklearn.model_selection"]
    )
    return context


def reference(texts):
    """States of texts, read in one go."""
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    states = StateStore().fetch(texts, llm, layer=2, max_length=512, progress=False)
    return dict(zip(texts, states, strict=True))


def test_four_processes_read_into_one_store(context, log, tmp_path):
    texts = [f"text number {i} " + "more " * (i % 9) for i in range(240)]
    generator = np.random.default_rng(0)
    selections = [list(generator.permutation(texts)[:180]) for _ in range(4)]
    workers = [
        context.Process(target=fetch_in_small_pieces, args=(tmp_path, selection, tiny_model(), log))
        for selection in selections
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    tokens, loaded = read_log(log)
    assert tokens == n_tokens(text for selection in selections for text in selection)
    assert len({pid for pid, _ in loaded}) > 1
    (held,) = StateStore(tmp_path).info()
    assert held["n_texts"] == len({text for selection in selections for text in selection})
    expected = reference(texts)
    llm = LoggedLLM(tiny_model(), log)
    states = StateStore(tmp_path).fetch(texts, llm, layer=2, max_length=512, progress=False)
    assert all(torch.equal(expected[text], s) for text, s in zip(texts, states, strict=True))


def test_thirty_killed_readers_lose_and_damage_nothing(context, log, tmp_path):
    texts = [f"text number {i} " + "more " * (i % 9) for i in range(150)]
    expected = reference(texts)
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    generator = random.Random(0)
    held = []
    for i in range(30):
        folder = tmp_path / f"store{i}"
        # Every other one is killed in a chosen pass, and the rest wherever they are by then.
        stop_at = generator.randint(3, 30) if i % 2 else 0
        reader = context.Process(
            target=fetch_in_small_pieces, args=(folder, texts, tiny_model(), log, stop_at)
        )
        Path(log).write_text("")
        reader.start()
        begun = "stopped" if stop_at else "read"
        while begun not in Path(log).read_text() and reader.is_alive():
            time.sleep(0.001)
        if not stop_at:
            time.sleep(generator.uniform(0, 0.3))
        reader.kill()
        reader.join()

        store = StateStore(folder)  # that it warns of damage would be an error here
        held.append(sum(row["n_texts"] for row in store.info()))
        states = store.fetch(texts, llm, layer=2, max_length=512, progress=False)
        assert all(torch.equal(expected[text], s) for text, s in zip(texts, states, strict=True))
        assert store.misses == len(texts) - held[-1]
    print("texts held after each kill:", held)
    assert all(0 < n < len(texts) for n in held[1::2])


def test_a_full_disk_gives_a_warning_and_memory_is_used(context, log, tmp_path):
    texts = [f"text number {i}" for i in range(50)]
    reader = context.Process(
        target=fetch_on_a_full_disk, args=(tmp_path / "states", texts, tiny_model(), log)
    )
    reader.start()
    reader.join()
    assert reader.exitcode == 0
    assert read_log(log)[0] == n_tokens(texts)
    files = [path for path in (tmp_path / "states").rglob("*") if path.is_file()]
    assert not [path for path in files if path.parent.name != "leases"]


def test_the_temporary_folder_is_removed_with_its_process(context, log, tmp_path, monkeypatch):
    folders = []
    for end in ("normal", "killed"):
        Path(log).write_text("")
        process = context.Process(target=spill, args=(tiny_model(), log))
        process.start()
        while not (text := Path(log).read_text()).startswith("/"):
            time.sleep(0.01)
        folders.append(Path(text))
        assert list(folders[-1].glob("*.safetensors"))
        if end == "killed":
            process.kill()
        Path(log).write_text("")
        process.join()
    assert not folders[0].exists()
    assert folders[1].exists()  # there was no time to remove it: another process does
    crashed, other = (tmp_path / f"{PREFIX}{name}" for name in ("crashed", "other"))
    shutil.copytree(folders[1], crashed)
    shutil.rmtree(folders[1])
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sklearn_relish.states.temporary._made", {})
    monkeypatch.setattr("sklearn_relish.states.temporary.YOUNG_SECONDS", 0.0)
    mine = temporary_folder().path
    assert not crashed.exists()
    assert (other / "thesis.txt").exists()
    monkeypatch.setattr("sklearn_relish.states.temporary._made", {})
    temporary_folder()
    assert mine.exists()  # one in use is kept


def test_a_temporary_folder_that_cannot_be_locked_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sklearn_relish.states.temporary._made", {})
    monkeypatch.setattr("filelock.FileLock.acquire", fail_on_a_full_disk)
    with pytest.raises(OSError, match="No space left"):
        temporary_folder()
    assert list(tmp_path.iterdir()) == []


def fail_on_a_full_disk(self):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_stays_flat_on_a_set_ten_times_its_budget():
    budget, state_size = 16 * 2**20, 512
    n_texts, n_words = 190, 90
    size = n_texts * n_words * len("word ") * state_size * 4
    assert size > 10 * budget
    peaks = {}
    for max_memory in (budget, 2**30):
        model = tiny_model(size=state_size)
        command = [sys.executable, processes.__file__, model, n_texts, n_words, max_memory]
        answer = subprocess.run(map(str, command), capture_output=True, text=True, check=True)
        peaks[max_memory] = int(answer.stdout)
    print("MiB: states", size >> 20, {f"budget {b >> 20}": f"peak {peaks[b] >> 20}" for b in peaks})
    # The rest of a fit's memory, for batches and the model, does not grow with the set.
    assert peaks[budget] < 0.6 * size
    assert peaks[2**30] > size


def test_processes_share_the_cores(tmp_path):
    job = joblib.delayed(processes.threads_after_a_fit)
    threads = joblib.Parallel(n_jobs=2)(job(tiny_model(), tmp_path) for _ in range(2))
    assert sum(threads) <= max(2, joblib.cpu_count())

"""Code of the other processes: a model that logs what it loads and reads, and users of a store."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from functools import cached_property
from pathlib import Path

import torch

import sklearn_relish.states.contents
import sklearn_relish.states.index
import sklearn_relish.states.reading
import sklearn_relish.states.retention
from sklearn_relish import FrozenLLM, RelishRegressor, RelishRegressorCV, StateStore
from sklearn_relish.llm.batching import TOKEN_BUDGET
from sklearn_relish.states.temporary import temporary_folder
from sklearn_relish.training import search
from sklearn_relish.utils import progress

torch.set_num_threads(1)


class LoggedLLM(FrozenLLM):
    """Writes to a file, from whichever process, what is loaded and how many tokens go through."""

    def __init__(self, model, log):
        super().__init__(model, device="cpu", dtype="float32")
        self.log = log

    def __reduce__(self):
        return type(self), (self.model, self.log)

    def _load_network(self, layers):
        loaded = super()._load_network(layers)
        self.write("network")
        return loaded

    def _read_batch(self, tokens, layers):
        self.write(f"read {sum(map(len, tokens))}")
        return super()._read_batch(tokens, layers)

    @cached_property
    def tokenizer(self):
        self.write("tokenizer")
        return super().tokenizer

    def write(self, line):
        with open(self.log, "a") as file:  # a line is appended in one piece
            file.write(f"{os.getpid()} {line}\n")


def read_log(log):
    """Number of tokens read, and what each process loaded."""
    lines = [line.split() for line in Path(log).read_text().splitlines()]
    loaded = [(pid, what) for pid, what, *rest in lines if not rest]
    return sum(int(rest[0]) for _, _, *rest in lines if rest), loaded


class StoppingLLM(LoggedLLM):
    """Waits in its pass number `n_passes` until it is killed."""

    n_passes = 0

    def write(self, line):
        super().write(line)
        if line.startswith("read"):
            self.n_passes -= 1
            if self.n_passes == 0:
                super().write("stopped")
                threading.Event().wait()


class MortalLLM(LoggedLLM):
    """Logs the texts of each pass, and is killed with its worker process.

    While there is a file `kill`, the first process to complete its third pass is killed, before it
    has kept the states of that pass. Worker processes read in small pieces.
    """

    n_passes = 0

    def __init__(self, model, log):
        super().__init__(model, log)
        if multiprocessing.current_process().name != "MainProcess":
            read_in_small_pieces()

    def _read_batch(self, tokens, layers):
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
        self.write(json.dumps(texts))
        self.n_passes += 1
        if self.n_passes == 3:
            try:
                Path(self.log).with_name("kill").unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            except FileNotFoundError:  # it is not asked for, or another process was killed
                pass
        return super()._read_batch(tokens, layers)

    def write(self, line):
        if line.startswith("["):
            super().write(line)


def passes(log):
    """The texts of each pass of a `MortalLLM`, by process."""
    found = {}
    for line in Path(log).read_text().splitlines():
        pid, _, texts = line.partition(" ")
        found.setdefault(pid, []).append(set(json.loads(texts)))
    return found


def fit_with_bars(model):
    """A fit whose bar would be shown at once in the main process."""
    progress.DELAY_SECONDS = progress.REFRESH_SECONDS = 0.0
    llm = FrozenLLM(model, device="cpu", dtype="float32")
    with warnings.catch_warnings():  # a warning would show this line of code
        warnings.simplefilter("ignore")
        RelishRegressor(llm, max_epochs=1, latent_size=16, verbose=1).fit(list("abcd"), range(4))
    return multiprocessing.current_process().name


def search_until_stopped(folder, texts, y, model, log, part):
    """A `RelishRegressorCV` that waits, reading or training, until it is killed."""
    read_in_small_pieces()
    llm = StoppingLLM(model, log)
    if part == "reading":
        llm.n_passes = 12
    else:
        trained, original = [], search.train_candidates

        def train_candidates(*arguments, **options):
            if trained:
                llm.write("stopped")
                threading.Event().wait()
            trained.append(original(*arguments, **options))
            return trained[0]

        search.train_candidates = train_candidates
    small_search(llm, folder).fit(texts, y)


def small_search(llm, memory):
    return RelishRegressorCV(
        llm,
        memory=memory,
        layer=2,
        latent_size=[8, 16],
        n_iterations=1,
        max_epochs=1,
        cv=2,
        random_state=0,
    )


def read_in_small_pieces():
    """Many small leases, files and merges."""
    sklearn_relish.states.reading.PIECE_TEXTS = 8
    sklearn_relish.states.reading.PIECE_SECONDS = 0.0
    sklearn_relish.states.retention.SHARD_BYTES = 1
    sklearn_relish.states.reading.POLL_SECONDS = 0.01
    sklearn_relish.states.index.MERGE_SHARDS = 4
    TOKEN_BUDGET["cpu"] = 64


def fetch_in_small_pieces(folder, texts, model, log, stop_at=0):
    """Read texts into a store in small pieces."""
    read_in_small_pieces()
    llm = StoppingLLM(model, log)
    llm.n_passes = stop_at
    for i in range(0, len(texts), 30):
        StateStore(folder).fetch(texts[i : i + 30], llm, layer=2, max_length=512, progress=False)


def fetch_on_a_full_disk(folder, texts, model, log):
    """Read texts where no file may grow beyond some kilobytes."""
    import resource  # Unix alone has it

    llm = LoggedLLM(model, log)
    llm.tokenizer, llm.network  # noqa: B018, they are loaded here
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, resource.RLIM_INFINITY))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            states = StateStore(folder).fetch(texts, llm, layer=2, max_length=512, progress=False)
    assert len(states) == len(texts)
    (message,) = (str(warning.message) for warning in caught)
    assert "could not be written" in message
    assert "they stay in memory" in message


def threads_after_a_fit(model, folder):
    """Torch's threads in a worker process that has read and trained."""
    llm = FrozenLLM(model, device="cpu", dtype="float32")
    RelishRegressor(llm, memory=folder, max_epochs=1, latent_size=16).fit(list("abcd"), range(4))
    return torch.get_num_threads()


def spill(model, log):
    """Write the temporary folder's path to the log, and wait until the log is emptied."""
    store = StateStore(max_memory=0)
    store.fetch(["text"], LoggedLLM(model, log), layer=2, max_length=512, progress=False)
    Path(log).write_text(str(temporary_folder().path))
    while Path(log).read_text():
        time.sleep(0.01)


def peak_of_fit(model, texts, max_memory):
    """Bytes by which a fit and a prediction raise the memory of this process."""

    def own_memory():
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], own_memory())

    regressor = RelishRegressor(
        FrozenLLM(model, device="cpu", dtype="float32"),
        memory=StateStore(max_memory=max_memory),
        max_epochs=1,
        batch_size=8,
        latent_size=16,
        random_state=0,
    )
    y = [len(text) % 7 for text in texts]
    regressor.fit(texts[:50], y[:50]).predict(texts[:50])  # what is loaded once
    before, done, peak = own_memory(), threading.Event(), [0]
    watcher = threading.Thread(target=watch)
    watcher.start()
    regressor.fit(texts, y).predict(texts[::-1])
    done.set()
    watcher.join()
    return peak[0] - before


if __name__ == "__main__":
    model, n_texts, n_words, max_memory = sys.argv[1], *map(int, sys.argv[2:])
    texts = [f"text {i} " + "word " * n_words for i in range(n_texts)]
    print(peak_of_fit(model, texts, max_memory))

"""Where to keep token states: this package's shards, LMDB, and an index in SQLite.

    pip install -e ".[benchmarks]" && python benchmarks/storage.py --texts 10000

Random states of texts of 30 tokens of size 576 in bfloat16, the shape of SmolLM2-135M, are written
to a new folder. Then all of them are read in random order, in padded batches of 32 as in training,
from the page cache. "Open" is what a new process does once: it reads the index and verifies the
checksums of all states; LMDB has no checksums. The formats are measured in turns; the table has the
medians of 3 rounds.
"""

import argparse
import sqlite3
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path
from statistics import median

import numpy as np
import torch

from sklearn_relish.states.backend import FolderBackend
from sklearn_relish.states.contents import Contents
from sklearn_relish.states.index import gather
from sklearn_relish.states.retention import SHARD_BYTES
from sklearn_relish.states.shard import KEY_BYTES, Shard

N_TOKENS, SIZE, BATCH = 30, 576, 32
TEXT_BYTES = N_TOKENS * SIZE * 2
SHARD_TEXTS = SHARD_BYTES // TEXT_BYTES
STATES = torch.randn(SHARD_TEXTS * N_TOKENS, SIZE).bfloat16()  # of as many texts as fill a shard


COLLECTION = f"{'0' * 32}/layer1-bfloat16-{N_TOKENS}"
LABEL = {"model": "random", "layer": "1", "dtype": "bfloat16", "max_length": str(N_TOKENS)}


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES)


class Shards:
    """Files with their own index and checksums, as the package keeps them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, n_texts: int) -> None:
        index = Contents(FolderBackend(self.folder)).index(COLLECTION)
        for start in range(0, n_texts, SHARD_TEXTS):
            numbers = range(start, min(start + SHARD_TEXTS, n_texts))
            lengths = torch.full((len(numbers),), N_TOKENS)
            keys = torch.tensor([list(key(number)) for number in numbers], dtype=torch.uint8)
            states = STATES[: len(numbers) * N_TOKENS]
            vectors = torch.empty(len(numbers), 0, states.shape[1], dtype=states.dtype)
            matches = torch.empty(0, 1, dtype=torch.int32)
            index.save(Shard(states, vectors, matches, lengths, lengths.clone(), keys, LABEL))

    def open(self, order: list[int]) -> None:
        index = Contents(FolderBackend(self.folder)).index(COLLECTION)
        keys = [key(number) for number in order]
        assert not index.refresh() + index.verify(keys)
        self.states = gather([index.entries[key] for key in keys])

    def read(self, order: list[int]) -> None:
        for rows in torch.arange(len(order)).split(BATCH):
            self.states.batch(rows)


class SQLiteIndex(Shards):
    """The same files, found by a table on disk as well as by their own index."""

    def write(self, n_texts: int) -> None:
        super().write(n_texts)
        with sqlite3.connect(self.folder / "index.db") as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("CREATE TABLE texts (key BLOB PRIMARY KEY, shard INT, row INT)")
            for start in range(0, n_texts, SHARD_TEXTS):
                rows = range(min(SHARD_TEXTS, n_texts - start))
                database.executemany(
                    "INSERT INTO texts VALUES (?, ?, ?)",
                    ((key(start + row), start // SHARD_TEXTS, row) for row in rows),
                )
                database.commit()

    def open(self, order: list[int]) -> None:
        super().open(order)
        with sqlite3.connect(self.folder / "index.db") as database:
            for number in order:
                database.execute("SELECT * FROM texts WHERE key = ?", (key(number),)).fetchone()


class LMDB:
    """One value per text, one transaction per shard, no flush to disk, like the others."""

    def __init__(self, folder: Path) -> None:
        import lmdb

        self.environment = lmdb.open(str(folder), map_size=2**40, sync=False)

    def write(self, n_texts: int) -> None:
        texts = STATES.view(torch.uint8).view(SHARD_TEXTS, -1).numpy()
        for start in range(0, n_texts, SHARD_TEXTS):
            with self.environment.begin(write=True) as transaction:
                for row in range(min(SHARD_TEXTS, n_texts - start)):
                    transaction.put(key(start + row), texts[row].tobytes())

    def open(self, order: list[int]) -> None:
        pass

    def read(self, order: list[int]) -> None:
        with self.environment.begin(buffers=True) as transaction:
            for start in range(0, len(order), BATCH):
                numbers = order[start : start + BATCH]
                padded = torch.zeros(len(numbers), N_TOKENS, SIZE, dtype=torch.bfloat16)
                for place, number in zip(padded, numbers, strict=True):
                    value = torch.frombuffer(transaction.get(key(number)), dtype=torch.bfloat16)
                    place[:] = value.view(N_TOKENS, SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="where to write; the temporary folder")
    arguments = parser.parse_args()
    n_texts = arguments.texts
    warnings.filterwarnings("ignore", "The given buffer is not writable")
    order = np.random.default_rng(0).permutation(n_texts).tolist()
    seconds = defaultdict(list)
    for turn in range(4):
        for peer in (Shards, SQLiteIndex, LMDB):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                keeper = peer(Path(folder))
                for step, argument in {"write": n_texts, "open": order, "read": order}.items():
                    start = time.perf_counter()
                    getattr(keeper, step)(argument)
                    if turn:  # the first round fills the page cache
                        seconds[peer.__name__, step].append(time.perf_counter() - start)
    mebibytes = n_texts * TEXT_BYTES / 2**20
    print(
        f"{n_texts} texts of {N_TOKENS} x {SIZE} in bfloat16, {mebibytes:.0f} MiB; seconds, ratio"
    )
    for peer in ("Shards", "SQLiteIndex", "LMDB"):
        medians = {step: median(seconds[peer, step]) for step in ("write", "open", "read")}
        print(
            f"{peer:12}",
            *(
                f"{step} {taken:6.2f} ({taken / max(median(seconds['Shards', step]), 1e-9):.2f})"
                for step, taken in medians.items()
            ),
            sep="  ",
        )


if __name__ == "__main__":
    main()

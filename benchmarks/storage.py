"""Where to keep token states: this package's shards, LMDB, and an index in SQLite.

    pip install -e ".[benchmarks]" && python benchmarks/storage.py --texts 10000

Random states of texts of 30 tokens, 576 wide, in bfloat16, as SmolLM2-135M gives them: no model is
needed to measure files. Each keeps them in a fresh folder and reads all back in random order, in
padded batches of 32 as a training asks for them; what is read comes from the page cache.
"""

import argparse
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import torch

from sklearn_relish.shards import KEY_BYTES, Shard
from sklearn_relish.shelf import Shelf
from sklearn_relish.store import SHARD_BYTES

N_TOKENS, SIZE, BATCH = 30, 576, 32
TEXT_BYTES = N_TOKENS * SIZE * 2
SHARD_TEXTS = SHARD_BYTES // TEXT_BYTES
STATES = torch.randn(SHARD_TEXTS * N_TOKENS, SIZE).bfloat16()  # of as many texts as fill a shard


LABEL = dict.fromkeys(("model", "layer", "dtype", "max_length"), "")


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES)


def shards(folder: Path, n_texts: int) -> Callable[[np.ndarray], None]:
    """Write them; return a function that reads texts by their numbers."""
    shelf = Shelf(folder)
    for start in range(0, n_texts, SHARD_TEXTS):
        numbers = range(start, min(start + SHARD_TEXTS, n_texts))
        lengths = torch.full((len(numbers),), N_TOKENS)
        keys = torch.tensor([list(key(number)) for number in numbers], dtype=torch.uint8)
        states = STATES[: len(numbers) * N_TOKENS]
        shelf.add(Shard(states, lengths, lengths, keys, LABEL).save(folder))

    def read(order: np.ndarray) -> None:
        shelf = Shelf(folder)  # as another process finds them, checksums looked at
        shelf.look()
        keys = [key(number) for number in order.tolist()]
        assert not shelf.verify(keys)
        states = shelf.states(keys)
        for rows in torch.arange(len(keys)).split(BATCH):
            states.batch(rows)

    return read


def sqlite_index(folder: Path, n_texts: int) -> Callable[[np.ndarray], None]:
    """The same files, found by a table on disk and not by what each carries."""
    read_shards = shards(folder, n_texts)
    with sqlite3.connect(folder / "index.db") as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE texts (key BLOB PRIMARY KEY, shard INT, row INT)")
        for start in range(0, n_texts, SHARD_TEXTS):
            rows = range(min(SHARD_TEXTS, n_texts - start))
            database.executemany(
                "INSERT INTO texts VALUES (?, ?, ?)",
                ((key(start + row), start // SHARD_TEXTS, row) for row in rows),
            )
            database.commit()

    def read(order: np.ndarray) -> None:
        with sqlite3.connect(folder / "index.db") as database:
            for number in order.tolist():
                database.execute("SELECT * FROM texts WHERE key = ?", (key(number),)).fetchone()
        read_shards(order)

    return read


def lmdb_values(folder: Path, n_texts: int) -> Callable[[np.ndarray], None]:
    """One value a text, a transaction a shard, no flush to disk, as the others do none."""
    environment = lmdb.open(str(folder), map_size=2**40, sync=False)
    texts = STATES.view(torch.uint8).view(SHARD_TEXTS, -1).numpy()
    for start in range(0, n_texts, SHARD_TEXTS):
        with environment.begin(write=True) as transaction:
            for row in range(min(SHARD_TEXTS, n_texts - start)):
                transaction.put(key(start + row), texts[row].tobytes())

    def read(order: np.ndarray) -> None:
        with environment.begin(buffers=True) as transaction:
            for numbers in np.split(order, range(BATCH, len(order), BATCH)):
                padded = torch.zeros(len(numbers), N_TOKENS, SIZE, dtype=torch.bfloat16)
                for place, number in zip(padded, numbers.tolist(), strict=True):
                    value = torch.frombuffer(transaction.get(key(number)), dtype=torch.bfloat16)
                    place[:] = value.view(N_TOKENS, SIZE)

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=10_000)
    n_texts = parser.parse_args().texts
    warnings.filterwarnings("ignore", "The given buffer is not writable")
    order = np.random.default_rng(0).permutation(n_texts)
    mebibytes = n_texts * TEXT_BYTES / 2**20
    print(f"{n_texts} texts of {N_TOKENS} x {SIZE} in bfloat16, {mebibytes:.0f} MiB")
    print(f"{'':24}{'write, s':>10}{'ratio':>7}{'read, s':>10}{'ratio':>7}{'bytes':>7}")
    first = None
    for name, keep in {
        "shards": shards,
        "shards, SQLite index": sqlite_index,
        "LMDB": lmdb_values,
    }.items():
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            read = keep(Path(folder), n_texts)
            writing = time.perf_counter() - start
            times = []
            for _ in range(3):
                start = time.perf_counter()
                read(order)
                times.append(time.perf_counter() - start)
            reading = sorted(times)[1]
            size = sum(file.stat().st_blocks * 512 for file in Path(folder).rglob("*"))
        first = first or (writing, reading)
        print(
            f"{name:24}{writing:10.2f}{writing / first[0]:7.2f}{reading:10.2f}"
            f"{reading / first[1]:7.2f}{size / (n_texts * TEXT_BYTES):7.2f}"
        )


if __name__ == "__main__":
    main()

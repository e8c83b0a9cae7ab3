"""Many texts to predict, and training sets larger than memory.

    python benchmarks/scale.py batch --texts 1000000
    python benchmarks/scale.py epoch --gigabytes 6 --max-memory 1

``batch`` calls `predict` once for distinct texts, and draws the memory that the process has of its
own (Linux's RssAnon) and the bytes in its temporary folder over time. The store may keep 16 MiB of
recent states. The default model is tiny and random: the figures are about growth only. soak.py has
a service with many calls.

``epoch`` is an epoch over synthetic states: random numbers of the shape that an 8B model gives
(4,096 in bfloat16, texts of 150 to 250 tokens, those of a file of similar length), in shards of 64
MiB. Each phase runs in a process of its own, after the files were dropped from the page cache: `dd`
of all files; the windows of an epoch alone; the windows with their batches; the batches of a
shuffle over all texts, as for smaller sets; an epoch of `train_head` with a small head and one with
the default head. For each: bytes of states per second, the rate relative to `dd`, the most memory
that the process had of its own (in addition to what it had before) and of mapped files (RssFile),
and what it read from the disk. The page cache has no limit here: on a machine with more memory than
states, the shuffle over all texts reads each file once too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from peers import settings
from soak import text, tiny_model

from sklearn_relish import FrozenLLM, RelishRegressor, StateStore
from sklearn_relish.states.backend import FolderBackend
from sklearn_relish.states.contents import Contents
from sklearn_relish.states.index import gather
from sklearn_relish.states.retention import SHARD_BYTES
from sklearn_relish.states.shard import KEY_BYTES, Shard
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training.batching import BatchLoader
from sklearn_relish.training.trainer import Examples, new_head, train_head
from sklearn_relish.training.windows import Windows, window_size

SIZE, BATCH, CPU = 4096, 32, torch.device("cpu")
COLLECTION = f"{'0' * 32}/layer1-bfloat16-512"
LABEL = {"model": "random", "layer": "1", "dtype": "bfloat16", "max_length": "512"}
PHASES = {
    "dd": "dd of all files",
    "windows": "windows of an epoch",
    "batches": "windows and batches",
    "shuffle": "batches, shuffle over all texts",
    "small": "training, a head of latent size 16",
    "default": "training, the default head",
}


def write(folder: Path, n_bytes: float) -> None:
    """Shards of random states. The numbers repeat from shard to shard, the keys do not."""
    index = Contents(FolderBackend(folder)).index(COLLECTION)
    values = torch.randn(SHARD_BYTES // SIZE // 2, SIZE).bfloat16()
    n_shards = round(n_bytes / values.nbytes)
    for number in range(n_shards):
        length = 250 - 100 * number // n_shards
        lengths = torch.full((len(values) // length,), length)
        keys = b"".join((number << 32 | i).to_bytes(KEY_BYTES) for i in range(len(lengths)))
        shard = Shard(
            values[: int(lengths.sum())],
            torch.empty(len(lengths), 0, SIZE, dtype=values.dtype),
            torch.empty(0, 1, dtype=torch.int32),
            lengths,
            lengths.clone(),
            torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(-1, KEY_BYTES),
            LABEL,
        )
        index.save(shard)


def drop_from_cache(folder: Path) -> None:
    """Have the files on the disk, and not in the page cache."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def open_all(folder: Path) -> TokenStates:
    """The states of all texts, in random order."""
    index = Contents(FolderBackend(folder)).index(COLLECTION)
    assert not index.refresh()
    states = gather(list(index.entries.values()))
    return states[torch.randperm(len(states), generator=torch.Generator().manual_seed(0))]


def memory(kind: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{kind}:")[2].split()[0]) * 1024


def read_from_disk() -> int:
    return int(Path("/proc/self/io").read_text().partition("\nread_bytes:")[2].split()[0])


def measure(phase: str, folder: Path, max_memory: float) -> dict:
    """Seconds and memory of a phase, in this process."""
    states = open_all(folder)
    generator = torch.Generator().manual_seed(0)
    size = window_size(states.n_bytes, max_memory)
    sizes = {"latent_size": 16, "n_heads": 2} if phase == "small" else {}
    head = new_head(0, input_size=SIZE, **sizes)
    before = {"own": memory("RssAnon"), "mapped": 0}
    peak, course, done = {"own": 0, "mapped": 0}, [], threading.Event()
    start = time.perf_counter()

    def watch() -> None:
        while not done.wait(0.05):
            now = {"own": memory("RssAnon"), "mapped": memory("RssFile")}
            for kind, n_bytes in now.items():
                peak[kind] = max(peak[kind], n_bytes - before[kind])
            course.append((time.perf_counter() - start, now["own"] - before["own"]))

    threading.Thread(target=watch, daemon=True).start()
    if phase == "windows":
        windows = Windows(states, size)
        parts = windows.shuffled(generator)
        for number, rows in enumerate(parts, 1):
            windows.load(rows)
            for following in parts[number : number + 1]:
                windows.read_ahead(following)
    elif phase in ("batches", "shuffle"):
        loader = BatchLoader(
            states, CPU, torch.float32, size if phase == "batches" else float("inf")
        )
        for batch in loader.training_batches(BATCH, generator):
            loader.load(batch)
    else:
        n_texts = len(states)
        examples = Examples(states, torch.randn(n_texts, 1), torch.ones(n_texts))
        train_head(
            head,
            examples,
            None,
            max_memory=max_memory,
            **settings(BATCH, 1, CPU),
        )
    seconds = time.perf_counter() - start
    done.set()
    tenths = [course[len(course) * i // 10][1] for i in range(10)] if course else []
    return {"seconds": seconds, "read": read_from_disk(), "tenths": tenths, **peak}


def epoch(arguments: argparse.Namespace) -> list[dict]:
    """All phases, one after another."""
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write(folder, arguments.gigabytes * 1e9)
        files = sorted(folder.rglob("*.safetensors"))
        n_bytes = sum(path.stat().st_size for path in files)
        print(f"{n_bytes / 1e9:.1f} GB in {len(files)} files, memory {arguments.max_memory} GB")
        print(
            f"{'':36}{'seconds':>9}{'MB/s':>7}{'of dd':>7}{'own MB':>8}{'mapped':>8}{'disk GB':>9}"
        )
        for phase in arguments.phases:
            drop_from_cache(folder)
            if phase == "dd":
                start = time.perf_counter()
                for path in files:
                    command = ["dd", f"if={path}", "of=/dev/null", "bs=4M", "status=none"]
                    subprocess.run(command, check=True)
                row = {"seconds": time.perf_counter() - start, "own": 0, "mapped": 0, "read": 0}
            else:
                command = [sys.executable, __file__, "epoch", "--phase", phase, "--folder", name]
                command += ["--max-memory", str(arguments.max_memory)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                row = json.loads(done.stdout.splitlines()[-1])
            rows.append({"phase": phase, "bytes": n_bytes, **row})
            rate = n_bytes / row["seconds"]
            of_dd = rate * rows[0]["seconds"] / n_bytes if rows[0]["phase"] == "dd" else 0
            print(
                f"{PHASES[phase]:36}{row['seconds']:9.1f}{rate / 1e6:7.0f}{of_dd:7.2f}"
                f"{row['own'] / 1e6:8.0f}{row['mapped'] / 1e6:8.0f}{row['read'] / 1e9:9.1f}",
                flush=True,
            )
            if row.get("tenths"):
                print("   own MB over time:", *(round(n / 1e6) for n in row["tenths"]))
    return rows


def batch(arguments: argparse.Namespace) -> None:
    """One call of `predict` for many texts: memory and disk over time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "temporary")
        folder.mkdir()
        tempfile.tempdir = str(folder)  # where the store would make its temporary folder
        llm = FrozenLLM(arguments.model or tiny_model(Path(name, "llm")), device="cpu")
        store = StateStore(max_memory=64 * 2**20)  # a quarter of this for recent states
        regressor = RelishRegressor(llm, memory=store, max_epochs=2, random_state=0)
        training = [text(-number) for number in range(1, 201)]
        regressor.fit(training, range(200))
        texts = [text(number) for number in range(arguments.texts)]
        regressor.predict(texts[:1000])
        before, course, done = memory("RssAnon"), [], threading.Event()
        start = time.perf_counter()

        def watch() -> None:
            while not done.wait(arguments.texts / 1e6):
                n_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                own = memory("RssAnon") - before
                course.append((time.perf_counter() - start, own, n_bytes))

        watcher = threading.Thread(target=watch)
        watcher.start()
        predicted = regressor.predict(texts)
        done.set()
        watcher.join()
        some = slice(None, None, max(1, arguments.texts // 1000))
        wrong = int((regressor.predict(texts[some]) != predicted[some]).sum())
    seconds, own, disk = zip(*course, strict=True)
    tenths = [round(max(part) / 1e6) for part in np.array_split(own, 10)]
    print(f"{arguments.texts:,} texts in {seconds[-1]:.0f} s, {wrong} differ when predicted again")
    print("own memory, largest of each tenth of the time, in MB:", *tenths)
    print(f"largest size of the temporary folder: {max(disk) / 1e6:.1f} MB")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    axes.plot(seconds, [value / 1e6 for value in own], label="memory, in addition to the start")
    axes.plot(seconds, [value / 1e6 for value in disk], label="temporary folder")
    axes.set(xlabel=f"seconds of a call of predict with {arguments.texts:,} texts", ylabel="MB")
    axes.legend(frameon=False)
    figure.savefig(arguments.picture, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("batch")
    part.add_argument("--texts", type=int, default=1_000_000)
    part.add_argument("--model", help="folder or .gguf file; default: a tiny random model")
    part.add_argument("--picture", type=Path, default=Path("scale.png"))
    part = parts.add_parser("epoch")
    part.add_argument("--gigabytes", type=float, default=6.0, help="size of the states")
    part.add_argument("--max-memory", type=float, default=1.0, help="as of StateStore, in GB")
    part.add_argument("--folder", help="where to write; the temporary folder")
    part.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    part.add_argument("--phase", choices=PHASES, help="run one on FOLDER, in this process")
    part.add_argument("--output", type=Path, help="file that JSON lines are appended to")
    arguments = parser.parse_args()
    if arguments.part == "batch":
        batch(arguments)
        return
    if arguments.phase:
        row = measure(arguments.phase, Path(arguments.folder), arguments.max_memory * 1e9)
        print(json.dumps(row))
        return
    rows = epoch(arguments)
    if arguments.output:
        with arguments.output.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()

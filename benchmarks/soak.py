"""Right numbers and bounded growth, in a service that runs long and in processes that are killed.

    pip install -e ".[benchmarks]"
    python benchmarks/soak.py service [--model MODEL] [--predictions 100000] [--output soak.png]
    python benchmarks/soak.py kills [--kills 500]

``service``: threads predict distinct short texts with one fitted regressor, a few texts a call,
while another thread fits the same regressor again and again, on one of two training sets in turn
whose targets differ a thousandfold in scale. Afterwards all texts are read again, in another order
and in large batches, and predicted by copies of the two models that were fitted beforehand. A
prediction is wrong if it differs in any bit from both models' predictions, if the texts of one call
have predictions of both models, or if no fit was running and it is that of the other model.
Memory, disk and the store's index are sampled meanwhile and drawn in a picture. ``--max-memory``
is the store's bound; memory can only be flat after the states have reached it.

``kills``: two worker processes at a time read texts into one shared folder, fit, predict, and save
into one model folder, over and over. Each is killed (SIGKILL) at a random moment and replaced.
After each kill the saved model is opened while the other worker goes on; it must predict exactly
what one of the known models predicts, and the states of some texts in the store must be bit-equal
to a fresh reading. Every tenth time a fresh process does the same. At the end all texts are
compared. The workers make pieces, files and merges as small as possible, so that many kills hit
them.

Both need Linux. Both print the counts and a JSON line, and exit with 1 if a number was wrong. A
tiny model with random weights is the default: its figures are about growth and correctness, not
about quality or speed.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import sklearn_relish.states.backend
import sklearn_relish.states.index
import sklearn_relish.states.reading
import sklearn_relish.states.retention
from sklearn_relish import FrozenLLM, RelishRegressor, StateStore
from sklearn_relish.states.temporary import made_temporary_folder

WORDS = ("red", "old", "slow", "kind", "dark", "tall", "warm", "rare", "loud", "calm", "soft")
MIB = 2**20


def tiny_model(folder: Path) -> str:
    """A tiny model with random weights that reads bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=4096,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def text(number: int) -> str:
    """A short text of two to six words, another one for each number."""
    words = [WORDS[(number // 7**i + i) % len(WORDS)] for i in range(number % 5 + 1)]
    return f"{' '.join(words)} {number}"


def same_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.view(np.uint64) == b.view(np.uint64)


# A service ----------------------------------------------------------------------------------------

TRAINING_TEXTS = 128
SCALES = 0.1, 1000.0  # of the targets of the two training sets


class Service:
    """A regressor that is fitted while it predicts, and what it predicted."""

    def __init__(self, regressor: RelishRegressor, n_texts: int, seed: int) -> None:
        self.regressor, self.seed = regressor, seed
        self.predictions = np.full(n_texts, np.nan)
        self.calls = np.zeros(n_texts, dtype=np.int64)
        self.certain = np.full(n_texts, -1)  # the fit that it must be of, where none was running
        self.n_done, self.n_calls = 0, itertools.count()
        self.fits_begun = self.fits_done = 0
        self.different_fits = 0
        self.lock = threading.Lock()
        self.ended = threading.Event()

    def predict(self, thread: int) -> None:
        """What one thread does: take the next few numbers, and predict their texts."""
        rng = np.random.default_rng((self.seed, thread))
        while not self.ended.is_set():
            with self.lock:
                rows = slice(self.n_done, self.n_done + int(rng.integers(1, 6)))
                rows = slice(rows.start, min(rows.stop, len(self.predictions)))
                self.n_done, call = rows.stop, next(self.n_calls)
            if rows.start == rows.stop:
                return
            texts = [text(number) for number in range(rows.start, rows.stop)]
            before = self.fits_done
            self.predictions[rows] = self.regressor.predict(texts)
            self.calls[rows] = call
            if before == self.fits_begun:
                self.certain[rows] = before % 2

    def refit(self, sets: list[tuple], copies: list[RelishRegressor], seconds: float) -> None:
        """What the fitting thread does; fit number k is on the set k modulo 2."""
        while not self.ended.wait(seconds):
            began = time.monotonic()
            number = self.fits_begun = self.fits_begun + 1
            self.regressor.fit(*sets[number % 2])
            self.fits_done = number
            self.different_fits += not same_heads(self.regressor, copies[number % 2])
            seconds_taken = time.monotonic() - began
            print(f"fit {number}: {seconds_taken:.1f} s, {self.n_done} texts", flush=True)


def same_heads(a: RelishRegressor, b: RelishRegressor) -> bool:
    left, right = a.head_.state_dict(), b.head_.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


class Sampler:
    """Memory, disk and index over time."""

    def __init__(self, service: Service, store: StateStore, seconds: float) -> None:
        self.service, self.store, self.seconds = service, store, seconds
        self.samples: list[dict[str, float]] = []
        self.began = time.monotonic()

    def run(self) -> None:
        while not self.service.ended.wait(self.seconds):
            self.sample()

    def sample(self) -> None:
        """Take a sample; the store's own numbers come from its private index."""
        status = Path("/proc/self/status").read_text()
        memory = {
            name: int(status.partition(f"{name}:")[2].split()[0]) / 1024
            for name in ("VmRSS", "RssAnon")
        }
        n_files, n_bytes = files_of(self.store)
        contents = self.store._contents
        with contents.lock:
            kept = sum(len(index.entries) for index in contents.indexes.values())
            recent, recent_bytes = len(contents.recent), contents.recent.n_bytes
        self.samples.append(
            {
                "seconds": time.monotonic() - self.began,
                "texts": self.service.n_done,
                "rss_mib": memory["VmRSS"],
                "anonymous_mib": memory["RssAnon"],
                "disk_mib": n_bytes / MIB,
                "files": n_files,
                "open_files": len(os.listdir("/proc/self/fd")),
                "kept_texts": kept,
                "recent_texts": recent,
                "recent_mib": recent_bytes / MIB,
            }
        )

    def column(self, name: str) -> np.ndarray:
        return np.array([sample[name] for sample in self.samples])

    def draw(self, path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, panels = plt.subplots(3, 1, sharex=True, figsize=(8, 8), layout="constrained")
        minutes = self.column("seconds") / 60
        for name, label in (
            ("rss_mib", "resident"),
            ("anonymous_mib", "anonymous"),
            ("recent_mib", "states of recently predicted texts"),
        ):
            panels[0].plot(minutes, self.column(name), label=label)
        panels[0].set(ylabel="memory, MiB", ylim=(0, None))
        panels[1].plot(minutes, self.column("disk_mib"), label="MiB")
        panels[1].plot(minutes, self.column("files"), label="files")
        panels[1].plot(minutes, self.column("open_files"), label="open files of the process")
        panels[1].set(ylabel="disk", ylim=(0, None))
        for name, label in (("kept_texts", "kept"), ("recent_texts", "recently predicted")):
            panels[2].plot(minutes, self.column(name), label=label)
        panels[2].plot(minutes, self.column("texts"), "k:", label="predicted in all")
        panels[2].set(ylabel="texts in the index", xlabel="minutes", yscale="symlog")
        for panel in panels:
            panel.legend(loc="best", fontsize="small")
            panel.grid(alpha=0.3)
        figure.savefig(path, dpi=120)


def files_of(store: StateStore) -> tuple[int, int]:
    """Number and bytes of the files in the store's folder and in the temporary folder."""
    temporary = made_temporary_folder()
    folders = [store.folder, temporary and temporary.path]
    n_files = n_bytes = 0
    for path in itertools.chain(*(Path(folder).rglob("*") for folder in folders if folder)):
        try:
            if path.is_file():
                n_files, n_bytes = n_files + 1, n_bytes + path.stat().st_size
        except FileNotFoundError:
            continue
    return n_files, n_bytes


def run_service(arguments: argparse.Namespace, folder: Path) -> int:
    max_memory = arguments.max_memory or (2048 if arguments.model else 16)
    store = StateStore(arguments.memory, max_memory=max_memory * MIB)
    llm = FrozenLLM(arguments.model or tiny_model(folder), device="cpu", dtype=arguments.dtype)

    def regressor() -> RelishRegressor:
        return RelishRegressor(llm, memory=store, max_epochs=2, random_state=arguments.seed)

    sets = []
    for number, scale in enumerate(SCALES):
        first = -(number + 1) * TRAINING_TEXTS  # negative: none of the texts that are predicted
        texts = [f"training {text(abs(i))}" for i in range(first, first + TRAINING_TEXTS)]
        sets.append((texts, [scale * len(some) for some in texts]))
    copies = [regressor().fit(*some) for some in sets]
    n_texts = arguments.predictions
    service = Service(regressor().fit(*sets[0]), n_texts, arguments.seed)
    service.different_fits += not same_heads(service.regressor, copies[0])
    sampler = Sampler(service, store, arguments.sample_seconds)
    threads = arguments.threads
    with ThreadPoolExecutor(threads + 2) as pool:
        others = [
            pool.submit(service.refit, sets, copies, arguments.refit_seconds),
            pool.submit(sampler.run),
        ]
        predicting = [pool.submit(service.predict, thread) for thread in range(threads)]
        try:
            for future in predicting:
                future.result()
        finally:
            service.ended.set()
        for future in others:
            future.result()
    sampler.sample()
    seconds = time.monotonic() - sampler.began
    sampler.draw(arguments.output)

    store.clear()  # what was predicted is read again
    print("checking every prediction", flush=True)
    expected = np.empty((2, n_texts))
    order = np.random.default_rng(arguments.seed).permutation(n_texts)
    for rows in np.split(order, range(2000, n_texts, 2000)):
        for number, copy in enumerate(copies):
            expected[number, rows] = copy.predict([text(row) for row in rows])
    of_model = np.stack([same_bits(service.predictions, some) for some in expected])
    of_none = int((~of_model.any(axis=0)).sum())
    mixed = 0
    for call in np.split(of_model, np.flatnonzero(np.diff(service.calls)) + 1, axis=1):
        mixed += not call.all(axis=1).any() and call.any(axis=0).all()
    certain = service.certain >= 0
    stale = int((~of_model[service.certain[certain], np.flatnonzero(certain)]).sum())
    distance = np.abs(service.predictions - expected).min(axis=0)

    texts = sampler.column("texts")
    begin = int(np.searchsorted(texts, 0.02 * n_texts))  # after the first pass of each kind
    middle = int(np.searchsorted(texts, 0.5 * n_texts))
    result = {
        "model": Path(arguments.model).name if arguments.model else "tiny random model",
        "dtype": str(llm.torch_dtype).removeprefix("torch."),
        "memory": "folder" if arguments.memory else None,
        "max_memory_mib": max_memory,
        "threads": threads,
        "seconds": round(seconds, 1),
        "predictions": n_texts,
        "calls": next(service.n_calls) - threads,
        "of_each_model": of_model.sum(axis=1).tolist(),
        "wrong_of_no_model": of_none,
        "largest_difference": float(distance.max()),
        "wrong_calls_of_two_models": int(mixed),
        "known_which_model": int(certain.sum()),
        "wrong_of_the_other_model": stale,
        "refits": service.fits_done,
        "wrong_refits": service.different_fits,
    }
    for name in ("rss_mib", "anonymous_mib", "disk_mib", "files", "open_files", "kept_texts"):
        column = sampler.column(name)
        result[name] = [round(float(column[i]), 1) for i in (begin, middle, -1)]
    slope = np.polyfit(texts[middle:], sampler.column("anonymous_mib")[middle:], 1)[0]
    result["anonymous_mib_per_10000_texts"] = round(1e4 * float(slope), 1)  # of the second half
    recent = sampler.column("recent_texts")
    result["recent_texts"] = [int(recent[i]) for i in (begin, middle, -1)]
    report(result)
    print(f"memory, disk and index at the start, in the middle, at the end; see {arguments.output}")
    return sum(value for name, value in result.items() if name.startswith("wrong"))


# Killed workers -----------------------------------------------------------------------------------

POOL_TEXTS, SET_TEXTS, FRESH_TEXTS, PROBES = 4000, 24, 48, 32
STORE_BYTES = 4 * MIB  # about half of what the pool takes
KNOWN_SCALES = 1.0, 30.0, 1000.0  # of the targets of the known models
TIMEOUT = 120.0


def small_pieces() -> None:
    """Make many leases, files and merges, and remove files left behind early."""
    sklearn_relish.states.reading.PIECE_TEXTS = 8
    sklearn_relish.states.reading.PIECE_SECONDS = 0.0
    sklearn_relish.states.retention.SHARD_BYTES = 1
    sklearn_relish.states.reading.POLL_SECONDS = 0.01
    sklearn_relish.states.index.MERGE_SHARDS = 4
    sklearn_relish.states.backend.LEFT_BEHIND_SECONDS = 60.0
    torch.set_num_threads(1)


def known_regressor(model: str, memory) -> RelishRegressor:
    return RelishRegressor(
        FrozenLLM(model, device="cpu"),
        memory=memory,
        layer=2,
        latent_size=16,
        n_estimators=2,
        max_epochs=1,
        random_state=0,
    )


def known_set(number: int) -> tuple[list[str], list[float]]:
    texts = [text(SET_TEXTS * number + i) for i in range(SET_TEXTS)]
    return texts, [KNOWN_SCALES[number] * len(some) for some in texts]


def probes() -> list[str]:
    """Texts by whose predictions the known models are told apart."""
    return [text(number) for number in range(0, POOL_TEXTS, POOL_TEXTS // PROBES)]


def state_bits(texts: list[str], model: str, memory: StateStore) -> list[bytes]:
    llm = FrozenLLM(model, device="cpu")
    states = memory.fetch(texts, llm, layer=2, max_length=512, progress=False)
    return [some.view(torch.uint8).numpy().tobytes() for some in states]


def work(folder: Path, model: str, worker: int, seed: int, connection) -> None:
    """Read, fit, predict and save, until the process is killed."""
    small_pieces()
    rng = np.random.default_rng((seed, worker))
    store = StateStore(folder / "states", max_bytes=STORE_BYTES)
    expected = np.load(folder / "expected.npy")
    llm = FrozenLLM(model, device="cpu")
    llm.network  # noqa: B018, loaded before the clock starts
    connection.send_bytes(b"begun")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            while True:
                number = int(rng.integers(len(KNOWN_SCALES)))
                fresh = [text(int(i)) for i in rng.integers(POOL_TEXTS, size=FRESH_TEXTS)]
                store.fetch(fresh, llm, layer=2, max_length=512, progress=False)
                regressor = known_regressor(model, store).fit(*known_set(number))
                right = same_bits(regressor.predict(probes()), expected[number]).all()
                regressor.save_pretrained(folder / "model")
                log(folder, "iterations", "one")
                if not right:
                    log(folder, "wrong", f"worker {worker}: a prediction of model {number}")
                while caught:
                    log(folder, "warnings", f"worker {worker}: {caught.pop().message}")
    except BaseException:
        log(folder, "crashes", f"worker {worker}: {traceback.format_exc()!r}")
        raise


def log(folder: Path, name: str, line: str) -> None:
    with open(folder / f"{name}.log", "a") as file:  # a line is appended in one piece
        file.write(f"{line}\n")


def read_log(folder: Path, name: str) -> list[str]:
    path = folder / f"{name}.log"
    return path.read_text().splitlines() if path.exists() else []


def check(folder: Path, model: str, numbers: list[int], connection=None) -> dict[str, object]:
    """Open the saved model and some texts' states, and compare both with what they must be."""
    torch.set_num_threads(1)
    found: dict[str, object] = {"wrong": [], "warnings": []}
    store = StateStore(folder / "states", max_bytes=STORE_BYTES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            expected = np.load(folder / "expected.npy")
            llm = FrozenLLM(model, device="cpu")
            regressor = RelishRegressor.from_pretrained(folder / "model", model=llm)
            known = same_bits(regressor.predict(probes()), expected).all(axis=1)
            found["model"] = int(known.argmax()) if known.any() else None
            if not known.any():
                found["wrong"].append("the saved model is none of the known ones")
            bits = torch.load(folder / "bits.pt")
            hits = store.hits
            texts = [text(number) for number in numbers]
            for number, some in zip(numbers, state_bits(texts, model, store), strict=True):
                if some != bits[number]:
                    found["wrong"].append(f"the states of text {number}")
            found["in_store"] = store.hits - hits
        except Exception:
            found["wrong"].append(traceback.format_exc())
        found["warnings"] = [str(warning.message) for warning in caught]
    if connection is not None:
        connection.send(found)
    return found


def reference(folder: Path, model: str, connection) -> None:
    """The known models' predictions, the states of all texts, and a first saved model."""
    torch.set_num_threads(1)
    bits = state_bits([text(i) for i in range(POOL_TEXTS)], model, StateStore())
    torch.save(bits, folder / "bits.pt")
    StateStore().clear()
    regressors = [known_regressor(model, None).fit(*known_set(i)) for i in range(len(KNOWN_SCALES))]
    np.save(folder / "expected.npy", [regressor.predict(probes()) for regressor in regressors])
    regressors[0].save_pretrained(folder / "model")
    connection.send(True)


class Worker:
    """A working process, and when it is to be killed."""

    def __init__(self, context, folder: Path, model: str, number: int, seed: int) -> None:
        delay = np.random.default_rng((seed, number, 1)).uniform(0.05, 2.0)
        self.connection, theirs = context.Pipe(duplex=False)
        arguments = folder, model, number, seed, theirs
        self.process = context.Process(target=work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        if not self.connection.poll(TIMEOUT):
            raise TimeoutError(f"worker {number} did not begin in {TIMEOUT} seconds")
        self.kill_at = time.monotonic() + delay

    def kill(self) -> bool:
        """Kill it; whether it had lived until then."""
        time.sleep(max(0.0, self.kill_at - time.monotonic()))
        self.process.kill()
        self.process.join()
        self.connection.close()
        return self.process.exitcode == -9


def in_fresh_process(context, function, *arguments):
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(*arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not mine.poll(TIMEOUT):
            raise TimeoutError(f"{function.__name__} did not end in {TIMEOUT} seconds")
        return mine.recv()
    finally:
        process.kill()
        process.join()


def run_kills(arguments: argparse.Namespace, folder: Path) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["sklearn_relish", "transformers.models.llama.modeling_llama", "transformers"]
    )
    model = arguments.model or tiny_model(folder / "llm")
    in_fresh_process(context, reference, folder, model)
    rng = np.random.default_rng(arguments.seed)
    seed, began = arguments.seed, time.monotonic()
    workers = [Worker(context, folder, model, number, seed) for number in range(arguments.workers)]
    wrong, said, models, n_survived, in_store, compared = [], [], Counter(), 0, 0, 0

    def take(found: dict[str, object], n_texts: int) -> None:
        nonlocal in_store, compared
        wrong.extend(found["wrong"])
        said.extend(found["warnings"])
        models[found.get("model")] += 1
        in_store += found.get("in_store", 0)
        compared += n_texts
        for line in found["wrong"]:
            print(f"WRONG after {kill} kills: {line}", flush=True)

    for kill in range(1, arguments.kills + 1):
        worker = min(workers, key=lambda some: some.kill_at)
        n_survived += worker.kill()
        workers.remove(worker)
        numbers = rng.choice(POOL_TEXTS, size=PROBES, replace=False).tolist()
        take(check(folder, model, numbers), PROBES)
        if kill % 10 == 0:
            take(in_fresh_process(context, check, folder, model, numbers), PROBES)
        if kill + len(workers) < arguments.kills:
            number = kill + arguments.workers - 1
            workers.append(Worker(context, folder, model, number, seed))
        if kill % min(50, arguments.kills) == 0:
            print(f"{kill} kills, {len(wrong)} wrong", flush=True)
    seconds = time.monotonic() - began
    partial = [path.name for path in (folder / "states").rglob(".*.partial")]
    leases = [path.name for path in (folder / "states").rglob("*.lease")]
    left = sorted(path.name for path in (folder / "model").iterdir())
    n_files, n_bytes = files_of(StateStore(folder / "states"))
    take(in_fresh_process(context, check, folder, model, list(range(POOL_TEXTS))), POOL_TEXTS)
    crashes = read_log(folder, "crashes")
    wrong += read_log(folder, "wrong")
    said += read_log(folder, "warnings")
    for line in crashes + wrong:
        print(line.encode().decode("unicode_escape"), file=sys.stderr)
    for line in sorted(set(said))[:20]:
        print(f"warning: {line}", file=sys.stderr)
    result = {
        "model": Path(arguments.model).name if arguments.model else "tiny random model",
        "seconds": round(seconds, 1),
        "kills": n_survived,
        "finished_iterations": len(read_log(folder, "iterations")),
        "checks": sum(models.values()),
        "saved_models_found": [models[number] for number in range(len(KNOWN_SCALES))],
        "states_compared": compared,
        "of_them_in_the_store": in_store,
        "wrong": len(wrong),
        "wrong_crashes": len(crashes) + arguments.kills - n_survived,
        "warnings": len(said),
        "warnings_of_damaged_files": sum("damaged" in line for line in said),
        "left_in_the_store": {"files": n_files, "mib": round(n_bytes / MIB, 1)},
        "of_them_partial": len(partial),
        "of_them_leases": len(leases),
        "left_with_the_model": left,
    }
    report(result)
    return result["wrong"] + result["wrong_crashes"]


def report(result: dict[str, object]) -> None:
    for name, value in result.items():
        print(f"{name.replace('_', ' '):28} {value}")
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    service = commands.add_parser("service", help="threads that predict while another one fits")
    service.add_argument("--predictions", type=int, default=100_000)
    service.add_argument("--threads", type=int, default=8, help="that predict")
    service.add_argument("--refit-seconds", type=float, default=60.0, help="between two fits")
    service.add_argument("--sample-seconds", type=float, default=1.0)
    service.add_argument("--memory", help="folder of a store; default: the process's own")
    service.add_argument("--max-memory", type=int, help="MiB; default: 2048, tiny model: 16")
    service.add_argument("--dtype", default="auto")
    service.add_argument("--output", type=Path, default=Path("soak.png"), help="picture")
    kills = commands.add_parser("kills", help="processes that are killed at random moments")
    kills.add_argument("--kills", type=int, default=500)
    kills.add_argument("--workers", type=int, default=2, help="at a time")
    for command in (service, kills):
        command.add_argument("--model", help="folder or .gguf file; default: a tiny random model")
        command.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.model is None:
        print("A tiny model with random weights: about growth and correctness, not about quality.")
    with tempfile.TemporaryDirectory() as folder:
        run = run_service if arguments.command == "service" else run_kills
        sys.exit(run(arguments, Path(folder)) > 0)


if __name__ == "__main__":
    main()

"""How reading, training and memory grow with the number of texts.

    pip install -e ".[benchmarks]" && python benchmarks/growth.py --model MODEL

1,000, 10,000 and 100,000 different texts of 8 words, cut from the texts of films (films.py), are
read at 55 % of the depth, and a head is trained on random targets for one epoch. Each size has its
own process, and a store that may hold 64 MiB of states in memory and writes the rest to files.

The table has tokens, seconds of reading and of training, and the peak of the process's own memory
(RssAnon of Linux, without mapped files) in addition to what it had with the model loaded. Below it
are the exponents of the seconds as powers of the tokens, fitted on logarithms. MODEL is a Hub id, a
folder or a .gguf file.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from films import load_films
from peers import settings

from sklearn_relish import FrozenLLM, StateStore
from sklearn_relish.training.trainer import Examples, new_head, train_head

BUDGET = 64 * 2**20
N_WORDS, STRIDE = 8, 3


def short_texts(n_texts: int) -> list[str]:
    """Different texts of 8 words, in random order."""
    films, _ = load_films(9_700)
    words = [film.split() for film in films]
    windows = {
        " ".join(film[start : start + N_WORDS])
        for film in words
        for start in range(0, len(film) - N_WORDS, STRIDE)
    }
    chosen = np.random.default_rng(0).choice(sorted(windows), n_texts, replace=False)
    return chosen.tolist()


def own_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def measure(model: str, n_texts: int) -> dict:
    """Read and train, in this process."""
    texts = short_texts(n_texts)
    llm = FrozenLLM(model)
    layer = llm.resolve_layer(0.55)
    list(llm.read(texts[:200], layers=[layer], max_length=64))
    before, peak, done = own_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], own_memory() - before)

    threading.Thread(target=watch, daemon=True).start()
    store = StateStore(max_memory=BUDGET)
    start = time.perf_counter()
    states = store.fetch(texts, llm, layer=layer, max_length=64, progress=False)
    middle = time.perf_counter()
    examples = Examples(states, torch.randn(n_texts, 1), torch.ones(n_texts))
    train_head(
        new_head(0, input_size=states.hidden_size),
        examples,
        None,
        **settings(32, 1, llm.torch_device),
    )
    seconds = middle - start, time.perf_counter() - middle
    done.set()
    return {
        "texts": n_texts,
        "tokens": int(states.lengths.sum()),
        "states": states.n_bytes,
        "reading": seconds[0],
        "training": seconds[1],
        "memory": peak[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="Hub id, folder or .gguf file")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--alone", type=int, help="measure one size, in this process")
    parser.add_argument("--output", type=Path, help="file that JSON lines are appended to")
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(measure(arguments.model, arguments.alone)))
        return

    rows = []
    print(f"{'texts':>8}{'tokens':>10}{'states':>10}{'reading':>10}{'training':>10}{'memory':>10}")
    for size in arguments.sizes:
        command = [sys.executable, __file__, "--model", arguments.model, "--alone", str(size)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"{row['texts']:8}{row['tokens']:10}{row['states'] / 2**20:6.0f} MiB"
            f"{row['reading']:8.1f} s{row['training']:8.1f} s{row['memory'] / 2**20:6.0f} MiB",
            flush=True,
        )
    tokens = np.log([row["tokens"] for row in rows])
    for what in ("reading", "training"):
        exponent = np.polyfit(tokens, np.log([row[what] for row in rows]), 1)[0]
        print(f"{what}: seconds grow with tokens to the power of {exponent:.2f}")
    if arguments.output:
        with arguments.output.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()

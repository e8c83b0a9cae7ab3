"""Fits in few readings of the texts: what is lost if states can't be kept for ten epochs.

    pip install -e ".[benchmarks]" && python benchmarks/readings.py --data FOLDER

evaluation.py says what FOLDER has. A fit in readings holds the states of a fifth of the rows at a
time: `partial_fit` on one part after another, with a learning rate that falls from call to call. It
is compared with fits on kept states, with the default settings and with heads alone. The states
come from a store, so the seconds are those of the heads.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
from evaluation import TASKS, TEST_ROWS, Results, correlation, find_models, load
from scipy.stats import pearsonr

from sklearn_relish import FrozenLLM, RelishRegressor, StateStore

COLUMNS = ["text_a", "text_b"]
N_PARTS = 5
KEPT, HEADS = "kept states", "kept states, heads alone"
READINGS = ((1, 3), (2, 2), (3, 2))  # readings of all texts, epochs of each part


def fit_in_readings(
    regressor: RelishRegressor, train: pd.DataFrame, n_readings: int, seed: int
) -> None:
    """Fit on one random part of the rows after another."""
    peak, random = regressor.learning_rate, np.random.default_rng(seed)
    orders = [random.permutation(len(train)) for _ in range(n_readings)]
    parts = [part for order in orders for part in np.array_split(order, N_PARTS)]
    for number, part in enumerate(parts):
        regressor.set_params(learning_rate=peak * (1 - number / len(parts)))
        regressor.partial_fit(train.loc[part, COLUMNS], train.loc[part, "score"])


def run(
    arguments: argparse.Namespace, results: Results, llm: FrozenLLM, name: str, seed: int
) -> None:
    """Every fit of a set with a seed that the results lack."""
    task = TASKS[name]
    train = load(arguments.data / name, "train", task.train_rows)
    test = load(arguments.data / name, "test", TEST_ROWS)
    settings = {"prompt": task.prompt, "memory": StateStore(arguments.memory), "random_state": seed}
    named = {f"readings: {n}, epochs of a part: {epochs}": (n, epochs) for n, epochs in READINGS}
    for kind in (KEPT, HEADS, *named):
        key = {"set": name, "seed": seed, "fit": kind}
        if results.find(**key):
            continue
        regressor = RelishRegressor(llm, **settings)
        start = time.perf_counter()
        if kind in named:
            n_readings, n_epochs = named[kind]
            regressor.set_params(max_epochs=n_epochs)
            fit_in_readings(regressor, train, n_readings, seed)
        else:
            if kind == HEADS:
                regressor.set_params(linear_path=False, early_stopping=False)
            regressor.fit(train[COLUMNS], train["score"])
        seconds = time.perf_counter() - start
        r = correlation(pearsonr, regressor.predict(test[COLUMNS]), test["score"].to_numpy())
        results.add(**key, r=r, seconds=seconds)
        print(json.dumps(results.lines[-1]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=TASKS, default=["stsb", "wmt-ru-en"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--memory", default=".readings-states", help="folder of token states")
    parser.add_argument("--output", type=Path, default=Path("readings.jsonl"))
    arguments = parser.parse_args()
    results, llm = Results(arguments.output), find_models(None)["SmolLM2-135M"]
    for seed in range(arguments.seeds):
        for name in arguments.sets:
            run(arguments, results, llm, name, seed)
    lines = pd.DataFrame(results.lines)
    for figure in ("r", "seconds"):
        table = lines.pivot_table(index="fit", columns="set", values=figure, sort=False)
        print(figure, table.round(1).to_string(), sep="\n")


if __name__ == "__main__":
    main()

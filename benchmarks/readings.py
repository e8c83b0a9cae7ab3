"""Fits in few readings of the texts: what is lost if states can't be kept for ten epochs.

    pip install -e ".[benchmarks]" && python benchmarks/readings.py --data FOLDER

evaluation.py says what FOLDER has. A fit in readings holds the states of a fifth of the rows at a
time: `fit` on the first part, then `partial_fit` on the other parts, and on all parts in further
readings. It is compared with fits on kept states of all rows and of the first part alone. The
states come from a store, so the seconds are those of the heads.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from evaluation import TASKS, TEST_ROWS, Results, correlation, find_models, load
from scipy.stats import pearsonr

from sklearn_relish import FrozenLLM, RelishRegressor, StateStore
from sklearn_relish.regressor import ESTIMATORS

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ["text_a", "text_b"]
N_PARTS = 5
KEPT, FIRST = "kept states", "the first part alone"
READINGS = {  # readings of all texts, and epochs of each part
    "one reading, 5 epochs of a part": (1, 5),
    "two readings, 3 epochs of a part": (2, 3),
}


def fit_in_readings(
    regressor: RelishRegressor, train: pd.DataFrame, n_readings: int, n_epochs: int, seed: int
) -> None:
    """Fit on one random part of the rows after another."""
    random = np.random.default_rng(seed)
    orders = [random.permutation(len(train)) for _ in range(n_readings)]
    first, *rest = [part for order in orders for part in np.array_split(order, N_PARTS)]
    regressor.fit(train.loc[first, COLUMNS], train.loc[first, "score"])
    regressor.set_params(max_epochs=n_epochs)
    for part in rest:
        regressor.partial_fit(train.loc[part, COLUMNS], train.loc[part, "score"])


def run(
    arguments: argparse.Namespace, results: Results, llm: FrozenLLM, name: str, seed: int
) -> None:
    """Every fit of a set with a seed that the results lack."""
    task = TASKS[name]
    train = load(arguments.data / name, "train", task.train_rows)
    test = load(arguments.data / name, "test", TEST_ROWS)
    settings = {"prompt": task.prompt, "memory": StateStore(arguments.memory), "random_state": seed}
    for kind in (KEPT, FIRST, *READINGS):
        key = {"set": name, "seed": seed, "fit": kind}
        if results.find(**key):
            continue
        # As many heads as for all rows.
        regressor = RelishRegressor(llm, n_estimators=ESTIMATORS, **settings)
        start = time.perf_counter()
        if kind == KEPT:
            regressor.fit(train[COLUMNS], train["score"])
        elif kind == FIRST:
            first = train.head(len(train) // N_PARTS)
            regressor.fit(first[COLUMNS], first["score"])
        else:
            fit_in_readings(regressor, train, *READINGS[kind], seed)
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
    lines = results.frame()
    for figure in ("r", "seconds"):
        table = lines.pivot_table(index="fit", columns="set", values=figure, sort=False)
        print(figure, table.round(1).to_string(), sep="\n")


if __name__ == "__main__":
    main()

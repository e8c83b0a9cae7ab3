"""`RelishRegressorCV` next to `GridSearchCV`: seconds of a search, and r of what it chooses.

    pip install -e ".[benchmarks]" && python benchmarks/search.py --data FOLDER

3 x 3 values of `n_iterations` and `latent_size`, five folds, all other settings at their defaults;
STS-B with SmolLM2-135M and films with Gemma-3-270M. evaluation.py says what FOLDER has. In one run:

- reading all texts once, which both searches need;
- a fit of each candidate on all training rows, and its r on the test rows. The time of
  `GridSearchCV` is computed from these nine: each fold's fit takes 4/5 of the time, and the best
  candidate is fitted again. With ``--grid-search`` it is run completely instead, and r is that of
  the candidate it chooses;
- `RelishRegressorCV`, and r on the test rows; with ``--complete`` also without dropping candidates
  after a fold;
- the floor: reading, and the multiplications of the five heads that remain, at the rate of a large
  matrix product.

Each result is a line of the output. Results that are there are not computed again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from evaluation import TASKS, Results, correlation, find_models, load
from films import load_films
from scipy.stats import pearsonr
from sklearn.model_selection import GridSearchCV, ParameterGrid
from torch.utils.flop_counter import FlopCounterMode

from sklearn_relish import LLMEncoder, RelishRegressor, RelishRegressorCV, StateStore
from sklearn_relish.training import search
from sklearn_relish.training.trainer import auto_epochs, new_head

if TYPE_CHECKING:
    import pandas as pd

GRID = {"n_iterations": [1, 2, 3], "latent_size": [64, 128, 256]}
FOLDS = 5
MODELS = {"stsb": "SmolLM2-135M", "films": "Gemma-3-270M"}


def load_set(
    name: str, data: Path, n_rows: int, n_test: int
) -> tuple[list[str], np.ndarray, list[str], np.ndarray]:
    """Texts and targets for training and for the test."""
    if name == "films":
        texts, y = load_films(n_rows + n_test)
        return texts[:n_rows], y[:n_rows], texts[n_rows:], y[n_rows:]
    parts: list[Any] = []
    for split, size in (("train", n_rows), ("test", n_test)):
        frame = load(data / name, split, size)
        parts.append([TASKS[name].prompt.format_map(row) for row in frame.to_dict("records")])
        parts.append(frame["score"].to_numpy())
    return tuple(parts)


def product_rate() -> float:
    """Multiplications and additions per second of a large float32 matrix product."""
    a = torch.randn(2048, 2048)
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def flops_of_a_head(regressor: RelishRegressorCV, n_texts: int, n_tokens: int) -> float:
    """Of the training of one head on `n_texts` texts of `n_tokens` tokens."""
    head = new_head(0, **regressor.head_.heads[0].sizes)
    states = torch.randn(32, n_tokens, head.sizes["input_size"])
    mask = torch.ones(32, n_tokens, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        head.staged(states, mask).sum().backward()
    n_steps = auto_epochs(n_texts, 32) * math.ceil(n_texts / 32)
    return counter.get_total_flops() * n_steps


def run(arguments: argparse.Namespace, results: Results, name: str, seed: int) -> None:
    """All parts of a set with a seed."""
    X, y, X_test, y_test = load_set(name, arguments.data, arguments.rows, arguments.test_rows)
    llm = find_models(None)[MODELS[name]]
    store = StateStore(arguments.memory)
    cell = {"set": name, "seed": seed, "rows": len(X), "test_rows": len(X_test)}

    def measured(part: str, estimator: Any, values: dict[str, int] | None = None) -> None:
        key = cell | {"part": part, "values": values}
        if results.find(**key):
            return
        start = time.perf_counter()
        estimator.fit(X, y)
        seconds = time.perf_counter() - start
        r = correlation(pearsonr, estimator.predict(X_test), y_test)
        line = key | {"seconds": seconds, "r": r}
        if hasattr(estimator, "cv_results_"):
            line["best"] = estimator.best_params_
            line["scores"] = estimator.cv_results_["mean_test_score"].tolist()
        results.add(**line)
        print(json.dumps(line), flush=True)

    if seed == 0 and not results.find(**cell, part="reading"):
        store.clear()
        llm.network  # noqa: B018, loads the model
        start = time.perf_counter()
        LLMEncoder(llm, memory=store).fit_transform(X)
        results.add(**cell, part="reading", values=None, seconds=time.perf_counter() - start)
        print(json.dumps(results.lines[-1]), flush=True)
    LLMEncoder(llm, memory=store).fit_transform([*X, *X_test])
    settings: dict[str, Any] = {"memory": store, "random_state": seed}
    cv = RelishRegressorCV(llm, **GRID, cv=FOLDS, **settings)
    measured("RelishRegressorCV", cv)
    if arguments.complete:
        original = search._better_half
        search._better_half = lambda alive, *_: alive
        try:
            measured("without dropping", cv)
        finally:
            search._better_half = original
    if arguments.grid_search:
        measured("GridSearchCV", GridSearchCV(RelishRegressor(llm, **settings), GRID, cv=FOLDS))
    else:
        for values in ParameterGrid(GRID):
            measured("candidate", RelishRegressor(llm, **values, **settings), values=values)
    if not results.find(**cell, part="floor"):
        if not hasattr(cv, "head_"):
            cv.fit(X, y)
        states = store.fetch(X, llm, layer=cv.layer_, max_length=512, progress=False)
        n_tokens = round(float(states.lengths.float().mean()))
        flops = FOLDS * flops_of_a_head(cv, len(X) * (FOLDS - 1) // FOLDS, n_tokens)
        results.add(**cell, part="floor", values=None, seconds=flops / product_rate())


def report(lines: pd.DataFrame) -> str:
    """Seconds and r of each part, by set."""
    rows = []
    for name, of_set in lines.groupby("set"):
        parts = dict(list(of_set.groupby("part")))
        reading = parts["reading"]["seconds"].mean()
        cv = parts["RelishRegressorCV"]
        seconds = {
            "reading": reading,
            "floor": reading + parts["floor"]["seconds"].mean(),
            "RelishRegressorCV": reading + cv["seconds"].mean(),
        }
        r = {"RelishRegressorCV": f"{cv['r'].mean():.2f}"}
        if "candidate" in parts:
            candidates = parts["candidate"]
            total = candidates.groupby("seed")["seconds"].sum().mean()
            best = candidates.loc[candidates.groupby("seed")["r"].idxmax()]["seconds"].mean()
            seconds["GridSearchCV, computed"] = reading + FOLDS * 0.8 * total + best
            mean = candidates.groupby(candidates["values"].astype(str))["r"].mean()
            r["candidates"] = f"{mean.min():.2f} to {mean.max():.2f}, mean {mean.mean():.2f}"
        for part in ("GridSearchCV", "without dropping"):
            if part in parts:
                seconds[part] = reading + parts[part]["seconds"].mean()
                r[part] = f"{parts[part]['r'].mean():.2f}"
        rows.append(f"{name}: {of_set['rows'].iloc[0]} rows, seconds with reading")
        for part, value in seconds.items():
            ratio = value / seconds["RelishRegressorCV"]
            rows.append(f"  {part:26}{value:8.0f}{ratio:8.2f} times RelishRegressorCV")
        rows.append("  100 r: " + "; ".join(f"{part} {value}" for part, value in r.items()))
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--test-rows", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--complete", action="store_true")
    parser.add_argument("--grid-search", action="store_true")
    parser.add_argument("--memory", default=".search-states", help="folder of token states")
    parser.add_argument("--output", type=Path, default=Path("search.jsonl"))
    arguments = parser.parse_args()
    results = Results(arguments.output)
    for seed in range(arguments.seeds):
        for name in arguments.sets:
            run(arguments, results, name, seed)
            print(report(results.frame()), flush=True)


if __name__ == "__main__":
    main()

"""Is depth worth adapting? Fixed depths, and texts that stop when their answer has settled.

    python benchmarks/depth.py --data FOLDER

FOLDER and the models are those of evaluation.py, whose store of states is used. For a set of pairs
and one of translations, with weights of their own and with shared ones, single heads without the
linear path are fitted with 1 to 5 iterations; 100 r is on test rows, the mean of the seeds.
Beneath them, from the head of 5 iterations, what came of stopping each text as soon as its answer
moved by less than `tol` standard deviations of the target: the mean of the iterations that texts
took, 100 r, and the rank correlation between the iterations a text took and the error of its answer
(positive: harder texts get more). With shared weights a head of 3 iterations is also taken further
than it was trained. All are trained with every iteration's answer asked to be right, but for the
last line of the first table. At the end, what iterations cost: a head's time on some test rows at
each depth, as a share of reading them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from evaluation import TASKS, find_models, load
from scipy.stats import pearsonr, spearmanr

from sklearn_relish import RelishRegressor, StateStore
from sklearn_relish.head.ensemble import RelishEnsemble
from sklearn_relish.head.head import RelishHead
from sklearn_relish.training.inference import predict_states
from sklearn_relish.training.trainer import new_head

SETS = ["stsb", "wmt-ru-en"]
DEPTHS = [1, 2, 3, 4, 5]
FURTHER = 8  # iterations that a head of 3 with shared weights is taken to
TOLERANCES = [0.2, 0.1, 0.05, 0.02]
TEST_ROWS = 1000
TIMED_ROWS = 128


def settled(stages: np.ndarray, tolerance: float) -> np.ndarray:
    """Iterations until an answer moves by less than `tolerance`, of each text.

    `stages`, (n_iterations, n_texts), has the answers; all iterations where none is so near.
    """
    still = np.abs(np.diff(stages, axis=0)) < tolerance  # from the second iteration on
    return np.where(still.any(axis=0), still.argmax(axis=0) + 2, len(stages))


def taken_further(ensemble: RelishEnsemble, n_iterations: int) -> RelishEnsemble:
    """The same weights, in another number of iterations."""
    (fitted,) = ensemble.heads
    head = RelishHead(**fitted.sizes | {"n_iterations": n_iterations})
    head.load_state_dict(fitted.state_dict())
    return RelishEnsemble([head], linear_path=False).eval()


def fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of five runs."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder a set")
    parser.add_argument("--model", help="NAME=PATH of a model")
    parser.add_argument("--memory", default=".evaluation-states", help="folder of token states")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    name, llm = next(iter(find_models(arguments.model and [arguments.model]).items()))
    store = StateStore(arguments.memory)
    columns = ["text_a", "text_b"]

    def fit(depth: int, shared: bool, seed: int, deep: bool = True) -> RelishRegressor:
        return RelishRegressor(
            llm,
            prompt=TASKS[set_name].prompt,
            memory=store,
            n_iterations=depth,
            share_weights=shared,
            deep_supervision=deep,
            n_estimators=1,
            linear_path=False,
            random_state=seed,
        ).fit(train[columns], train["score"])

    for set_name in SETS:
        train = load(arguments.data / set_name, "train", TASKS[set_name].train_rows)
        test = load(arguments.data / set_name, "test", TEST_ROWS)
        y, unit = test["score"].to_numpy(), train["score"].std()
        seeds = range(arguments.seeds)
        for shared in (False, True):
            weights = "shared weights" if shared else "own weights"
            print(f"\n{set_name}, {name}, {weights}, {len(train)} rows, {len(seeds)} seeds\n")
            print("| iterations | 100 r | of its stages |\n| --- | --- | --- |")
            for depth in DEPTHS:
                fitted = [fit(depth, shared, seed) for seed in seeds]
                stages = np.stack(
                    [list(regressor.staged_predict(test[columns])) for regressor in fitted]
                )  # (n_seeds, n_iterations, n_texts)
                r = [[100 * pearsonr(stage, y)[0] for stage in one] for one in stages]
                print(f"| {depth} | {np.mean(r, axis=0)[-1]:.1f} | {np.mean(r, axis=0).round(1)} |")
                if depth == 3 and shared:
                    further = []
                    for regressor in fitted:
                        regressor.head_ = taken_further(regressor.head_, FURTHER)
                        further.append(list(regressor.staged_predict(test[columns])))
            alone = [
                list(fit(3, shared, n, deep=False).staged_predict(test[columns])) for n in seeds
            ]
            r = [[100 * pearsonr(stage, y)[0] for stage in one] for one in alone]
            print(
                f"| 3, the last alone | {np.mean(r, axis=0)[-1]:.1f}"
                f" | {np.mean(r, axis=0).round(1)} |"
            )
            print("\n| stopped at | iterations | 100 r | iterations ~ error |")
            print("| --- | --- | --- | --- |")
            kinds = [("5, tol", stages)]
            if shared:
                kinds.append((f"{FURTHER}, trained with 3, tol", np.stack(further)))
            for kind, some in kinds:
                for tolerance in TOLERANCES:
                    used, r, harder = [], [], []
                    for one in some:
                        taken = settled(one, tolerance * unit)
                        answers = one[taken - 1, np.arange(len(y))]
                        used.append(taken.mean())
                        r.append(100 * pearsonr(answers, y)[0])
                        error = np.abs(answers - y)
                        harder.append(spearmanr(taken, error)[0] if np.ptp(taken) else np.nan)
                    print(
                        f"| {kind} {tolerance} | {np.mean(used):.2f} | {np.mean(r):.1f}"
                        f" | {np.mean(harder):+.2f} |",
                        flush=True,
                    )

    texts = [TASKS[set_name].prompt.format_map(row) for row in test.to_dict("records")]
    texts, layer = texts[:TIMED_ROWS], llm.resolve_layer(RelishRegressor().layer)
    states = store.fetch(texts, llm, layer=layer, max_length=512, progress=False)
    list(llm.read(texts[:4], layers=[layer], max_length=512))
    reading = fastest(lambda: list(llm.read(texts, layers=[layer], max_length=512)))
    print(f"\nA head's time on {len(texts)} texts of {set_name}, as a share of reading them\n")
    for depth in DEPTHS:
        head = new_head(0, input_size=llm.hidden_size, n_iterations=depth)
        seconds = fastest(lambda head=head: predict_states(head, states, llm.torch_device))
        print(f"{depth} iterations: {100 * seconds / reading:.1f} %")


if __name__ == "__main__":
    main()

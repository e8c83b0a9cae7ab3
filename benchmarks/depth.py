"""Fixed numbers of iterations, and texts that stop when their prediction no longer changes.

    python benchmarks/depth.py --data FOLDER

FOLDER and the models are those of evaluation.py, whose store of states is used. On STS-B and WMT
ru-en, single heads without ridge models are fitted with 1 to 5 iterations, with own and with shared
weights. 100 r is the mean of the seeds on test rows. In the last line of the first table only the
last prediction is supervised, in all other lines the prediction after each iteration.

The second table stops each text as soon as its prediction changes by less than `tol` standard
deviations of the target. It has the mean number of iterations, 100 r, and the rank correlation of
a text's number of iterations with the error of its prediction (positive: harder texts take more).
With shared weights, a head trained with 3 iterations is also run for more of them.

At the end comes the time of a head on some test rows, as a share of reading them.
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
MORE = 8  # iterations of a head that was trained with 3 and shared weights
TOLERANCES = [0.2, 0.1, 0.05, 0.02]
TEST_ROWS = 1000
TIMED_ROWS = 128


def iterations_taken(stages: np.ndarray, tolerance: float) -> np.ndarray:
    """Iterations until the prediction for each text changes by less than `tolerance`.

    `stages`, (n_iterations, n_texts), has the predictions. A text without such a change takes all.
    """
    small = np.abs(np.diff(stages, axis=0)) < tolerance  # from the second iteration on
    return np.where(small.any(axis=0), small.argmax(axis=0) + 2, len(stages))


def with_iterations(ensemble: RelishEnsemble, n_iterations: int) -> RelishEnsemble:
    """The same weights with another number of iterations."""
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
    parser.add_argument("--data", type=Path, required=True, help="has a folder for each set")
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
            print("| iterations | 100 r | of the stages |\n| --- | --- | --- |")
            for depth in DEPTHS:
                fitted = [fit(depth, shared, seed) for seed in seeds]
                stages = np.stack(
                    [list(regressor.staged_predict(test[columns])) for regressor in fitted]
                )  # (n_seeds, n_iterations, n_texts)
                r = [[100 * pearsonr(stage, y)[0] for stage in one] for one in stages]
                print(f"| {depth} | {np.mean(r, axis=0)[-1]:.1f} | {np.mean(r, axis=0).round(1)} |")
                if depth == 3 and shared:
                    more = []
                    for regressor in fitted:
                        regressor.head_ = with_iterations(regressor.head_, MORE)
                        more.append(list(regressor.staged_predict(test[columns])))
            last = [
                list(fit(3, shared, n, deep=False).staged_predict(test[columns])) for n in seeds
            ]
            r = [[100 * pearsonr(stage, y)[0] for stage in one] for one in last]
            print(
                f"| 3, last prediction supervised | {np.mean(r, axis=0)[-1]:.1f}"
                f" | {np.mean(r, axis=0).round(1)} |"
            )
            print("\n| limit, tol | iterations | 100 r | rank correlation with error |")
            print("| --- | --- | --- | --- |")
            kinds = [("5, tol", stages)]
            if shared:
                kinds.append((f"{MORE}, trained with 3, tol", np.stack(more)))
            for kind, some in kinds:
                for tolerance in TOLERANCES:
                    used, r, harder = [], [], []
                    for one in some:
                        taken = iterations_taken(one, tolerance * unit)
                        predicted = one[taken - 1, np.arange(len(y))]
                        used.append(taken.mean())
                        r.append(100 * pearsonr(predicted, y)[0])
                        error = np.abs(predicted - y)
                        harder.append(spearmanr(taken, error)[0] if np.ptp(taken) else np.nan)
                    print(
                        f"| {kind} {tolerance} | {np.mean(used):.2f} | {np.mean(r):.1f}"
                        f" | {np.mean(harder):+.2f} |",
                        flush=True,
                    )

    texts = [TASKS[set_name].prompt.format_map(row) for row in test.to_dict("records")]
    texts, layer = texts[:TIMED_ROWS], llm.resolve_layer(RelishRegressor().layer)
    pair = TASKS[set_name].pair
    states = store.fetch(texts, llm, layer=layer, max_length=512, pair=pair, progress=False)
    list(llm.read(texts[:4], layers=[layer], max_length=512))
    reading = fastest(lambda: list(llm.read(texts, layers=[layer], max_length=512)))
    print(f"\nTime of a head on {len(texts)} texts of {set_name}, as a share of reading them\n")
    for depth in DEPTHS:
        sizes = {"input_size": llm.hidden_size, "latent_size": RelishRegressor().latent_size}
        head = new_head(0, **sizes, pair=states.matches is not None, n_iterations=depth)
        seconds = fastest(lambda head=head: predict_states(head, states, llm.torch_device))
        print(f"{depth} iterations: {100 * seconds / reading:.1f} %")


if __name__ == "__main__":
    main()

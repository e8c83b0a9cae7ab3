"""What is each default worth: one of them is changed at a time.

    python benchmarks/defaults.py --data FOLDER

evaluation.py says what FOLDER has; its models and its store of states are used. In each of its
cells a regressor is fitted on the first rows of train.csv, 1,000 by default. 100 r is measured on
the rows after them, up to the number that evaluation.py trains on; test.csv is not read. Most
settings are changed for a single head without ridge models, some for the complete method. Each
cell, variant and seed is a line of the output, and is not computed again. The table at the end has
the mean difference from the default over the cells, its standard error, and the number of cells
that are better.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np
from evaluation import TASKS, Results, find_models, load
from scipy.stats import pearsonr

from sklearn_relish import RelishRegressor, StateStore

HEAD = {"n_estimators": 1, "linear_path": False}
COMPLETE = "complete method"
VARIANTS = {
    "one head": HEAD,
    "states as they are": HEAD | {"state_norm": None},
    "squared error": HEAD | {"loss": "squared_error"},
    "learning rate 1e-3": HEAD | {"learning_rate": 1e-3},
    "learning rate 4e-3": HEAD | {"learning_rate": 4e-3},
    "weight decay 0": HEAD | {"weight_decay": 0.0},
    "weight decay 0.1": HEAD | {"weight_decay": 0.1},
    "batches of 16": HEAD | {"batch_size": 16},
    "batches of 64": HEAD | {"batch_size": 64},
    "half the epochs": HEAD | {"max_epochs": 5},
    "twice the epochs": HEAD | {"max_epochs": 20},
    "patience of 2 epochs": HEAD | {"n_iter_no_change": 2},
    "a tenth held out": HEAD | {"validation_fraction": 0.1},
    "1 iteration": HEAD | {"n_iterations": 1},
    "2 iterations": HEAD | {"n_iterations": 2},
    "4 iterations": HEAD | {"n_iterations": 4},
    "latent size 64": HEAD | {"latent_size": 64},
    "latent size 256": HEAD | {"latent_size": 256},
    "shared weights": HEAD | {"share_weights": True},
    "last prediction supervised": HEAD | {"deep_supervision": False},
    "ridge models added": HEAD | {"linear_path": True},
    "3 heads": HEAD | {"n_estimators": 3},
    "5 heads": HEAD | {"n_estimators": 5},
    COMPLETE: {},
    f"{COMPLETE}, squared error": {"loss": "squared_error"},
    f"{COMPLETE}, shared weights": {"share_weights": True},
    f"{COMPLETE}, last prediction supervised": {"deep_supervision": False},
    f"{COMPLETE}, batches of 16": {"batch_size": 16},
    f"{COMPLETE}, twice the epochs": {"max_epochs": 20},
} | {
    f"{COMPLETE}, latent size {size}, learning rate {rate}": {
        "latent_size": size,
        "learning_rate": rate,
    }
    for size in (64, 128, 256)
    for rate in (5e-4, 1e-3, 2e-3, 4e-3)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="has a folder for each set")
    parser.add_argument("--model", action="append", help="NAME=PATH of a model; can be repeated")
    parser.add_argument("--memory", default=".evaluation-states", help="folder of token states")
    parser.add_argument("--output", type=Path, default=Path("defaults.jsonl"))
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT"
    )
    parser.add_argument("--rows", type=int, default=1000, help="training rows, fewer than 2,000")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    results = Results(arguments.output)
    columns = ["text_a", "text_b"]
    models = find_models(arguments.model)
    for seed, name, set_name in product(range(arguments.seeds), models, TASKS):
        task = TASKS[set_name]
        rows = load(arguments.data / set_name, "train", task.train_rows)
        train, other = rows[: arguments.rows], rows[arguments.rows :]
        for variant in arguments.variants:
            key = {"set": set_name, "model": name, "variant": variant, "seed": seed}
            key["rows"] = arguments.rows
            if results.find(**key):
                continue
            regressor = RelishRegressor(
                models[name],
                prompt=task.prompt,
                memory=StateStore(arguments.memory),
                random_state=seed,
                **VARIANTS[variant],
            ).fit(train[columns], train["score"])
            predicted = regressor.predict(other[columns])
            results.add(**key, r=100 * pearsonr(predicted, other["score"]).statistic)
            print(key, f"{results.lines[-1]['r']:.1f}", flush=True)

    lines = results.frame()
    lines = lines[lines["rows"] == arguments.rows]
    table = lines.pivot_table(index="variant", columns=["model", "set"], values="r")
    print("| changed | compared with | gain | in cells |\n| --- | --- | --- | --- |")
    for variant in [name for name in VARIANTS if name in table.index]:
        reference = COMPLETE if variant.startswith(COMPLETE) else "one head"
        if reference not in table.index:
            continue
        gain = (table.loc[variant] - table.loc[reference]).dropna()
        error = gain.std() / np.sqrt(len(gain))
        print(
            f"| {variant} | {reference} | {gain.mean():+.1f} ± {error:.1f}"
            f" | {(gain > 0).sum()} of {len(gain)} |"
        )


if __name__ == "__main__":
    main()

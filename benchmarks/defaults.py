"""One default changed at a time: what each is worth, on training rows alone.

    python benchmarks/defaults.py --data FOLDER

FOLDER and the models are those of evaluation.py, whose store of states is used. In each of its
cells 1,000 rows of train.csv are learned from, and the figure is 100 r on the others that
evaluation.py trains on; no row of the other files is read. The head's settings are varied for a
single head, without the linear path; what is added to it, and a few settings of the whole, come
last. A line of the output for each cell and variant, none of which is run twice, and a table at the
end: the mean over the cells that have both of the difference from the base, or for a setting of the
whole from the whole, its standard error, and in how many cells it is a gain.
"""

import argparse
from pathlib import Path

import numpy as np
from evaluation import TASKS, Results, find_models, load
from scipy.stats import pearsonr

from sklearn_relish import RelishRegressor, StateStore

LEARNED = 1000
BASE = {"n_estimators": 1, "linear_path": False}
WHOLE = {"n_estimators": "auto", "linear_path": True}
VARIANTS = {
    "base": {},
    "states as they are": {"state_norm": None},
    "squared error": {"loss": "squared_error"},
    "learning rate 2.5e-4": {"learning_rate": 2.5e-4},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "weight decay 0": {"weight_decay": 0.0},
    "weight decay 0.1": {"weight_decay": 0.1},
    "batches of 16": {"batch_size": 16},
    "batches of 64": {"batch_size": 64},
    "half the epochs": {"max_epochs": 5},
    "twice the epochs": {"max_epochs": 20},
    "patience of 2 epochs": {"n_iter_no_change": 2},
    "a tenth held out": {"validation_fraction": 0.1},
    "1 iteration": {"n_iterations": 1},
    "2 iterations": {"n_iterations": 2},
    "4 iterations": {"n_iterations": 4},
    "latent size 128": {"latent_size": 128},
    "latent size 512": {"latent_size": 512},
    "shared weights": {"share_weights": True},
    "the last answer alone": {"deep_supervision": False},
    "linear path": {"linear_path": True},
    "3 heads": {"n_estimators": 3},
    "5 heads": {"n_estimators": 5},
    "all of it": WHOLE,
    "all, squared error": WHOLE | {"loss": "squared_error"},
    "all, shared weights": WHOLE | {"share_weights": True},
    "all, the last answer alone": WHOLE | {"deep_supervision": False},
    "all, batches of 16": WHOLE | {"batch_size": 16},
    "all, twice the epochs": WHOLE | {"max_epochs": 20},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder a set")
    parser.add_argument("--model", action="append", help="NAME=PATH of a model; can be repeated")
    parser.add_argument("--memory", default=".evaluation-states", help="folder of token states")
    parser.add_argument("--output", type=Path, default=Path("defaults.jsonl"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    results = Results(arguments.output)
    columns = ["text_a", "text_b"]
    for name, llm in find_models(arguments.model).items():
        for set_name, task in TASKS.items():
            rows = load(arguments.data / set_name, "train", task.train_rows)
            learned, judged = rows[:LEARNED], rows[LEARNED:]
            for variant in arguments.variants:
                key = {"set": set_name, "model": name, "variant": variant}
                if results.find(**key):
                    continue
                regressor = RelishRegressor(
                    llm,
                    prompt=task.prompt,
                    memory=StateStore(arguments.memory),
                    random_state=0,
                    **BASE | VARIANTS[variant],
                ).fit(learned[columns], learned["score"])
                predicted = regressor.predict(judged[columns])
                results.add(**key, r=100 * pearsonr(predicted, judged["score"]).statistic)
                print(key, f"{results.lines[-1]['r']:.1f}", flush=True)

    cells = results.frame().pivot(index="variant", columns=["model", "set"], values="r")
    print("| variant | compared with | gain | in cells |\n| --- | --- | --- | --- |")
    for variant in [name for name in VARIANTS if name in cells.index]:
        reference = "all of it" if variant.startswith("all, ") else "base"
        gain = (cells.loc[variant] - cells.loc[reference]).dropna()
        error = gain.std() / np.sqrt(len(gain))
        print(
            f"| {variant} | {reference} | {gain.mean():+.1f} ± {error:.1f}"
            f" | {(gain > 0).sum()} of {len(gain)} |"
        )


if __name__ == "__main__":
    main()

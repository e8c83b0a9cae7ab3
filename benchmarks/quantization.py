"""Accuracy with states in 16, 8 and 4 bits per value, on the ten cells of the evaluation.

    pip install -e ".[benchmarks]" && python benchmarks/quantization.py --data FOLDER

evaluation.py says what FOLDER has, and which language models are used. The regressor has its
default settings; with ``--single-head`` it has one head and no ridges, and takes a fifth of the
time. A fit with 8 or 4 bits is compared with the fit on states in bfloat16 with the
same rows and seed. The difference is in points of 100 r, with its standard error over sets, models
and seeds. Each text is read once: the quantized states come from the states in 16 bits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from evaluation import TASKS, Results, correlation, find_models, load
from scipy.stats import pearsonr

from sklearn_relish import FrozenLLM, RelishRegressor, StateStore, TokenStateReader, TokenStates
from sklearn_relish.states.vectors import layers_to_read

if TYPE_CHECKING:
    import pandas as pd

BITS = (None, 8, 4)
BATCH = 256


class KeptStates(TokenStateReader):
    """A reader that takes the states of a language model from a store, and rounds to bfloat16."""

    def __init__(self, llm: FrozenLLM, store: StateStore) -> None:
        self.llm, self.store = llm, store
        self.model, self.fingerprint = llm.model, llm.fingerprint
        self.n_layers, self.hidden_size = llm.n_layers, llm.hidden_size
        self.torch_dtype = torch.bfloat16

    def tokens(
        self, texts: list[str], *, max_length: int, windows: bool = False
    ) -> list[tuple[list[str], np.ndarray]]:
        return self.llm.tokens(texts, max_length=max_length, windows=windows)

    def read(
        self, texts: list[str], *, layers: Sequence[int], max_length: int, windows: bool = False
    ) -> Iterator[tuple[np.ndarray, list[TokenStates], np.ndarray]]:
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            states = [
                self.store.fetch(
                    batch, self.llm, layer=layer, max_length=max_length, progress=False
                )
                for layer in layers
            ]
            # A reader yields one array for each layer.
            states = [
                TokenStates.from_lengths(torch.cat(list(kept)).bfloat16(), kept.lengths)
                for kept in states
            ]
            yield start + np.arange(len(batch)), states, states[0].lengths.numpy()


def run(arguments: argparse.Namespace, results: Results) -> None:
    """Every fit that the results lack, all cells of a seed before the next seed."""
    models = find_models(arguments.model)
    for seed in range(arguments.seeds):
        for model, llm in models.items():
            for name in arguments.sets:
                run_cell(arguments, results, name, model, llm, seed)


def run_cell(
    arguments: argparse.Namespace,
    results: Results,
    name: str,
    model: str,
    llm: FrozenLLM,
    seed: int,
) -> None:
    """The fits of a set and a model with a seed, one for each number of bits."""
    task, columns = TASKS[name], ["text_a", "text_b"]
    train = load(arguments.data / name, "train", arguments.rows)
    test = load(arguments.data / name, "test", arguments.test_rows)
    rows = train.to_dict("records") + test.to_dict("records")
    texts = [task.prompt.format_map(row) for row in rows]
    store = StateStore(arguments.memory)
    default = RelishRegressor()
    layer, max_length = llm.resolve_layer(default.layer), default.max_length
    _, *also = layers_to_read([layer])
    store.fetch(texts, llm, layer=layer, also=also, max_length=max_length, progress=True)
    for bits in BITS:
        key = {"set": name, "model": model, "seed": seed, "bits": bits or 16}
        key |= {"train_rows": len(train), "test_rows": len(test)}
        key |= {"single_head": arguments.single_head}
        if results.find(**key):
            continue
        regressor = RelishRegressor(
            KeptStates(llm, store),
            prompt=task.prompt,
            memory=StateStore(arguments.memory, bits=bits),
            random_state=seed,
            **({"n_estimators": 1, "linear_path": False} if arguments.single_head else {}),
        )
        regressor.fit(train[columns], train["score"])
        predicted = regressor.predict(test[columns])
        results.add(**key, r=correlation(pearsonr, predicted, test["score"].to_numpy()))
        print(json.dumps(results.lines[-1]), flush=True)


def report(lines: pd.DataFrame) -> str:
    """Mean 100 r of each cell by number of bits, and the differences from 16 bits."""
    cells = lines.pivot_table(index=["model", "set"], columns="bits", values="r")
    fits = lines.pivot_table(index=["model", "set", "seed"], columns="bits", values="r")
    rows = [cells.round(1).to_string(), ""]
    for bits in (8, 4):
        difference = (fits[bits] - fits[16]).dropna()
        rows.append(
            f"{bits} bits - 16 bits: {difference.mean():+.2f} ± {difference.sem():.2f}"
            f" ({len(difference)} fits in {len(difference.groupby(['model', 'set']))} cells)"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", action="append", help="NAME=PATH of a model; can be repeated")
    parser.add_argument("--memory", default=".quantization-states", help="folder of token states")
    parser.add_argument("--output", type=Path, default=Path("quantization.jsonl"))
    parser.add_argument("--sets", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1000, help="training rows")
    parser.add_argument("--single-head", action="store_true", help="one head, without ridges")
    parser.add_argument("--test-rows", type=int, default=1000)
    arguments = parser.parse_args()
    results = Results(arguments.output)
    run(arguments, results)
    print(report(results.frame()))


if __name__ == "__main__":
    main()

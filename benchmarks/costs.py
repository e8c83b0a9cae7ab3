"""How the time of a fit grows with rows, tokens, heads and the candidates of a search.

    python benchmarks/costs.py

Training only, on random states of size 576 that are kept, so no language model is needed;
reading.py and growth.py measure reading. The first line is a fit of 500 rows of 40 tokens, 4
epochs, with 3 heads and the ridge models; the others change one thing. Seconds by the clock,
seconds of all cores together, which depend less on other work of the machine, and the ratio of the
latter to those of the first line.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sklearn_relish import (
    LLMEncoder,
    RelishRegressor,
    RelishRegressorCV,
    StateStore,
    TokenStateReader,
    TokenStates,
)

ROWS, TOKENS, HEADS, EPOCHS = 500, 40, 3, 4
FITS: dict[str, dict[str, Any]] = {
    f"{ROWS} rows of {TOKENS} tokens, {HEADS} heads": {},
    "twice the rows": {"rows": 2 * ROWS},
    "twice the tokens": {"tokens": 2 * TOKENS},
    "1 head": {"n_estimators": 1},
    "1 head, no ridge models": {"n_estimators": 1, "linear_path": False},
    "5 heads": {"n_estimators": 5},
    "latent size 256": {"latent_size": 256},
    "1 iteration": {"n_iterations": 1},
    "twice the epochs": {"max_epochs": 2 * EPOCHS},
    "search, 3 n_iterations": {"n_iterations": [1, 2, 3], "latent_size": 128},
    "search, 3 latent sizes": {"n_iterations": 3, "latent_size": [64, 128, 256]},
    "search, 3 x 3": {"n_iterations": [1, 2, 3], "latent_size": [64, 128, 256]},
}


class RandomStates(TokenStateReader):
    """Random states; each text is the number of its tokens and a seed."""

    model, fingerprint, n_layers, hidden_size = "random", "0" * 32, 30, 576
    torch_device = torch.device("cpu")

    def read(
        self, texts: list[str], *, layers: Sequence[int], max_length: int, windows: bool = False
    ) -> Any:
        for row, text in enumerate(texts):
            n_tokens, seed = map(int, text.split())
            generator = torch.Generator().manual_seed(seed)
            values = torch.randn(n_tokens, self.hidden_size, generator=generator)
            states = TokenStates.from_lengths(values, torch.tensor([n_tokens]))
            yield np.array([row]), [states] * len(layers), np.array([n_tokens])


def seconds_of_fit(*, rows: int = ROWS, tokens: int = TOKENS, **parameters: Any) -> np.ndarray:
    """Seconds by the clock and of all cores of a fit on kept states."""
    texts, y = [f"{tokens} {seed}" for seed in range(rows)], np.random.RandomState(0).randn(rows)
    store, reader = StateStore(), RandomStates()
    LLMEncoder(reader, memory=store).fit_transform(texts)
    is_search = any(isinstance(value, list) for value in parameters.values())
    parameters = {"max_epochs": EPOCHS} | parameters
    if not is_search:
        parameters = {"n_estimators": HEADS} | parameters
    cls = RelishRegressorCV if is_search else RelishRegressor
    regressor = cls(reader, memory=store, random_state=0, **parameters)
    start = np.array([time.perf_counter(), time.process_time()])
    regressor.fit(texts, y)
    return np.array([time.perf_counter(), time.process_time()]) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="the fastest one counts")
    arguments = parser.parse_args()
    seconds_of_fit(rows=64, max_epochs=1)  # the first steps of a process are slower
    rounds = []
    for _ in range(arguments.rounds):
        rounds.append([seconds_of_fit(**changes) for changes in FITS.values()])
    fastest = np.min(rounds, axis=0)
    print(f"{torch.get_num_threads()} threads\n\n| | by the clock, s | all cores, s | times |")
    print("| --- | --- | --- | --- |")
    for name, (clock, cores) in zip(FITS, fastest, strict=True):
        print(f"| {name} | {clock:.1f} | {cores:.1f} | {cores / fastest[0, 1]:.2f} |")


if __name__ == "__main__":
    main()

"""Does attention show what the prediction stands on? Tokens removed, and what that moves.

    python benchmarks/faithfulness.py --data FOLDER

FOLDER and the models are those of evaluation.py, whose store of states is used. Heads without the
linear path, which attends to nothing, learn from a set's training rows; then a tenth and a quarter
of each test text's tokens are removed: those with the largest weights (mean of heads and
iterations), or as many at random. They are removed in two ways: their states are kept from the
heads, or their characters from the text, which the language model then reads anew. The figure is
how far predictions move, in standard deviations of the target: the mean of the absolute changes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from evaluation import TASKS, find_models, load

from sklearn_relish import RelishRegressor, StateStore
from sklearn_relish.states import TokenStates
from sklearn_relish.training import head_answers

SETS = ["stsb", "wmt-ru-en"]
SHARES = [0.1, 0.25]
DRAWS = 5  # of random tokens
TEST_ROWS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder a set")
    parser.add_argument("--model", action="append", help="NAME=PATH of a model")
    parser.add_argument("--memory", default=".evaluation-states", help="folder of token states")
    arguments = parser.parse_args()
    name, llm = next(iter(find_models(arguments.model).items()))
    store, fresh = StateStore(arguments.memory), StateStore()
    columns = ["text_a", "text_b"]
    print("| set | share removed | from | most attended | random | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for set_name in SETS:
        task = TASKS[set_name]
        train = load(arguments.data / set_name, "train", task.train_rows)
        test = load(arguments.data / set_name, "test", TEST_ROWS)
        regressor = RelishRegressor(
            llm, prompt=task.prompt, memory=store, linear_path=False, random_state=0
        ).fit(train[columns], train["score"])
        found = regressor.attention(test[columns])
        texts = [one.text for one in found]
        reading = {"layer": regressor.layer_, "max_length": regressor.max_length}
        states = list(store.fetch(texts, llm, **reading))

        def answers(
            states: list[torch.Tensor], regressor: RelishRegressor = regressor
        ) -> np.ndarray:
            lengths = torch.tensor([len(some) for some in states])
            ragged = TokenStates.from_lengths(torch.cat(states), lengths)
            return head_answers(regressor.head_, ragged, llm.torch_device)[:, 0]

        whole = answers(states)
        for share in SHARES:
            moved = {"states": [], "text": []}
            for draw in range(1 + DRAWS):  # the first takes the most attended
                random = np.random.RandomState(draw)
                removed = []
                for one in found:
                    weights = one.weights.mean(axis=(0, 1, 2))
                    order = random.permutation(len(weights)) if draw else np.argsort(-weights)
                    removed.append(order[: max(1, round(share * len(order)))])
                kept = [
                    np.setdiff1d(np.arange(len(some)), out)
                    for some, out in zip(states, removed, strict=True)
                ]
                fewer = [some[rows] for some, rows in zip(states, kept, strict=True)]
                moved["states"].append(np.abs(answers(fewer) - whole).mean())
                if draw > 1:
                    continue
                cut = [
                    without(one.text, one.spans[out])
                    for one, out in zip(found, removed, strict=True)
                ]
                anew = list(fresh.fetch(cut, llm, **reading))
                moved["text"].append(np.abs(answers(anew) - whole).mean())
            for kind, (most, *others) in moved.items():
                print(
                    f"| {set_name}, {name} | {share:.0%} | {kind} | {most:.3f}"
                    f" | {np.mean(others):.3f} | {most / np.mean(others):.1f} |",
                    flush=True,
                )


def without(text: str, spans: np.ndarray) -> str:
    """A text without the characters of some spans."""
    gone = {place for begin, end in spans for place in range(begin, end)}
    return "".join(character for place, character in enumerate(text) if place not in gone)


if __name__ == "__main__":
    main()

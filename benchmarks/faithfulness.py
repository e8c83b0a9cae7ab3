"""Does the prediction depend on the tokens that are attended to? Some tokens are removed.

    python benchmarks/faithfulness.py --data FOLDER

FOLDER and the models are those of evaluation.py, whose store of states is used. Heads without ridge
models, which do not attend to tokens, are fitted on the training rows of a set. Then a tenth and a
quarter of the tokens of a test row's two texts are removed, but none of the prompt: those with the
largest weights (the mean over heads and iterations), or as many random ones (the mean of some
draws). Either only their states are removed from the input of the heads, or their characters from
the text, which the language model then reads again.

The table has the change of the predictions in standard deviations of the target (the mean of the
absolute change over texts), the ratio of the two changes with its standard error over texts (delta
method), and the share of texts that change more without the most attended tokens.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from evaluation import TASKS, find_models, load

from sklearn_relish import RelishRegressor, StateStore
from sklearn_relish.head.ensemble import RelishEnsemble
from sklearn_relish.predictor import TextAttention
from sklearn_relish.states.pairs import NO_MATCH
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training.inference import predict_states

SETS = ["stsb", "wmt-ru-en"]
COLUMNS = ["text_a", "text_b"]
SHARES = [0.1, 0.25]
DRAWS = 3  # of random tokens
TEST_ROWS = 100


def own_tokens(found: TextAttention, row: dict[str, str]) -> np.ndarray:
    """Which tokens are pieces of the row's own texts."""
    own = np.zeros(len(found.tokens), dtype=bool)
    begin, end = found.spans.T
    place = 0
    for column in COLUMNS:
        place = found.text.index(row[column], place)
        own |= (begin >= place) & (end <= place + len(row[column])) & (begin < end)
        place += len(row[column])
    return np.flatnonzero(own)


def without(text: str, spans: np.ndarray) -> str:
    """A text without the characters of some spans."""
    gone = {place for begin, end in spans for place in range(begin, end)}
    return "".join(character for place, character in enumerate(text) if place not in gone)


def some_tokens(states: TokenStates, tokens: list[np.ndarray]) -> TokenStates:
    """States of some tokens of pairs; without its match, a token is compared with the mean."""
    matches = []
    for match, rows in zip(states.matches, tokens, strict=True):
        position = torch.full((len(match),), NO_MATCH, dtype=torch.int32)
        position[rows] = torch.arange(len(rows), dtype=torch.int32)
        found = match[rows, 0].long()
        matches.append(torch.where(found < 0, NO_MATCH, position[found])[:, None])
    values = [text[rows] for text, rows in zip(states, tokens, strict=True)]
    lengths = torch.tensor([len(rows) for rows in tokens])
    matches = TokenStates.from_lengths(torch.cat(matches), lengths)
    return replace(TokenStates.from_lengths(torch.cat(values), lengths), matches=matches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="has a folder for each set")
    parser.add_argument("--model", help="NAME=PATH of a model")
    parser.add_argument("--memory", default=".evaluation-states", help="folder of token states")
    arguments = parser.parse_args()
    name, llm = next(iter(find_models(arguments.model and [arguments.model]).items()))
    store = StateStore(arguments.memory)
    print("| set | share removed | from | most attended | random | ratio | moves more in |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for set_name in SETS:
        task = TASKS[set_name]
        train = load(arguments.data / set_name, "train", task.train_rows)
        test = load(arguments.data / set_name, "test", TEST_ROWS)
        regressor = RelishRegressor(
            llm, prompt=task.prompt, memory=store, linear_path=False, random_state=0
        ).fit(train[COLUMNS], train["score"])
        found = regressor.attention(test[COLUMNS])
        own = [
            own_tokens(one, row) for one, row in zip(found, test.to_dict("records"), strict=True)
        ]
        reading = {
            "layer": regressor.layer_,
            "max_length": 512,
            "pair": task.pair,
            "progress": False,
        }
        states = store.fetch([one.text for one in found], llm, **reading)

        def answers(states: TokenStates, head: RelishEnsemble = regressor.head_) -> np.ndarray:
            return predict_states(head, states, llm.torch_device)[:, 0]

        whole = answers(states)
        for share in SHARES:
            moved: dict[str, list[np.ndarray]] = {"states": [], "text": []}
            for draw in range(1 + DRAWS):  # the first takes the most attended
                random = np.random.RandomState(draw)
                removed = []
                for one, tokens in zip(found, own, strict=True):
                    weights = one.weights.mean(axis=(0, 1, 2))[tokens]
                    order = random.permutation(len(tokens)) if draw else np.argsort(-weights)
                    removed.append(tokens[order[: max(1, round(share * len(tokens)))]])
                kept = [
                    np.setdiff1d(np.arange(len(text)), out)
                    for text, out in zip(states, removed, strict=True)
                ]
                moved["states"].append(np.abs(answers(some_tokens(states, kept)) - whole))
                cut = [
                    without(one.text, one.spans[out])
                    for one, out in zip(found, removed, strict=True)
                ]
                anew = StateStore().fetch(cut, llm, **reading)
                moved["text"].append(np.abs(answers(anew) - whole))
            for kind, (most, *draws) in moved.items():
                some = np.mean(draws, axis=0)
                ratio = most.mean() / some.mean()
                error = (most - ratio * some).std(ddof=1) / np.sqrt(len(most)) / some.mean()
                print(
                    f"| {set_name}, {name} | {share:.0%} | {kind} | {most.mean():.3f}"
                    f" | {some.mean():.3f} | {ratio:.1f} ± {error:.1f}"
                    f" | {np.mean(most > some):.0%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

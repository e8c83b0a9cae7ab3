"""How long the trainings of a fit will take, from a few steps on a sample of states."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import torch

from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training.parallel import run_all
from sklearn_relish.training.search import Candidate, train_candidates
from sklearn_relish.training.trainer import Examples, auto_epochs

TIMED_EPOCHS, MAX_TIMED = 2, 8  # epochs, and trainings of a plan
TYPICAL_TEXTS, TYPICAL_TOKENS = 32, 4096  # of a sample of `typical_states`, at most


class Plan(NamedTuple):
    """The trainings of a fit.

    Parameters
    ----------
    trainings : sequence of sequence of Candidate
        Those that run at the same time, each for one or several candidates.
    n_trainings : int
        Number of all trainings of the fit.
    n_rows, n_held_out : int
        Training rows and held-out rows of each.
    options : dict
        Further arguments of `train_head`, `device` among them.
    """

    trainings: Sequence[Sequence[Candidate]]
    n_trainings: int
    n_rows: int
    n_held_out: int
    options: dict[str, Any]


def training_seconds(plan: Plan, states: TokenStates) -> float:
    """Estimated seconds of all trainings of a plan, on texts like those of a sample."""
    sizes = plan.trainings[0][0].sizes
    if sizes.get("pair"):  # any matches take the same time
        matches = torch.zeros(int(states.lengths.sum()), 1, dtype=torch.int32)
        states = replace(states, matches=TokenStates.from_lengths(matches, states.lengths))
    if sizes.get("both_orders"):
        states = replace(states, others=states, counterparts=states.matches)
    timed = plan.trainings[:: math.ceil(len(plan.trainings) / MAX_TIMED)]
    n_sample = len(states)
    y = np.linspace(0.5, 1.5, n_sample)  # valid for each loss
    examples = Examples.of(states, y[:, None], np.ones(n_sample))
    n_held_out = round(n_sample * plan.n_held_out / max(1, plan.n_rows + plan.n_held_out))
    validation = examples[np.arange(n_held_out)] if n_held_out else None

    def train(number: int, n_epochs: int, stop: Event) -> None:
        members = [
            member._replace(training=member.training | {"max_epochs": n_epochs})
            for member in timed[number]
        ]
        options = plan.options | {"n_iter_no_change": None}
        train_candidates(members, examples, validation, number, number, stop, **options)

    def seconds(n_epochs: int) -> float:
        start = time.perf_counter()
        tasks = [partial(train, number, n_epochs) for number in range(len(timed))]
        run_all(tasks, plan.options["device"])
        return time.perf_counter() - start

    seconds(1)  # the first steps of a process are slower
    epoch_seconds = max(0.0, seconds(1 + TIMED_EPOCHS) - seconds(1)) / TIMED_EPOCHS
    n_epochs = [_timed_epochs(members[0], plan.n_rows, n_sample) for members in timed]
    return epoch_seconds * float(np.mean(n_epochs)) * plan.n_trainings / len(timed)


def _timed_epochs(candidate: Candidate, n_rows: int, n_sample: int) -> float:
    """A training of a fit, in epochs on the sample."""
    batch_size, n_epochs = candidate.training["batch_size"], candidate.training["max_epochs"]
    if n_epochs == "auto":
        n_epochs = auto_epochs(n_rows, batch_size)
    if n_sample < batch_size:
        return float(n_epochs * n_rows / n_sample)
    return float(n_epochs * math.ceil(n_rows / batch_size) / math.ceil(n_sample / batch_size))


def typical_states(n_texts: int, mean_length: float, hidden_size: int) -> TokenStates:
    """Zeros in the shape of the states of a batch of texts."""
    length = max(1, round(mean_length))
    n_sample = max(1, min(n_texts, TYPICAL_TEXTS, TYPICAL_TOKENS // length))
    values = torch.zeros(n_sample * length, hidden_size, dtype=torch.float32)
    return TokenStates.from_lengths(values, torch.full((n_sample,), length))

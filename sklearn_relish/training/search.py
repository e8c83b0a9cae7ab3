"""A search over parameters of head and training, whose trained heads form the ensemble."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from threading import Event
from typing import Any, NamedTuple, cast

import numpy as np

from sklearn_relish.head.head import RelishHead
from sklearn_relish.training.parallel import max_at_once, run_all
from sklearn_relish.training.stacking import Fold
from sklearn_relish.training.trainer import (
    Examples,
    Training,
    auto_epochs,
    new_head,
    train_head,
    train_stages,
)
from sklearn_relish.utils.messages import warn
from sklearn_relish.utils.progress import ProgressBar, log

logger = logging.getLogger(__name__)

# The parameters of a training.
TRAINING = ("deep_supervision", "learning_rate", "weight_decay", "batch_size", "max_epochs")


class Candidate(NamedTuple):
    """A combination of values.

    Parameters
    ----------
    values : dict
        By which messages name it.
    sizes : dict
        Arguments of its `RelishHead`.
    training : dict
        Arguments of `train_head`. With ``"auto"`` as `max_epochs`, the training rows of a fold
        decide.
    """

    values: dict[str, Any]
    sizes: dict[str, Any]
    training: dict[str, Any]


class TrainedHead(NamedTuple):
    """A head of a candidate that was trained without a fold, and the seconds that it took.

    `head` is None after the candidate was dropped.
    """

    head: RelishHead | None
    training: Training
    seconds: float


class SearchResult(NamedTuple):
    """The result of `search_heads`.

    Parameters
    ----------
    best_index : int
        The candidate with the highest mean score; the first one of several.
    heads : list of TrainedHead
        The heads of the best candidate, one for each fold.
    scores, seconds : ndarray of shape (n_candidates, n_folds)
        The score on each fold and the seconds of its training. NaN where a candidate was not
        trained. Candidates that share a training have its seconds.
    """

    best_index: int
    heads: list[TrainedHead]
    scores: np.ndarray
    seconds: np.ndarray


def shared_trainings(candidates: Sequence[Candidate]) -> list[list[int]]:
    """Numbers of the candidates of each training.

    With deep supervision, a head is trained for all numbers of iterations at once: candidates that
    differ in `n_iterations` alone share a training.

    Examples
    --------
    >>> deep = {"deep_supervision": True}
    >>> sizes = [{"n_iterations": n, "latent_size": d} for d in (8, 16) for n in (1, 2)]
    >>> shared_trainings([Candidate({}, size, deep) for size in sizes])
    [[0, 1], [2, 3]]
    """
    members: dict[str, list[int]] = {}
    for index, (_, sizes, training) in enumerate(candidates):
        fixed = dict(sizes)
        if training["deep_supervision"]:
            del fixed["n_iterations"]
        members.setdefault(repr((fixed, training)), []).append(index)
    return list(members.values())


def number_of_trainings(n_shared: int, n_folds: int) -> int:
    """The trainings of a search that begins with `n_shared` of them on the first fold.

    Examples
    --------
    >>> number_of_trainings(3, n_folds=5)  # 3 + 2 + 1 + 1 + 1
    8
    """
    return sum(max(1, math.ceil(n_shared / 2**fold)) for fold in range(n_folds))


def search_heads(
    examples: Examples,
    folds: Sequence[Fold],
    candidates: Sequence[Candidate],
    score: Callable[[Candidate, int, np.ndarray], float],
    *,
    seeds: Sequence[tuple[int, int]],
    trained: dict[tuple[int, int], list[TrainedHead]],
    progress: bool,
    **options: Any,
) -> SearchResult:
    """Train heads of candidates on one fold after another; drop the worse half after each.

    Candidates that share a training are dropped together, by the best of them. So the first fold
    trains all candidates, and the last ones only the best, unless there are few folds: successive
    halving [1]_ with folds as the resource.

    Parameters
    ----------
    examples : Examples
    folds : sequence of (int64 ndarray, int64 ndarray)
    candidates : sequence of Candidate
    score : callable
        Returns the score of a candidate for the held-out rows of a fold, given the candidate, the
        number of the fold and the head's predictions, of shape (n_held_out, n_outputs *
        n_predictions). Higher is better.
    seeds : sequence of (int, int)
        For each fold the seeds of the heads' weights and of the order of the texts.
    trained : dict
        By fold and number of the training. It gets each training, and those that it already has are
        not repeated.
    progress : bool
        Whether a bar counts the heads.
    **options
        Further arguments of `train_head`, `device` and `max_memory` among them.

    Returns
    -------
    SearchResult

    Raises
    ------
    FloatingPointError
        If the training of every candidate that was not dropped diverged.
    ValueError
        If none of these candidates has a finite score on a fold.

    Warns
    -----
    UserWarning
        If the training of a candidate diverged. It is dropped.

    References
    ----------
    .. [1] Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter
       Optimization", AISTATS 2016.
    """
    trainings = shared_trainings(candidates)
    scores = np.full((len(candidates), len(folds)), np.nan)
    seconds = np.full_like(scores, np.nan)
    parts = [(examples[train_rows], examples[held_out]) for train_rows, held_out in folds]
    at_once = max_at_once(parts, options["max_memory"])
    alive = list(range(len(trainings)))
    total = max(1, number_of_trainings(len(alive), len(folds)) - len(trained))
    diverged: dict[tuple[int, int], FloatingPointError] = {}

    def train(key: tuple[int, int], stop: Event) -> None:
        fold, number = key
        members = [candidates[index] for index in trainings[number]]
        try:
            trained[key] = train_candidates(members, *parts[fold], *seeds[fold], stop, **options)
        except FloatingPointError as error:
            diverged[key] = error
        else:
            _log_training(f"{fold + 1} of {len(folds)}", members, trained[key])
        bar.update(figures={"fold": f"{fold + 1}/{len(folds)}"})

    with ProgressBar(total, "Training", "head", progress) as bar:
        for fold in range(len(folds)):
            # Once a single training is left, nothing depends on the order of its folds.
            next_folds = [fold] if len(alive) > 1 else range(fold, len(folds))
            keys = [key for key in product(next_folds, alive) if key not in trained]
            run_all([partial(train, key) for key in keys], options["device"], at_once)
            for (_, number), error in diverged.items():
                if number in alive:
                    alive.remove(number)
                    if not alive:
                        raise error
                    values = [candidates[index].values for index in trainings[number]]
                    warn(f"{error} Dropped: {', '.join(map(repr, values))}.")
            for number in alive:
                for index, result in zip(trainings[number], trained[fold, number], strict=True):
                    predictions = cast(np.ndarray, result.training.oof_predictions)
                    scores[index, fold] = score(candidates[index], fold, predictions)
                    seconds[index, fold] = result.seconds
            n_before = len(alive)
            alive = _better_half(alive, trainings, scores[:, : fold + 1])
            log(
                logger,
                logging.INFO,
                "Fold %d of %d: kept %d of %d trainings",
                *(fold + 1, len(folds), len(alive), n_before),
            )
            for key, results in trained.items():  # the heads of large searches need the memory
                if key[1] not in alive:
                    trained[key] = [result._replace(head=None) for result in results]
        best_index = int(np.nanargmax(_mean(scores)))
        (number,) = [number for number, members in enumerate(trainings) if best_index in members]
        # An interrupted search with another scoring may have dropped some of the heads.
        keys = [(fold, number) for fold in range(len(folds))]
        keys = [key for key in keys if trained[key][0].head is None]
        run_all([partial(train, key) for key in keys], options["device"], at_once)
    chosen = candidates[best_index].values
    log(logger, logging.INFO, "Chose %r, mean score %.4f", chosen, np.mean(scores[best_index]))
    member = trainings[number].index(best_index)
    heads = [trained[fold, number][member] for fold in range(len(folds))]
    return SearchResult(best_index, heads, scores, seconds)


def _log_training(
    fold: str, candidates: Sequence[Candidate], results: Sequence[TrainedHead]
) -> None:
    """Log the training that some candidates share."""
    for candidate, (_, training, seconds) in zip(candidates, results, strict=True):
        best = training.history[training.best_epoch - 1]
        log(
            logger,
            logging.INFO,
            "Fold %s, %r: %d epochs in %.1f s; kept epoch %d: R² %.4f on the held-out rows",
            *(fold, candidate.values, len(training.history), seconds),
            *(training.best_epoch, best["validation_r2"]),
        )


def _mean(scores: np.ndarray) -> np.ndarray:
    """Mean of the folds' scores for each candidate, NaN if one of them is not finite."""
    return np.where(np.isfinite(scores), scores, np.nan).mean(axis=1)


def _better_half(alive: list[int], trainings: list[list[int]], scores: np.ndarray) -> list[int]:
    """The half of the trainings with the highest mean score, and the one in the middle."""
    mean = _mean(scores)
    if np.isnan([mean[index] for number in alive for index in trainings[number]]).all():
        raise ValueError(
            f"No score is finite on fold {scores.shape[1] - 1}: choose another scoring, or a cv"
            " with more texts in each fold. R² needs at least two different targets."
        )
    best = {number: np.nanmax([-np.inf, *mean[trainings[number]]]) for number in alive}
    kept = sorted(alive, key=best.__getitem__, reverse=True)[: math.ceil(len(alive) / 2)]
    return sorted(kept)


def train_candidates(
    candidates: Sequence[Candidate],
    train: Examples,
    validation: Examples | None,
    weights_seed: int,
    order_seed: int,
    stop: Event,
    **options: Any,
) -> list[TrainedHead]:
    """Train the one head of candidates that differ in their number of iterations alone.

    There must be validation examples if there are several numbers of iterations.
    """
    start = time.perf_counter()
    first = candidates[0]
    options = {**options, **first.training, "seed": order_seed, "stop": stop}
    if options["max_epochs"] == "auto":
        options["max_epochs"] = auto_epochs(len(train.states), options["batch_size"])
    iterations = sorted({candidate.sizes["n_iterations"] for candidate in candidates})
    head = new_head(weights_seed, **first.sizes | {"n_iterations": iterations[-1]})
    if len(iterations) == 1:
        results = [(head, train_head(head, train, validation, **options))]
    else:
        del options["deep_supervision"]
        held_out = cast(Examples, validation)
        results = train_stages(head, train, held_out, iterations=iterations, **options)
    seconds = time.perf_counter() - start
    trained = [TrainedHead(head, training, seconds) for head, training in results]
    return [trained[iterations.index(candidate.sizes["n_iterations"])] for candidate in candidates]

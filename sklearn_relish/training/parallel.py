"""Independent trainings at the same time, each in a thread of its own.

A training step has hundreds of small operations, which are hardly faster with several threads of
torch. Several trainings with fewer threads each use the cores better. torch releases the lock of
the interpreter while it computes.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from sklearn_relish.head.head import RelishHead
from sklearn_relish.training.trainer import Examples, Stopped, Training, train_head
from sklearn_relish.training.windows import window_size
from sklearn_relish.utils.progress import ProgressBar, log
from sklearn_relish.utils.threads import limit_threads

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

MAX_PER_THREAD = 4  # trainings at the same time, for each thread that torch may use


def run_all(
    tasks: Sequence[Callable[[threading.Event], Result]],
    device: torch.device,
    max_at_once: int | None = None,
) -> list[Result]:
    """Run tasks at the same time on a CPU, and one after another on other devices.

    Parameters
    ----------
    tasks : sequence of callable
        Each gets an event. When it is set, the task raises `Stopped`.
    device : torch.device
        Where the tasks compute.
    max_at_once : int, default=None
        The most tasks at the same time. None: as many as pay.

    Returns
    -------
    list
        The results, in the order of the tasks.

    Raises
    ------
    BaseException
        The first error of a task, or an interruption. The other tasks are stopped first.
    """
    n_threads = torch.get_num_threads()
    n_workers = number_at_once(len(tasks), device, max_at_once)
    stop = threading.Event()
    if n_workers < 2:
        return [task(stop) for task in tasks]
    results: dict[int, Result] = {}
    errors: dict[int, BaseException] = {}
    numbers = iter(range(len(tasks)))

    def work() -> None:
        limit_threads(max(1, n_threads // n_workers))
        for number in numbers:
            try:
                results[number] = tasks[number](stop)
            except BaseException as error:  # raised again in the thread that waits
                errors[number] = error
                stop.set()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(n_workers)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:  # such as KeyboardInterrupt
        stop.set()
        for thread in threads:
            thread.join()
        raise
    for number in sorted(errors):
        if not isinstance(errors[number], Stopped):
            raise errors[number]
    return [results[number] for number in range(len(tasks))]


def number_at_once(n_tasks: int, device: torch.device, max_at_once: int | None = None) -> int:
    """How many of several tasks `run_all` runs at the same time."""
    n_threads = torch.get_num_threads()
    if device.type != "cpu" or n_threads == 1:
        return 1
    return min(n_tasks, MAX_PER_THREAD * n_threads, max_at_once or n_tasks)


def train_all(
    heads: Sequence[RelishHead],
    parts: Sequence[tuple[Examples, Examples | None]],
    seeds: Sequence[int],
    *,
    device: torch.device,
    max_epochs: int,
    progress: bool,
    max_memory: float = math.inf,
    **options: Any,
) -> list[Training]:
    """Train several heads in place.

    Parameters
    ----------
    heads : sequence of RelishHead
    parts : sequence of (Examples, Examples or None)
        For each head, the training examples and the held-out ones.
    seeds : sequence of int
        For each head, the seed of the order of the texts.
    device : torch.device
        Where the heads are trained.
    max_epochs : int
        Of each head.
    progress : bool
        Whether a bar counts the epochs of all heads.
    max_memory : float, default=infinity
        As of `train_head`. If the states of a head exceed it, one head is trained at a time.
    **options
        Further arguments of `train_head`.

    Returns
    -------
    list of Training
    """
    n_heads, at_once = len(heads), max_at_once(parts, max_memory)
    one_by_one = number_at_once(n_heads, device, at_once) == 1

    def train(number: int, stop: threading.Event) -> Training:
        if one_by_one:
            bar.description = f"Training head {number + 1} of {n_heads}"
        began = time.monotonic()
        training = train_head(
            heads[number],
            *parts[number],
            seed=seeds[number],
            device=device,
            max_epochs=max_epochs,
            max_memory=max_memory,
            bar=bar,
            stop=stop,
            **options,
        )
        if len(training.history) < max_epochs:  # it stopped early
            bar.update(max_epochs - len(training.history))
        _log_training(f"{number + 1} of {n_heads}", training, parts[number], began)
        return training

    what = f"Training head 1 of {n_heads}" if one_by_one else f"Training {n_heads} heads"
    with ProgressBar(n_heads * max_epochs, what, "epoch", progress) as bar:
        return run_all([partial(train, number) for number in range(n_heads)], device, at_once)


def _log_training(
    name: str, training: Training, part: tuple[Examples, Examples | None], began: float
) -> None:
    train, validation = part
    seconds, n_epochs = time.monotonic() - began, len(training.history)
    message = "Trained head %s on %d rows for %d epochs in %.1f s"
    values = [name, len(train.states), n_epochs, seconds]
    if validation is not None:
        best = training.history[training.best_epoch - 1]
        message += "; kept epoch %d: loss %.4f and R² %.4f on %d held-out rows"
        values += [training.best_epoch, best["validation_loss"], best["validation_r2"]]
        values.append(len(validation.states))
    log(logger, logging.INFO, message, *values)


def max_at_once(parts: Sequence[tuple[Examples, Examples | None]], max_memory: float) -> int | None:
    """The most trainings at the same time: one, if each holds windows of half of the memory."""
    n_bytes = max(
        train.states.n_bytes + (0 if validation is None else validation.states.n_bytes)
        for train, validation in parts
    )
    return None if math.isinf(window_size(n_bytes, max_memory)) else 1

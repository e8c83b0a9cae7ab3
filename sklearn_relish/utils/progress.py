"""Progress: bars on standard error, and log records that do not break them."""

from __future__ import annotations

import logging
import math
import multiprocessing
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from datetime import datetime
from typing import Any
from weakref import WeakSet

from tqdm.auto import tqdm

from sklearn_relish.utils.locks import ForkSafeLock

DELAY_SECONDS = 1.0  # until a bar appears: the predictions of a service take less
REFRESH_SECONDS = 0.1  # a bar is drawn again after this time
MAX_FRACTION = 0.99  # of the bar of a fit, until the fit ends
SEARCH_TASK = "candidate-split-evaluation"  # scikit-learn's name for a fit of a search

_bars: WeakSet[Any] = WeakSet()  # tqdm's bars of this process
_bars_lock = ForkSafeLock()
_fit: ContextVar[FitProgress | None] = ContextVar("fit", default=None)


def _new_bar(**options: Any) -> tqdm[Any]:
    bar = tqdm(delay=DELAY_SECONDS, mininterval=REFRESH_SECONDS, **options)
    if not bar.disable:  # by the environment variable TQDM_DISABLE
        with _bars_lock:
            _bars.add(bar)
    return bar


def _is_wanted(verbose: bool) -> bool:
    """Whether bars are shown: in worker processes they would overwrite each other."""
    return verbose and multiprocessing.current_process().name == "MainProcess"


class ProgressBar:
    """The progress of one piece of work, on standard error.

    During a fit it is a part of the bar of that fit, see `FitProgress`. Otherwise it has a bar of
    its own, which begins with the first result and appears a second later: work in one step, such
    as the prediction of a service, has none, even if the language model is loaded first.

    Parameters
    ----------
    total : int
    description : str
        What is done, such as ``"Reading"``.
    unit : str
        What is counted. Empty: nothing.
    shown : bool
        Whether a bar is wanted.
    cost : float, default=None
        The cost of all units, in the unit of `update`. None: each unit costs the same.
    """

    def __init__(
        self, total: int, description: str, unit: str, shown: bool, cost: float | None = None
    ) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.cost = total if cost is None else cost
        self.done, self.cost_done, self.n_tokens = 0, 0.0, 0
        self.began, self.cost_began = time.monotonic(), 0.0  # of the time left
        self._fit = _fit.get()
        self._shown = self._fit is None and _is_wanted(shown)
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> ProgressBar:
        if self._fit is not None:
            self._fit.begin(self)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(
        self,
        n: int = 1,
        /,
        *,
        cost: float | None = None,
        n_tokens: int = 0,
        figures: dict[str, str] | None = None,
    ) -> None:
        """Count `n` more units, and show named figures after the bar."""
        if self._fit is not None:
            with self._fit.lock:
                is_first = self.cost_done == 0
                self.done += n
                self.cost_done += n if cost is None else cost
                self.n_tokens += n_tokens
                if is_first and self.unit == "text":  # the language model was loaded before it
                    self.began, self.cost_began = time.monotonic(), self.cost_done
                self._fit.show(self, figures)
        elif self._shown:
            # tqdm takes a lock even for a bar that is disabled.
            if self._bar is None:
                if n == 0 or n >= self.total:
                    return
                names = {"desc": self.description, "unit": self.unit}
                self._bar = _new_bar(total=self.total, initial=n, **names)
                return
            if figures:
                self._bar.set_postfix(figures, refresh=False)
            self._bar.update(n)

    def __str__(self) -> str:
        if not self.unit:
            return self.description
        return f"{self.description}, {self.unit} {self.done:,} of {self.total:,}"


class FitProgress:
    """One bar for a fit, with the time that is left of reading and of training the heads.

    In the thread that enters it, each `ProgressBar` becomes a part of the bar. It counts time: its
    length is the time so far, relative to the time so far and the estimate of the time left.

    Parameters
    ----------
    shown : bool
        Whether a bar is wanted.
    training_seconds : callable
        Estimates the time to train the heads, given the mean number of tokens of a text; NaN if it
        can't. It is called once, while texts are read, and only if the bar is on the screen.
    place : str, default=""
        Which fit of a search it is, see `place_in_search`.
    values : str, default=""
        The candidate of the search; the bar shows it at the beginning and at the end.
    """

    def __init__(
        self,
        shown: bool,
        training_seconds: Callable[[float], float],
        place: str = "",
        values: str = "",
    ) -> None:
        self.lock = threading.Lock()  # heads are trained in several threads
        self._training_seconds = training_seconds
        self._place = place
        self._name = f"{place} ({values})" if place else "Fit"
        self._later = math.nan  # estimated seconds of the parts after the reading
        self._is_estimated = False
        self._bar: tqdm[Any] | None = None
        self._shown = _is_wanted(shown)

    def __enter__(self) -> FitProgress:
        self._outer = _fit.set(self)
        if self._shown:
            self._began = time.monotonic()
            self._bar = _new_bar(
                total=1.0,
                desc=self._name,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
                miniters=0,
                smoothing=0,  # the time left is that of the mean rate: it is set by `show`
            )
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        _fit.reset(self._outer)
        if self._bar is not None:
            if kind is None:
                self._bar.n, self._bar.postfix = 1.0, None
                self._bar.set_description_str(self._name, refresh=False)
            self._bar.close()

    def begin(self, part: ProgressBar) -> None:
        """A part begins; its time left is not known yet."""
        with self.lock:
            if self._bar is not None:
                self._bar.postfix = None  # a figure of the last part
            self.show(part)

    def show(self, part: ProgressBar, figures: dict[str, str] | None = None) -> None:
        """Show how far a part is, and the time left; the caller holds the lock."""
        if self._bar is None:
            return
        now = time.monotonic()
        elapsed = now - self._began
        left = math.nan
        if part.cost_done > 0:
            if part.cost_done >= part.cost:
                left = 0.0
            elif part.cost_done > part.cost_began:
                rate = (now - part.began) / (part.cost_done - part.cost_began)
                left = rate * (part.cost - part.cost_done)
            if part.unit == "text":  # the heads are trained later
                if part.n_tokens and elapsed >= DELAY_SECONDS and not self._is_estimated:
                    self._is_estimated = True
                    mean_length = part.n_tokens / part.cost_done * part.cost / part.total
                    self._later = self._training_seconds(mean_length)
                left += self._later
        if figures:
            self._bar.set_postfix(figures, refresh=False)
        what = f"{self._place}: {part}" if self._place else str(part)
        self._bar.set_description_str(what, refresh=False)
        # Until the time left is known, the bar stays where it is.
        fraction = self._bar.n if math.isnan(left) else elapsed / max(elapsed + left, 1e-9)
        self._bar.update(min(fraction, MAX_FRACTION) - self._bar.n)


def place_in_search(context: Any) -> str:
    """Which fit of a search of scikit-learn it is, and the time that the search still takes.

    The time is that of the fits so far, one after another. Empty outside of a search.

    Parameters
    ----------
    context : sklearn.callback.CallbackContext or None
        Of the fit.
    """
    while context is not None and context.source_task_name != SEARCH_TASK:
        context = context.parent  # of a pipeline that is searched, for example
    if context is None or not context.parent.max_subtasks:
        return ""
    n_before, n_fits, began = context.task_id, context.parent.max_subtasks, context.parent.init_time
    place = f"Fit {n_before + 1} of {n_fits}"
    if n_before:
        seconds = (datetime.now(began.tzinfo) - began).total_seconds()
        left = seconds / n_before * (n_fits - n_before)
        place += f", search {tqdm.format_interval(left)} left"
    return place


def log(logger: logging.Logger, level: int, message: str, *args: object) -> None:
    """Log a message. Bars are taken from the screen before it, and come back after it."""
    if not logger.isEnabledFor(level):
        return
    with _bars_lock:
        bars = [bar for bar in _bars if bar.last_print_t >= bar.start_t + bar.delay]
    for bar in bars:
        bar.clear()
    logger.log(level, message, *args, stacklevel=2)
    for bar in bars:
        bar.refresh()

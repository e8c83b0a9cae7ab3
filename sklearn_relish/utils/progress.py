"""Progress bars."""

from __future__ import annotations

import multiprocessing
from typing import Any

from tqdm.auto import tqdm

DELAY_SECONDS = 1.0  # until a bar appears: the predictions of a service take less


class ProgressBar:
    """A progress bar on standard error, or none.

    Worker processes show none, since the bars of several processes would overwrite each other.
    Work that takes less than `DELAY_SECONDS` has none either.

    Parameters
    ----------
    total : int
    description : str
    unit : str
        What is counted.
    shown : bool
        Whether a bar is wanted.
    """

    def __init__(self, total: int, description: str, unit: str, shown: bool) -> None:
        self._bar: tqdm[Any] | None = None
        # tqdm takes a lock even for a bar that is disabled.
        if shown and multiprocessing.current_process().name == "MainProcess":
            self._bar = tqdm(total=total, desc=description, unit=unit, delay=DELAY_SECONDS)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, n: int = 1, /, **figures: str) -> None:
        """Count `n` more units, and show named figures after the bar."""
        if self._bar is not None:
            if figures:
                self._bar.set_postfix(figures, refresh=False)
            self._bar.update(n)

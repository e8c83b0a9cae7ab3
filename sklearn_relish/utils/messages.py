"""Errors and warnings: name the rows, and point to the user's line of code."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from types import FrameType

import joblib
import numpy as np
import sklearn

# Calls may pass through scikit-learn, which wraps methods, and joblib, which runs searches.
INTERNAL = tuple(
    os.path.join(os.path.dirname(path), "")
    for path in (os.path.dirname(__file__), sklearn.__file__, joblib.__file__)
)

ROWS_NAMED = 5  # further rows are only counted


def warn(message: str | Warning, category: type[Warning] = UserWarning) -> None:
    """Warn at the first caller outside of this package, scikit-learn and joblib.

    Parameters
    ----------
    message : str or Warning
    category : type, default=UserWarning
        Category of the warning if `message` is a string.
    """
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_code.co_filename.startswith(INTERNAL):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def name_rows(rows: Sequence[int] | np.ndarray) -> str:
    """The first few rows, and the number of further ones, for an error message.

    Examples
    --------
    >>> name_rows([3])
    'row 3'
    >>> name_rows(range(10, 20))
    'rows 10, 11, 12, 13, 14 and 5 more'
    """
    named = ", ".join(str(row) for row in rows[:ROWS_NAMED])
    more = f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
    return f"row{'s' if len(rows) > 1 else ''} {named}{more}"

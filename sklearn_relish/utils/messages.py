"""What errors and warnings have in common: the rows they name, and the user's line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

import joblib
import sklearn

# scikit-learn wraps methods, and with joblib calls them in a search.
INTERNAL = tuple(
    os.path.join(os.path.dirname(path), "")
    for path in (os.path.dirname(__file__), sklearn.__file__, joblib.__file__)
)

ROWS_NAMED = 5  # rows that an error names before it counts the rest


def warn(message: str | Warning, category: type[Warning] = UserWarning) -> None:
    """Issue a warning for the first caller outside of this package, scikit-learn and joblib.

    Parameters
    ----------
    message : str or Warning
    category : type, default=UserWarning
        Of a message that is a string.
    """
    frame, level = sys._getframe(1), 2
    while frame is not None and frame.f_code.co_filename.startswith(INTERNAL):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def name_rows(rows: Sequence[int]) -> str:
    """Rows as an error names them: the first few, and how many more.

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

"""Warnings that name the user's line, from however deep in this package they come."""

from __future__ import annotations

import os
import sys
import warnings

import joblib
import sklearn

# scikit-learn wraps methods, and with joblib calls them in a search.
INTERNAL = tuple(
    os.path.join(os.path.dirname(path), "")
    for path in (__file__, sklearn.__file__, joblib.__file__)
)


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

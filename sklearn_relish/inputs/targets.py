"""Targets to float64, and groups to numbers; errors name the rows."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.utils.validation import check_array, column_or_1d

from sklearn_relish.inputs.cells import is_missing
from sklearn_relish.utils.messages import name_rows

TEMPORAL = (datetime.date, datetime.time, datetime.timedelta, np.datetime64, np.timedelta64)


def read_targets(y: Any) -> np.ndarray:
    """Targets as numbers, checked.

    Parameters
    ----------
    y : array-like of shape (n_samples,) or (n_samples, n_outputs)
        Numbers, or strings that are numbers, in any container that scikit-learn converts.

    Returns
    -------
    float64 ndarray of the same shape
        All values are finite.

    Raises
    ------
    ValueError, TypeError
        If `y` has other values; the message names the rows.
    """
    if issparse(y):
        raise TypeError("y is sparse: pass its dense form, y.toarray().")
    if np.ma.is_masked(y):
        masked = _rows_of(np.ma.getmaskarray(y))
        raise ValueError(f"y has masked values in {name_rows(masked)}: drop these rows.")
    try:
        array = np.asarray(y)
    except ValueError as error:
        raise ValueError(f"y cannot be converted to an array of numbers: {error}") from None
    if array.ndim == 0:
        what = "a single value" if np.isscalar(y) else f"a {type(y).__name__}"
        raise ValueError(f"y must hold a number for each row, got {what}.")
    if array.dtype.kind in "mMOSTU":
        array = _numbers(array)
    y = check_array(
        array,
        dtype=np.float64,
        ensure_2d=False,
        ensure_all_finite=False,
        ensure_min_samples=0,
        input_name="y",
    )
    not_finite = _rows_of(~np.isfinite(y))
    if len(not_finite):
        raise ValueError(
            f"Input y contains NaN or infinity in {name_rows(not_finite)}: drop these rows."
        )
    return y


def read_groups(groups: Any) -> np.ndarray:
    """A number from 0 for each row, the same for rows of one group.

    Parameters
    ----------
    groups : array-like of shape (n_samples,) or (n_samples, 1)

    Returns
    -------
    int64 ndarray of shape (n_samples,)
        In the order of the sorted groups, whatever the order of the rows.

    Raises
    ------
    ValueError
        If a row has no group; the message names the rows.
    """
    labels = column_or_1d(np.asarray(groups, dtype=object)).tolist()
    missing = [row for row, label in enumerate(labels) if is_missing(label)]
    if missing:
        raise ValueError(f"groups has missing values in {name_rows(missing)}: name their groups.")
    try:
        distinct = sorted(set(labels))
    except TypeError:  # of different types
        distinct = sorted(set(labels), key=lambda label: (type(label).__name__, repr(label)))
    number = {label: i for i, label in enumerate(distinct)}
    return np.array([number[label] for label in labels], dtype=np.int64)


def _rows_of(mask: np.ndarray) -> np.ndarray:
    """Rows in which a mask is True for any output."""
    return np.flatnonzero(mask.reshape(len(mask), -1).any(axis=1))


def _numbers(array: np.ndarray) -> np.ndarray:
    """An array of objects or strings as floats, with NaN for missing cells."""
    if array.dtype.kind in "STU":
        array = array.astype(object)
    numbers = np.empty(array.shape)
    wrong = np.zeros(array.shape, dtype=bool)
    for index in np.ndindex(array.shape):
        cell = array[index]
        if is_missing(cell):
            numbers[index] = np.nan
            continue
        try:
            if isinstance(cell, TEMPORAL):
                raise TypeError
            numbers[index] = float(cell)
        except (TypeError, ValueError, OverflowError):
            wrong[index] = True
    rows = _rows_of(wrong)
    if len(rows):
        cell = array[wrong][0]
        what = "a date or a time" if isinstance(cell, TEMPORAL) else f"a {type(cell).__name__}"
        advice = ", such as days or seconds" if isinstance(cell, TEMPORAL) else ""
        raise ValueError(
            f"y holds no number in {name_rows(rows)} (row {rows[0]} has {repr(cell)[:64]}, {what}):"
            f" y must hold a number for each row{advice}."
        )
    return numbers

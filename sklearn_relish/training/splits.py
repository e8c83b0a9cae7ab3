"""Which rows are held out from which head."""

from __future__ import annotations

import math

import numpy as np


def held_out_rows(
    groups: np.ndarray, fraction: float, n_estimators: int, random: np.random.RandomState
) -> list[np.ndarray]:
    """The rows that each estimator does not train on; rows of one group stay together.

    Parameters
    ----------
    groups : int64 ndarray of shape (n,)
        Numbers from 0, the same for equal texts.
    fraction : float
        Fraction of the groups that each estimator holds out; 0 holds out nothing. The estimators
        hold out different groups as long as there are enough of them. A single group is never held
        out.
    n_estimators : int
    random : RandomState
        Draws the order of the groups.

    Returns
    -------
    list of int64 ndarray
        Row numbers for each estimator.

    Raises
    ------
    ValueError
        If no group would be left to train on.
    """
    n_groups = groups.max() + 1
    n_held_out = math.ceil(fraction * n_groups) if n_groups > 1 else 0
    if n_held_out == n_groups:
        raise ValueError(
            f"validation_fraction={fraction} of {n_groups} texts leaves none to train on: lower it,"
            " or pass early_stopping=False."
        )
    order = random.permutation(n_groups)
    starts = [i * n_held_out for i in range(n_estimators)]
    return [
        np.flatnonzero(np.isin(groups, order[np.arange(start, start + n_held_out) % n_groups]))
        for start in starts
    ]

"""Ridges on pooled states: closed forms that foretell each row without having seen it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls
from sklearn import config_context
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from sklearn_relish.head.pooling import POOLINGS, pool
from sklearn_relish.states.token_states import TokenStates

PENALTIES = np.logspace(0, 6, 19)  # on standardized features and targets
PRIOR_ROWS = 100.0  # rows that the prior weights count for
SIZE, SIZE_ROWS, LEAST_SIZE = 0.6, 30.0, 0.1  # of all together: expected, its rows, and at least


class Ridge(NamedTuple):
    """A linear function of pooled states, and what it foretells of its training rows.

    `coef` is (n_outputs, D), `intercept` (n_outputs,), `oof_predictions` (n_texts, n_outputs): for
    each row the prediction of the ridge without that row, less the mean of the others' targets.
    """

    coef: np.ndarray
    intercept: np.ndarray
    oof_predictions: np.ndarray


def fit_ridges(
    states: TokenStates, state_norm: str | None, y: np.ndarray, weight: np.ndarray
) -> list[Ridge]:
    """A ridge for each of `POOLINGS`, its penalty chosen by leave-one-out validation.

    Parameters
    ----------
    states : TokenStates
    state_norm : {"rms", None}
        As of the head.
    y : ndarray of shape (n_texts, n_outputs)
        Standardized targets.
    weight : ndarray of shape (n_texts,)

    Returns
    -------
    list of Ridge
    """
    weighted = weight[:, None] * y
    others = (weighted.sum(axis=0) - weighted) / (weight.sum() - weight)[:, None]
    ridges = []
    for pooling in POOLINGS:
        X = pool(states, pooling, state_norm).double().numpy()
        scaler = StandardScaler().fit(X, sample_weight=weight)
        ridge = RidgeCV(
            PENALTIES,
            scoring="neg_mean_squared_error",  # with a scorer, predictions are what is stored
            store_cv_results=True,
            alpha_per_target=True,
        )
        with config_context(enable_metadata_routing=False):  # else the scorer would want requests
            ridge.fit(scaler.transform(X), y, sample_weight=weight)
        coef = ridge.coef_.reshape(y.shape[1], -1) / scaler.scale_
        stored = ridge.cv_results_.reshape(len(y), y.shape[1], len(PENALTIES))
        chosen = np.searchsorted(PENALTIES, np.broadcast_to(ridge.alpha_, y.shape[1]))
        oof_predictions = np.take_along_axis(stored, chosen[None, :, None], axis=2)[:, :, 0]
        ridges.append(Ridge(coef, ridge.intercept_ - coef @ scaler.mean_, oof_predictions - others))
    return ridges


def stack(
    oof_predictions: Sequence[np.ndarray], y: np.ndarray, weight: np.ndarray, prior: Sequence[float]
) -> np.ndarray:
    """Weights that make one prediction of several.

    Least squares with no weight below 0 (stacked regressions [1]_), drawn to the prior weights.
    Each prediction is first brought to unit size: one that its maker has shrunk to next to
    nothing, for want of rows, may order texts better than the others. How large all of them
    together should be is asked after that.

    Parameters
    ----------
    oof_predictions : sequence of ndarray of shape (n,)
        Predictions for rows that their makers had not seen, less the mean of the targets that they
        had: it is the lower, the higher the row's own target is, and where there is little else to
        a prediction, it would seem worse than nothing.
    y, weight : ndarray of shape (n,)
        Standardized target and weight of each row.
    prior : sequence of float
        A weight for each.

    Returns
    -------
    ndarray of shape (len(oof_predictions),)

    References
    ----------
    .. [1] Breiman, "Stacked Regressions", Machine Learning 24, 1996.

    Examples
    --------
    >>> import numpy as np
    >>> y = np.tile([-1.0, 1.0], 5000)
    >>> noise = np.tile([-1.0, -1.0, 1.0, 1.0], 2500)
    >>> stack([y + noise, 0.01 * (y - noise)], y, np.ones(10_000), [0.5, 0.5]).round(1)
    array([ 0.5, 49.9])
    """
    told = np.column_stack(oof_predictions)
    size = np.sqrt(np.average(told**2, axis=0, weights=weight))
    size = np.where(size > 0, size, np.inf)
    told, root, firmness = told / size, np.sqrt(weight), np.sqrt(PRIOR_ROWS)
    share, _ = nnls(
        np.vstack([root[:, None] * told, firmness * np.eye(len(prior))]),
        np.concatenate([root * y, firmness * np.asarray(prior)]),
    )
    together = told @ share
    square = np.average(together**2, weights=weight)
    if square == 0:
        return np.zeros(len(prior))
    fitting = weight @ (together * y) + SIZE_ROWS * SIZE * square
    scale = fitting / ((weight.sum() + SIZE_ROWS) * square)
    return max(scale, LEAST_SIZE) * share / size

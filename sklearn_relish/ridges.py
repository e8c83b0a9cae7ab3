"""Ridges on pooled states: closed forms that foretell each row without having seen it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls
from sklearn import config_context
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from sklearn_relish.pooling import POOLINGS, pool
from sklearn_relish.states import TokenStates

PENALTIES = np.logspace(0, 6, 19)  # on standardized features and targets
PRIOR_ROWS = 30.0  # rows, of a prediction of unit variance, that the prior weights count for


class Ridge(NamedTuple):
    """A linear function of pooled states, and what it foretells of its training rows.

    `coef` is (n_outputs, D), `intercept` (n_outputs,), `foretold` (n_texts, n_outputs): for each
    row the prediction of the ridge without that row, less the mean of the others' targets.
    """

    coef: np.ndarray
    intercept: np.ndarray
    foretold: np.ndarray


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
        foretold = np.take_along_axis(stored, chosen[None, :, None], axis=2)[:, :, 0]
        ridges.append(Ridge(coef, ridge.intercept_ - coef @ scaler.mean_, foretold - others))
    return ridges


def stack(
    foretold: Sequence[np.ndarray], y: np.ndarray, weight: np.ndarray, prior: Sequence[float]
) -> np.ndarray:
    """Weights that make one prediction of several.

    Least squares with no weight below 0 (stacked regressions [1]_), drawn to the prior weights.

    Parameters
    ----------
    foretold : sequence of ndarray of shape (n,)
        Predictions for rows that their makers had not seen, less the mean of the targets that they
        had: it is the lower, the higher the row's own target is, and where there is little else to
        a prediction, it would seem worse than nothing.
    y, weight : ndarray of shape (n,)
        Standardized target and weight of each row.
    prior : sequence of float
        A weight for each.

    Returns
    -------
    ndarray of shape (len(foretold),)

    References
    ----------
    .. [1] Breiman, "Stacked Regressions", Machine Learning 24, 1996.

    Examples
    --------
    >>> import numpy as np
    >>> y = np.tile([-1.0, 1.0], 500)
    >>> noise = np.tile([-1.0, -1.0, 1.0, 1.0], 250)
    >>> stack([y + noise, y - noise], y, np.ones(1000), [0.5, 0.5]).round(2)
    array([0.5, 0.5])
    """
    root, firmness = np.sqrt(weight), np.sqrt(PRIOR_ROWS)
    share, _ = nnls(
        np.vstack([root[:, None] * np.column_stack(foretold), firmness * np.eye(len(prior))]),
        np.concatenate([root * y, firmness * np.asarray(prior)]),
    )
    return share

"""Heads and ridges, fitted and weighted together by their out-of-fold predictions.

The ridges are linear models on pooled states. They make the linear path of a `RelishEnsemble`.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from scipy.optimize import nnls
from sklearn import config_context
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from sklearn_relish.head.ensemble import LINEAR_POOLINGS, RelishEnsemble
from sklearn_relish.head.head import RelishHead
from sklearn_relish.head.losses import Loss
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.states.vectors import N_VECTORS, PAIR_RIDGES
from sklearn_relish.training.inference import pool_states
from sklearn_relish.training.parallel import train_all
from sklearn_relish.training.summary import add_ridges, summarize_heads, weighted_r2
from sklearn_relish.training.trainer import Examples, Training
from sklearn_relish.training.windows import window_size
from sklearn_relish.utils.messages import warn
from sklearn_relish.utils.progress import ProgressBar, log

logger = logging.getLogger(__name__)

MIN_TEXTS = 10  # held-out texts; with fewer there are no ridges
MAX_RIDGE_TEXTS = 10_000  # that the ridges are fitted on
MAX_RELATED = 0.5  # share of related texts above which the ridges are fitted fold by fold
PENALTIES = np.logspace(0, 6, 19)  # of the ridges, on standardized features and targets
# Weights without any rows to estimate them from: of the heads, and of the ridge of each pooling.
PRIOR_WEIGHTS = (0.5, 0.2, 0.15, 0.15)
PAIR_PRIOR_WEIGHTS = (0.5, 0.1, 0.1, 0.1, 0.1, 0.1)  # of pairs, which have further ridges
PRIOR_ROWS = 100.0  # rows that the prior weights, and a mean error of 0, count for
# Predictions smaller than this share of the targets are rounding errors.
SMALLEST_SHARE = 1e-9
# How large the weighted sum is, relative to its least squares fit: prior, its rows, and minimum.
PRIOR_SCALE, PRIOR_SCALE_ROWS, MIN_SCALE = 0.6, 30.0, 0.1

Fold = tuple[np.ndarray, np.ndarray]  # numbers of the training rows and of the held-out rows


class FittedEnsemble(NamedTuple):
    """The result of `fit_ensemble`.

    Parameters
    ----------
    ensemble : RelishEnsemble
        On the CPU.
    trainings : list of Training
        One for each head.
    oof_predictions : ndarray of shape (n, n_outputs * n_predictions)
        The ensemble's prediction for each row by heads and ridges that were fitted without it. NaN
        if there are none.
    summary : list of dict
        A row for each head and ridge, see `RelishRegressor.ensemble_summary_`.
    """

    ensemble: RelishEnsemble
    trainings: list[Training]
    oof_predictions: np.ndarray
    summary: list[dict[str, Any]]


class RidgeFit(NamedTuple):
    """A linear function of pooled states.

    Parameters
    ----------
    coef : ndarray of shape (n_outputs, D or 2 * D)
        Of the pooled states, and of the vectors of the text.
    intercept : ndarray of shape (n_outputs,)
    oof_predictions : ndarray of shape (n_texts, n_outputs)
        Prediction for each training row by the ridge without that row, minus the mean of the
        targets of the other rows.
    target_means : ndarray of shape (n_texts, n_outputs)
        These means.
    """

    coef: np.ndarray
    intercept: np.ndarray
    oof_predictions: np.ndarray
    target_means: np.ndarray


class Ridges(NamedTuple):
    """The ridges of a linear path.

    Parameters
    ----------
    texts : int64 ndarray of shape (n_fitted,)
        Numbers of the texts that they are fitted on.
    of_views : list of dict of str to RidgeFit
        For each view of the texts, by the names of the ridges, see `fit_ridges`.
    """

    texts: np.ndarray
    of_views: list[dict[str, RidgeFit]]

    @property
    def names(self) -> list[str]:
        """The names of the ridges."""
        return list(self.of_views[0])

    def oof_predictions(self, name: str) -> np.ndarray:
        """Out-of-fold predictions of a ridge, see `RidgeFit`: the mean over the views."""
        of_views = [fits[name].oof_predictions for fits in self.of_views]
        return of_views[0] if len(of_views) == 1 else np.mean(of_views, axis=0)


def fit_ensemble(
    examples: Examples,
    groups: np.ndarray,
    held_out: list[np.ndarray],
    *,
    make_head: Callable[[int, int], RelishHead],
    linear_path: bool | str,
    loss_fn: Loss,
    random: np.random.RandomState,
    views: Sequence[TokenStates] = (),
    components: np.ndarray | None = None,
    max_memory: float = math.inf,
    **training: Any,
) -> FittedEnsemble:
    """Train a head for each set of held-out rows, and fit the linear path.

    Each head is trained on all rows but its held-out ones, which decide on early stopping. The
    linear path has the ridges of `fit_ridges`, with leave-one-out predictions in closed form. Heads
    and ridges are weighted by their out-of-fold predictions, see `stack`. A row's out-of-fold
    prediction is that of a single head where each row is held out once, so the mean of the heads
    has the weight of one of them.

    With further views, such as the texts of other prompts, the heads are trained on all views of
    their rows, and each view has its own ridges. A row's prediction is the mean over its views.

    Parameters
    ----------
    examples : Examples
    groups : int64 ndarray of shape (n,)
        A number from 0 for each example, the same for equal texts.
    held_out : list of int64 ndarray
        The held-out rows of each head, with equal texts together. Empty for a head that is trained
        on all rows.
    make_head : callable
        Returns a head, given its number from 0 and a seed. It is trained in place.
    linear_path : bool or "auto"
        Whether there is a linear path, given enough held-out texts and a loss that predicts a mean.
        True warns if there is none for want of texts, ``"auto"`` does not.
    loss_fn : Loss
    random : RandomState
        Draws each head's seed, the order of its texts and the texts of the ridges.
    views : sequence of TokenStates, default=()
        Further states of the same rows, in the same order.
    components : int64 ndarray of shape (n,), default=None
        A number for each example, the same for those that share the text of a view: `held_out` has
        them together. None: the groups.
    max_memory : float, default=infinity
        Bytes of states up to which they are all held in memory, see `train_head`.
    **training
        Further arguments of `train_all`.

    Returns
    -------
    FittedEnsemble
    """
    n_rows = len(examples.states)
    folds = [(np.setdiff1d(np.arange(n_rows), rows), rows) for rows in held_out]
    seeds = random.randint(np.iinfo(np.int32).max, size=(len(folds), 2)).tolist()
    heads = [make_head(number, seed) for number, (seed, _) in enumerate(seeds)]
    norm = heads[0].sizes["state_norm"]
    related = _related_texts(groups, groups if components is None else components)
    ridges = fit_linear_path(
        examples,
        groups,
        folds,
        [norm],
        linear_path=linear_path,
        by_fold=bool(related.mean() > MAX_RELATED),
        related=related,
        loss_fn=loss_fn,
        random=random,
        views=views,
        max_memory=max_memory,
    )
    all_views, n_views = examples.with_views(views), 1 + len(views)

    def examples_of(rows: np.ndarray) -> Examples:
        return all_views[np.concatenate([rows + view * n_rows for view in range(n_views)])]

    trainings = train_all(
        heads,
        [(examples_of(train), examples_of(rows) if len(rows) else None) for train, rows in folds],
        [seed for _, seed in seeds],
        loss_fn=loss_fn,
        max_memory=max_memory,
        **training,
    )
    trainings = [training.with_mean_of_views(n_views) for training in trainings]
    found = ridges.get(norm)
    return combine(
        examples, groups, folds, heads, trainings, found, loss_fn=loss_fn, n_views=n_views
    )


def fit_linear_path(
    examples: Examples,
    groups: np.ndarray,
    folds: Sequence[Fold],
    state_norms: Iterable[str | None],
    *,
    linear_path: bool | str,
    by_fold: bool = False,
    related: np.ndarray | None = None,
    loss_fn: Loss,
    random: np.random.RandomState,
    views: Sequence[TokenStates] = (),
    max_memory: float = math.inf,
) -> dict[str | None, Ridges]:
    """Fit the ridges on a sample of at most `MAX_RIDGE_TEXTS` texts.

    Parameters
    ----------
    examples, groups
        As of `fit_ensemble`.
    folds : sequence of (int64 ndarray, int64 ndarray)
        For each head, the rows that it is trained on, and its held-out rows.
    state_norms : iterable of {"rms", None}
        Those of the heads.
    by_fold : bool, default=False
        Whether the ridges' out-of-fold predictions are those of ridges fitted on the training rows
        of a fold, not leave-one-out. Needed if texts of a fold are related, such as groups.
    related : bool ndarray of shape (n_texts,), default=None
        Texts without a leave-one-out prediction, because the rows of others are too similar.
    linear_path, loss_fn, random, views, max_memory
        As of `fit_ensemble`.

    Returns
    -------
    dict of Ridges
        For each of `state_norms`; empty if there is no linear path.

    Warns
    -----
    UserWarning
        If `linear_path` is True and the ridges can't be fitted.
    """
    _, first = np.unique(groups, return_index=True)  # the first row of each text
    chosen = np.sort(random.permutation(len(first))[:MAX_RIDGE_TEXTS])
    held_out = np.concatenate([rows for _, rows in folds])
    n_held_out = np.count_nonzero(np.isin(chosen, groups[held_out]))
    if not (linear_path and loss_fn.allows_linear_path):
        return {}
    if n_held_out < MIN_TEXTS:
        needed = f"{MIN_TEXTS} different held-out texts"
        return _no_ridges(linear_path, f"they need {needed}, and there are {n_held_out}")
    texts = examples.merged(groups)[chosen]
    y, weight = texts.y.double().numpy(), texts.weight.double().numpy()
    text_folds = _text_folds(folds, groups, chosen) if by_fold else None
    if text_folds == []:
        return _no_ridges(linear_path, "each text has rows in both parts of every fold")
    if not (weight < weight.sum()).all():
        return _no_ridges(linear_path, "one sample_weight is too large next to the others")
    n_bytes = max(states.n_bytes for states in (examples.states, *views))
    window_bytes = window_size(n_bytes, max_memory)
    further = [view[torch.from_numpy(first[chosen])] for view in views]
    fits = {}
    with ProgressBar(1, "Fitting the ridge models", "", shown=False):
        for norm in dict.fromkeys(state_norms):
            of_views = [
                fit_ridges(states, norm, y, weight, window_bytes, text_folds)
                for states in (texts.states, *further)
            ]
            if related is not None and not by_fold:
                for fit in itertools.chain(*(view_fits.values() for view_fits in of_views)):
                    fit.oof_predictions[related[chosen]] = np.nan
            fits[norm] = Ridges(chosen, of_views)
    return fits


def _related_texts(groups: np.ndarray, components: np.ndarray) -> np.ndarray:
    """Which texts, by their number, are in a component with other texts."""
    _, first = np.unique(groups, return_index=True)
    return np.bincount(components[first])[components[first]] > 1


def _no_ridges(linear_path: bool | str, reason: str) -> dict[str | None, Ridges]:
    """No ridges, with a warning if they were asked for."""
    if linear_path != "auto":
        warn(f"linear_path=True has no effect, because the ridges can't be fitted: {reason}.")
    return {}


def combine(
    examples: Examples,
    groups: np.ndarray,
    folds: Sequence[Fold],
    heads: list[RelishHead],
    trainings: list[Training],
    ridges: Ridges | None,
    *,
    loss_fn: Loss,
    n_views: int = 1,
) -> FittedEnsemble:
    """Make an ensemble of trained heads and ridges; see `fit_ensemble`.

    Parameters
    ----------
    examples, groups
        As of `fit_ensemble`.
    folds : sequence of (int64 ndarray, int64 ndarray)
        For each head, the rows that it was trained on, and its held-out rows.
    heads : list of RelishHead
    trainings : list of Training
        With the predictions for the held-out rows.
    ridges : Ridges or None
        None: there is no linear path.
    loss_fn : Loss
    n_views : int, default=1

    Returns
    -------
    FittedEnsemble
    """
    oof_predictions = np.zeros((len(groups), examples.y.shape[1] * loss_fn.n_predictions))
    target_means = np.zeros_like(oof_predictions)  # of the rows that each prediction learned from
    n_held_out = np.zeros(len(groups))  # how often each row was held out
    for (train_rows, rows), training in zip(folds, trainings, strict=True):
        if training.oof_predictions is not None:
            oof_predictions[rows] += training.oof_predictions
            n_held_out[rows] += 1
            if ridges is not None:
                target_means[rows] += _mean_target(examples, train_rows)
    oof_predictions[n_held_out == 0] = np.nan
    oof_predictions /= np.maximum(n_held_out, 1)[:, None]
    target_means /= np.maximum(n_held_out, 1)[:, None]

    n_vectors = examples.states.n_vectors
    ensemble = RelishEnsemble(heads, ridges is not None, loss_fn, n_vectors, n_views)
    summary = summarize_heads(examples, folds, trainings, loss_fn)
    if ridges is not None:
        oof_predictions, summary = _weight_parts(
            ensemble, summary, examples, groups, oof_predictions - target_means, ridges
        )
    parts = ", ".join(f"{row['part']} {row['contribution']:.2f}" for row in summary)
    log(logger, logging.INFO, "Contributions to the predictions: %s", parts)
    return FittedEnsemble(ensemble.eval(), trainings, oof_predictions, summary)


def _text_folds(folds: Sequence[Fold], groups: np.ndarray, chosen: np.ndarray) -> list[Fold]:
    """Positions in `chosen`, numbers of texts, of the texts of each fold.

    A text with rows in both parts of a fold belongs to the held-out ones.
    """
    text_folds = []
    for train, held_out in folds:
        tested = np.isin(chosen, groups[held_out])
        learned = np.isin(chosen, groups[train]) & ~tested
        if learned.any() and tested.any():
            text_folds.append((np.flatnonzero(learned), np.flatnonzero(tested)))
    return text_folds


def with_ridges(
    examples: Examples, groups: np.ndarray, fold: Fold, predictions: np.ndarray, ridges: Ridges
) -> np.ndarray:
    """A head's predictions for its held-out rows, weighted with those of the ridges.

    The weights come from these rows, see `stack`.

    Parameters
    ----------
    examples, groups
        As of `fit_ensemble`.
    fold : (int64 ndarray, int64 ndarray)
        The rows that the head was trained on, and its held-out rows.
    predictions : ndarray of shape (n_held_out, n_outputs)
    ridges : Ridges

    Returns
    -------
    ndarray of shape (n_held_out, n_outputs)
        NaN for rows whose text has no out-of-fold prediction of the ridges, unless all are such
        rows: then the predictions of the head.
    """
    train_rows, rows = fold
    y, weight = examples.y[rows].double().numpy(), examples.weight[rows].double().numpy()
    mean = _mean_target(examples, train_rows)
    of_rows = _ridge_predictions(ridges, groups)[rows]
    known = np.isfinite(of_rows).all(axis=(1, 2))
    if not known.any():
        return predictions
    weighted = np.full(predictions.shape, np.nan)
    for j in range(y.shape[1]):
        parts = np.column_stack([predictions[:, j] - mean[j], of_rows[:, :, j]])[known]
        weights = stack(parts, y[known, j], weight[known], prior_weights(len(ridges.names)))
        weighted[known, j] = parts @ weights + mean[j]
    return weighted


def _ridge_predictions(ridges: Ridges, groups: np.ndarray) -> np.ndarray:
    """Out-of-fold predictions of the ridges for each row, (n, n_ridges, n_outputs), or NaN."""
    found = np.stack([ridges.oof_predictions(name) for name in ridges.names], axis=1)
    of_texts = np.full((groups.max() + 1, *found.shape[1:]), np.nan)
    of_texts[ridges.texts] = found
    return of_texts[groups]


def _mean_target(examples: Examples, rows: np.ndarray) -> np.ndarray:
    """Mean of the targets of some rows, of shape (n_outputs,)."""
    return np.average(examples.y[rows].numpy(), axis=0, weights=examples.weight[rows].numpy())


def _weight_parts(
    ensemble: RelishEnsemble,
    summary: list[dict[str, Any]],
    examples: Examples,
    groups: np.ndarray,
    oof_predictions: np.ndarray,
    ridges: Ridges,
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Set the weights of the heads, and the linear path of the ensemble.

    The weights come from the rows with an out-of-fold prediction of both heads and ridges. That of
    the heads is minus the mean of their training targets. The mean error of these rows is added to
    all predictions, with `PRIOR_ROWS` further rows whose error is 0. The predictions of these rows
    are returned, NaN for the others, and the summary of the heads with the ridges.
    """
    linear = cast(nn.Linear, ensemble.linear)  # has the outputs of each view, view by view
    texts = examples.merged(groups)[ridges.texts]
    y, weight = texts.y.double().numpy(), texts.weight.double().numpy()
    names, of_rows = ridges.names, _ridge_predictions(ridges, groups)
    has_oof = np.isfinite(oof_predictions[:, 0]) & np.isfinite(of_rows[:, 0, 0])
    targets = examples.y[has_oof].double().numpy()
    row_weight = examples.weight[has_oof].double().numpy()
    stacked = np.full_like(oof_predictions, np.nan)
    sizes, all_weights = np.empty((2, y.shape[1], 1 + len(names)))
    for j in range(y.shape[1]):
        predictions = np.column_stack([oof_predictions[:, j], of_rows[:, :, j]])[has_oof]
        weights = stack(predictions, targets[:, j], row_weight, prior_weights(len(names)))
        stacked[has_oof, j] = predictions @ weights
        # Huber's loss pulls the heads towards the median of the targets, but a mean is predicted.
        errors = targets[:, j] - stacked[has_oof, j]
        shift = row_weight @ errors / (row_weight.sum() + PRIOR_ROWS)
        stacked[has_oof, j] += shift
        sizes[j], all_weights[j] = _sizes(predictions, row_weight), weights
        head_weight, *ridge_weights = weights
        ensemble.head_weight[j] = head_weight
        # Weights far above 1 are those of predictions near the mean, which they would multiply.
        excess = max(0.0, sum(ridge_weights) - 1) * np.average(y[:, j], weights=weight)
        for view, fits in enumerate(ridges.of_views):
            weighted = list(zip(ridge_weights, fits.values(), strict=True))
            size = texts.states.hidden_size
            coefs = [part * fit.coef[j].reshape(-1, size) for part, fit in weighted]
            n_poolings = len(LINEAR_POOLINGS)
            # All pooled states come before the vectors of the lower layer, and those of pairs last.
            pooled = np.stack(coefs[:n_poolings], axis=1).ravel()
            row = view * y.shape[1] + j
            linear.weight[row] = torch.from_numpy(
                np.concatenate([pooled, *(coef.ravel() for coef in coefs[n_poolings:])])
            )
            intercept = sum(part * fit.intercept[j] for part, fit in weighted)
            linear.bias[row] = intercept - excess + shift
    rows = [_ridge_row(name, ridges, y, weight) for name in names]
    return stacked, add_ridges(summary, rows, all_weights, sizes)


def _ridge_row(name: str, ridges: Ridges, y: np.ndarray, weight: np.ndarray) -> dict[str, Any]:
    """The row of a ridge in the summary of the ensemble, without its weight."""
    oof_predictions = ridges.oof_predictions(name)
    held_out = np.isfinite(oof_predictions[:, 0])
    predictions = (oof_predictions + ridges.of_views[0][name].target_means)[held_out]
    return {
        "part": f"ridge {name}",
        "best_epoch": None,
        "n_rows": len(y),
        "n_held_out": int(np.count_nonzero(held_out)),
        "validation_r2": weighted_r2(y[held_out], predictions, weight[held_out]),
    }


def _sizes(predictions: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Root mean square of each model's predictions."""
    return np.sqrt(np.average(predictions**2, axis=0, weights=weight))


def fit_ridges(
    states: TokenStates,
    state_norm: str | None,
    y: np.ndarray,
    weight: np.ndarray,
    window_bytes: float = math.inf,
    folds: Sequence[Fold] | None = None,
) -> dict[str, RidgeFit]:
    """A ridge for each of `LINEAR_POOLINGS`, with the penalty of the lowest out-of-fold error.

    It reads the pooled states and, side by side with them, those of the lower layer that the states
    have as vectors, in the same order. If the texts are pairs, each of `PAIR_RIDGES` reads two of
    their further vectors.

    Parameters
    ----------
    states : TokenStates
    state_norm : {"rms", None}
        As of the head.
    y : ndarray of shape (n_texts, n_outputs)
        Standardized targets.
    weight : ndarray of shape (n_texts,)
    window_bytes : float, default=infinity
        Bytes of states that are read from files at once, see `Windows`.
    folds : sequence of (int64 ndarray, int64 ndarray), default=None
        Numbers of the training texts and of the held-out texts. None: each text is a fold.

    Returns
    -------
    dict of str to RidgeFit
        By the name of the pooling or of the vectors. With NaN as prediction of the texts in no
        fold.
    """
    vectors = None
    if states.vectors is not None:
        vectors, _ = states.vectors.batch(torch.arange(len(states)))  # (n_texts, n_vectors, D)

    def fit(features: Tensor) -> RidgeFit:
        X = features.double().numpy()
        if folds is None:
            return _fit_ridge(X, y, weight)
        return _fit_ridge_by_fold(X, y, weight, folds)

    ridges = {}
    for number, pooling in enumerate(LINEAR_POOLINGS):
        pooled = pool_states(states, pooling, state_norm, window_bytes)
        if vectors is not None:
            pooled = torch.cat([pooled, vectors[:, number]], dim=1)
        ridges[pooling] = fit(pooled)
    if vectors is not None and vectors.shape[1] > N_VECTORS:
        for name, numbers in PAIR_RIDGES.items():
            ridges[name] = fit(vectors[:, numbers].flatten(1))
    return ridges


def prior_weights(n_ridges: int) -> tuple[float, ...]:
    """Prior weights of the heads and of each ridge."""
    return PRIOR_WEIGHTS if n_ridges == len(PRIOR_WEIGHTS) - 1 else PAIR_PRIOR_WEIGHTS


def _fit_ridge(X: np.ndarray, y: np.ndarray, weight: np.ndarray) -> RidgeFit:
    """A ridge with leave-one-out predictions."""
    weighted = weight[:, None] * y
    mean_of_rest = (weighted.sum(axis=0) - weighted) / (weight.sum() - weight)[:, None]
    scaler = StandardScaler().fit(X, sample_weight=weight)
    ridge = RidgeCV(
        PENALTIES,
        scoring="neg_mean_squared_error",  # with a scorer, predictions are what is stored
        store_cv_results=True,
        alpha_per_target=True,
        gcv_mode="svd" if X.shape[0] > X.shape[1] else "eigen",  # the faster one
    )
    with config_context(enable_metadata_routing=False):  # otherwise the scorer needs requests
        ridge.fit(scaler.transform(X), y, sample_weight=weight)
    coef = ridge.coef_.reshape(y.shape[1], -1) / scaler.scale_
    stored = ridge.cv_results_.reshape(len(y), y.shape[1], len(PENALTIES))
    chosen = np.searchsorted(PENALTIES, np.broadcast_to(ridge.alpha_, y.shape[1]))
    left_out = np.take_along_axis(stored, chosen[None, :, None], axis=2)[:, :, 0]
    intercept = ridge.intercept_ - coef @ scaler.mean_
    return RidgeFit(coef, intercept, left_out - mean_of_rest, mean_of_rest)


def _fit_ridge_by_fold(
    X: np.ndarray, y: np.ndarray, weight: np.ndarray, folds: Sequence[Fold]
) -> RidgeFit:
    """A ridge whose out-of-fold predictions and penalties follow from folds."""
    predictions = np.zeros((len(PENALTIES), *y.shape))  # minus the mean of the training targets
    means, n_held_out = np.zeros_like(y), np.zeros(len(y))
    for train, held_out in folds:
        scaler = StandardScaler().fit(X[train], sample_weight=weight[train])
        learned, tested = scaler.transform(X[train]), scaler.transform(X[held_out])
        mean = np.average(y[train], axis=0, weights=weight[train])
        means[held_out] += mean
        n_held_out[held_out] += 1
        for number, penalty in enumerate(PENALTIES):
            ridge = Ridge(penalty).fit(learned, y[train], sample_weight=weight[train])
            predictions[number, held_out] += ridge.predict(tested).reshape(-1, y.shape[1]) - mean
    is_held_out = n_held_out > 0
    predictions[:, is_held_out] /= n_held_out[is_held_out, None]
    means[is_held_out] /= n_held_out[is_held_out, None]
    predictions[:, ~is_held_out] = np.nan
    errors = (predictions + means - y)[:, is_held_out] ** 2
    chosen = np.average(errors, axis=1, weights=weight[is_held_out]).argmin(axis=0)  # (n_outputs,)
    scaler = StandardScaler().fit(X, sample_weight=weight)
    ridge = Ridge(PENALTIES[chosen]).fit(scaler.transform(X), y, sample_weight=weight)
    coef = ridge.coef_.reshape(y.shape[1], -1) / scaler.scale_
    oof_predictions = predictions[chosen, :, np.arange(y.shape[1])].T
    return RidgeFit(coef, ridge.intercept_ - coef @ scaler.mean_, oof_predictions, means)


def stack(
    oof_predictions: np.ndarray, y: np.ndarray, weight: np.ndarray, prior: Sequence[float]
) -> np.ndarray:
    """Weights of models, from their out-of-fold predictions.

    Least squares without negative weights (stacked regressions [1]_), pulled to the prior weights.
    Each model's predictions are first scaled to unit size, since a model with few rows may shrink
    them to almost nothing and still order texts better than the others. The scale of the weighted
    sum is fitted after that.

    Parameters
    ----------
    oof_predictions : ndarray of shape (n, n_models)
        Predictions for rows that the models were not fitted on, minus the mean of the targets that
        they were fitted on. That mean is lower, the higher the row's own target is. If it were not
        subtracted, a model that predicts little else would seem to be worse than nothing.
    y, weight : ndarray of shape (n,)
        Standardized target and weight of each row.
    prior : sequence of float
        The prior weight of each model.

    Returns
    -------
    ndarray of shape (n_models,)
        A model whose predictions are rounding errors has weight 0. If all targets are 0, the first
        model has weight 1 and the others 0.

    References
    ----------
    .. [1] Breiman, "Stacked Regressions", Machine Learning 24, 1996.

    Examples
    --------
    >>> import numpy as np
    >>> y = np.tile([-1.0, 1.0], 5000)
    >>> noise = np.tile([-1.0, -1.0, 1.0, 1.0], 2500)
    >>> predictions = np.column_stack([y + noise, 0.01 * (y - noise)])
    >>> stack(predictions, y, np.ones(10_000), [0.5, 0.5]).round(1)
    array([ 0.5, 49.9])
    """
    size, target_size = _sizes(oof_predictions, weight), np.sqrt(np.average(y**2, weights=weight))
    if target_size == 0:  # a constant target, which leaves nothing to weight
        return np.eye(len(prior))[0]
    size = np.where(size > SMALLEST_SHARE * target_size, size, np.inf)
    scaled, root, prior_root = oof_predictions / size, np.sqrt(weight), np.sqrt(PRIOR_ROWS)
    weights, _ = nnls(
        np.vstack([root[:, None] * scaled, prior_root * np.eye(len(prior))]),
        np.concatenate([root * y, prior_root * np.asarray(prior)]),
    )
    stacked = scaled @ weights
    square = np.average(stacked**2, weights=weight)
    if square == 0:
        return np.zeros(len(prior))
    fitted = weight @ (stacked * y) + PRIOR_SCALE_ROWS * PRIOR_SCALE * square
    scale = fitted / ((weight.sum() + PRIOR_SCALE_ROWS) * square)
    return max(scale, MIN_SCALE) * weights / size

"""Several heads and a linear path, weighted by their out-of-fold error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from sklearn_relish.head.head import RelishEnsemble, RelishHead
from sklearn_relish.head.losses import Loss
from sklearn_relish.training.ridges import fit_ridges, stack
from sklearn_relish.training.trainer import Examples, Training, train_head

LEAST_TEXTS = 10  # held-out texts without which nothing is weighed
RIDGE_TEXTS = 10_000  # that the ridges are fitted on at most
PRIOR = (0.5, 0.3, 0.2)  # the weights of heads and ridges that no rows would give


class Fitted(NamedTuple):
    """What came of a fit.

    `ensemble` is on the CPU, `trainings` has the course of each head's, and `oof_predictions`,
    (n, n_outputs * n_predictions), what it foretells of each row by heads and ridges that have not
    seen it, NaN where there are none.
    """

    ensemble: RelishEnsemble
    trainings: list[Training]
    oof_predictions: np.ndarray


def fit_ensemble(
    examples: Examples,
    text: np.ndarray,
    held_out: list[np.ndarray],
    *,
    make_head: Callable[[int, int], RelishHead],
    linear_path: bool,
    loss_fn: Loss,
    random: np.random.RandomState,
    device: torch.device,
    **training: Any,
) -> Fitted:
    """Train a head for each set of held-out rows, and fit the linear path beside them.

    Each head is trained on all other rows and stopped by its own. The linear path is a ridge on
    the mean of a text's token states and one on its last state, whose leave-one-out predictions
    come with the fit. Heads and ridges are weighted by their out-of-fold predictions,
    see `sklearn_relish.training.ridges.stack`. A head is weighed alone, and
    counts for no more than that in the mean of several.

    Parameters
    ----------
    examples : Examples
    text : int64 ndarray of shape (n,)
        A number from 0 for each example, the same for equal texts.
    held_out : list of int64 ndarray
        An entry a head, equal texts together; an empty one for a head that learns from all rows.
    make_head : callable
        Given a number from 0 and a seed, a head, which is trained in place.
    linear_path : bool
        Whether there is a linear path, given enough held-out texts and an loss_fn that asks for
        a mean.
    loss_fn : Loss
    random : RandomState
        Draws each head's seed, the order of its texts and the texts of the ridges.
    device : torch.device
        Where heads are trained.
    **training
        Further arguments of `train_head`.

    Returns
    -------
    Fitted
    """
    n_rows = len(examples.states)
    heads, trainings = [], []
    oof_predictions = np.zeros((n_rows, examples.y.shape[1] * loss_fn.n_predictions))
    known, times = np.zeros_like(oof_predictions), np.zeros(n_rows)
    linear_path = linear_path and loss_fn.predicts_mean
    for number, rows in enumerate(held_out):
        learned = np.setdiff1d(np.arange(n_rows), rows)
        head = make_head(number, random.randint(np.iinfo(np.int32).max))
        course = train_head(
            head,
            examples[learned],
            examples[rows] if len(rows) else None,
            loss_fn=loss_fn,
            seed=random.randint(np.iinfo(np.int32).max),
            device=device,
            **training,
        )
        if len(rows):
            oof_predictions[rows] += course.oof_predictions
            times[rows] += 1
            if linear_path:
                y, weight = examples.y[learned].numpy(), examples.weight[learned].numpy()
                known[rows] += np.average(y, axis=0, weights=weight)
        heads.append(head)
        trainings.append(course)
    oof_predictions[times == 0] = np.nan
    oof_predictions /= np.maximum(times, 1)[:, None]
    known /= np.maximum(times, 1)[:, None]
    _, first = np.unique(text, return_index=True)
    chosen = np.sort(random.permutation(len(first))[:RIDGE_TEXTS])
    seen = times[first[chosen]] > 0
    linear_path = linear_path and np.count_nonzero(seen) >= LEAST_TEXTS
    ensemble = RelishEnsemble(heads, linear_path, loss_fn)
    if linear_path:
        weighed = np.full((len(first), oof_predictions.shape[1]), np.nan)
        weighed[chosen] = _set_linear_path(
            ensemble, examples.merged(text)[chosen], seen, (oof_predictions - known)[first[chosen]]
        )
        oof_predictions = weighed[text]
    return Fitted(ensemble.eval(), trainings, oof_predictions)


def _set_linear_path(
    ensemble: RelishEnsemble, texts: Examples, seen: np.ndarray, oof_predictions: np.ndarray
) -> np.ndarray:
    """Fit the ridges, weigh them and the heads on the texts that were held out, set weights.

    `oof_predictions` are the heads', less the mean of their training targets. Those of all models
    together are returned.
    """
    y, weight = texts.y.double().numpy(), texts.weight.double().numpy()
    ridges = fit_ridges(texts.states, ensemble.state_norm, y, weight)
    together = np.empty_like(oof_predictions)
    for j in range(y.shape[1]):
        told = [oof_predictions[:, j], *(ridge.oof_predictions[:, j] for ridge in ridges)]
        weights = stack([some[seen] for some in told], y[seen, j], weight[seen], PRIOR)
        together[:, j] = np.column_stack(told) @ weights
        share, *shares = weights
        ensemble.head_weight[j] = share
        coefs = [part * ridge.coef[j] for part, ridge in zip(shares, ridges, strict=True)]
        ensemble.linear.weight[j] = torch.from_numpy(np.concatenate(coefs))
        ensemble.linear.bias[j] = sum(
            part * ridge.intercept[j] for part, ridge in zip(shares, ridges, strict=True)
        )
    return together

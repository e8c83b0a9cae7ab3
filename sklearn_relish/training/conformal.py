"""Conformal intervals: how far off a fit was on unseen rows says how far off it may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sklearn_relish.head.losses import Loss


@dataclass(frozen=True)
class Conformal:
    """Conformity scores of held-out rows.

    A score says how far a target lies outside of its out-of-fold prediction. With several
    quantiles that is the distance to the nearer of the outermost two, negative between them [1]_.
    With one prediction it is the distance from it, divided by the prediction under the gamma loss,
    and by its square root under Poisson's, since the spread grows like that.

    Parameters
    ----------
    loss_fn : Loss
    scores : ndarray of shape (n, n_outputs)
    weight : ndarray of shape (n,)
        Of the rows, with a mean of 1.

    References
    ----------
    .. [1] Romano, Patterson and Candès, "Conformalized Quantile Regression", NeurIPS 2019.

    Examples
    --------
    >>> import numpy as np
    >>> y = np.arange(-99.0, 100.0)[:, None]
    >>> conformal = Conformal.of(Loss("huber"), np.zeros_like(y), y, np.ones(len(y)))
    >>> conformal.interval(np.array([[1000.0]]), coverage=0.9).tolist()
    [[[910.0, 1090.0]]]
    """

    loss_fn: Loss
    scores: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(
        cls, loss_fn: Loss, oof_predictions: np.ndarray, y: np.ndarray, weight: np.ndarray
    ) -> Conformal:
        """Scores of targets (n, n_outputs), given their out-of-fold predictions."""
        low, high = _ends(loss_fn, oof_predictions)
        scores = np.maximum(low - y, y - high) / _spread(loss_fn, low)
        return cls(loss_fn, scores, weight / weight.mean())

    def interval(self, responses: np.ndarray, coverage: float) -> np.ndarray:
        """Lower and upper ends, (m, n_outputs, 2), that hold a share `coverage` of fresh targets.

        Raises
        ------
        ValueError
            If there are too few held-out rows for that.
        """
        bound = coverage * (self.weight.sum() + 1)
        if bound > self.weight.sum():
            needed = math.ceil(coverage / (1 - coverage) - 1e-9)
            raise ValueError(
                f"coverage={coverage} needs {needed} held-out rows, and there were"
                f" {len(self.weight)}, equal ones counted once: fit on more, hold out a larger"
                " validation_fraction, or ask for less."
            )
        widening = np.empty(self.scores.shape[1])
        for j, scores in enumerate(self.scores.T):
            order = scores.argsort()
            total = self.weight[order].cumsum()
            # Sums of weights that should be equal differ by rounding.
            widening[j] = scores[order[np.searchsorted(total, bound * (1 - 1e-12))]]
        low, high = _ends(self.loss_fn, responses)
        widening = widening * _spread(self.loss_fn, low)
        low, high = low - widening, high + widening
        if self.loss_fn.log_link:
            low = np.maximum(low, 0.0)
        crossed = low > high  # a negative score of the middle: nothing lies between
        low = np.where(crossed, (low + high) / 2, low)
        return np.stack([low, np.maximum(low, high)], axis=2)


def _ends(loss_fn: Loss, responses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest response for each output, (n, n_outputs)."""
    responses = responses.reshape(len(responses), -1, loss_fn.n_predictions)
    return responses[:, :, 0], responses[:, :, -1]


def _spread(loss_fn: Loss, responses: np.ndarray) -> np.ndarray:
    """What a score is a multiple of."""
    powers = {"poisson": 0.5, "gamma": 1.0}
    return responses ** powers.get(loss_fn.name, 0.0)

"""Conformal intervals: errors on held-out rows show how wide an interval must be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sklearn_relish.head.losses import Loss


@dataclass(frozen=True)
class Conformal:
    """Conformity scores of held-out rows.

    A score is how far a target lies outside its out-of-fold prediction, divided by the loss's
    `interval_scale`. With one prediction it is the distance from it. With several quantiles it is
    the distance to the nearer of the outermost two, negative between them [1]_.

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
    >>> from sklearn_relish.head.losses import make_loss
    >>> y = np.arange(-99.0, 100.0)[:, None]
    >>> conformal = Conformal.of(make_loss("huber"), np.zeros_like(y), y, np.ones(len(y)))
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
        """Scores of targets, (n, n_outputs), given their out-of-fold predictions."""
        low, high = _outermost(loss_fn, oof_predictions)
        scores = np.maximum(low - y, y - high) / loss_fn.interval_scale(low)
        return cls(loss_fn, scores, weight / weight.mean())

    def interval(self, predictions: np.ndarray, coverage: float) -> np.ndarray:
        """Intervals that contain a fraction `coverage` of new targets.

        Parameters
        ----------
        predictions : ndarray of shape (m, n_outputs * n_predictions)
        coverage : float
            Above 0 and below 1.

        Returns
        -------
        ndarray of shape (m, n_outputs, 2)
            Lower and upper ends.

        Raises
        ------
        ValueError
            If there are too few held-out rows for that coverage.
        """
        rank = coverage * (self.weight.sum() + 1) * (1 - 1e-12)  # sums of weights are rounded
        if rank > self.weight.sum():
            needed = math.ceil(coverage / (1 - coverage) - 1e-9)
            raise ValueError(
                f"coverage={coverage} needs {needed} held-out rows, and there were"
                f" {len(self.weight)}, equal ones counted once: fit on more different rows,"
                " hold out a larger validation_fraction, or ask for a lower coverage."
            )
        widening = np.empty(self.scores.shape[1])
        for j, scores in enumerate(self.scores.T):
            order = scores.argsort()
            total = self.weight[order].cumsum()
            place = min(np.searchsorted(total, rank), len(order) - 1)
            widening[j] = scores[order[place]]
        low, high = _outermost(self.loss_fn, predictions)
        widening = widening * self.loss_fn.interval_scale(low)
        low, high = low - widening, high + widening
        if self.loss_fn.log_link:
            low = np.maximum(low, 0.0)
        crossed = low > high  # a negative score so large that nothing is left between the ends
        low = np.where(crossed, (low + high) / 2, low)
        return np.stack([low, np.maximum(low, high)], axis=2)


def _outermost(loss_fn: Loss, predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest prediction for each output, each (n, n_outputs)."""
    predictions = predictions.reshape(len(predictions), -1, loss_fn.n_predictions)
    return predictions[:, :, 0], predictions[:, :, -1]

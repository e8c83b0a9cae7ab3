"""Conformal intervals: how far off a fit was on unseen rows says how far off it may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sklearn_relish.head.losses import Objective


@dataclass(frozen=True)
class Conformal:
    """Conformity scores of held-out rows.

    A score says how far a target lies outside of what was foretold. With several quantiles that is
    the way to the nearer of the outermost two, negative between them [1]_. With one number for a
    target it is the distance from it, as a share of its size under the gamma loss, and of the
    root of it under Poisson's, whose spread grows like that.

    Parameters
    ----------
    objective : Objective
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
    >>> conformal = Conformal.of(Objective("huber"), np.zeros_like(y), y, np.ones(len(y)))
    >>> conformal.interval(np.array([[1000.0]]), coverage=0.9).tolist()
    [[[910.0, 1090.0]]]
    """

    objective: Objective
    scores: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(
        cls, objective: Objective, foretold: np.ndarray, y: np.ndarray, weight: np.ndarray
    ) -> Conformal:
        """Scores of targets (n, n_outputs), given the responses that were foretold for them."""
        low, high = _ends(objective, foretold)
        scores = np.maximum(low - y, y - high) / _spread(objective, low)
        return cls(objective, scores, weight / weight.mean())

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
        low, high = _ends(self.objective, responses)
        widening = widening * _spread(self.objective, low)
        low, high = low - widening, high + widening
        if self.objective.log_link:
            low = np.maximum(low, 0.0)
        crossed = low > high  # a negative score of the middle: nothing lies between
        low = np.where(crossed, (low + high) / 2, low)
        return np.stack([low, np.maximum(low, high)], axis=2)


def _ends(objective: Objective, responses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest response for each output, (n, n_outputs)."""
    responses = responses.reshape(len(responses), -1, objective.n_answers)
    return responses[:, :, 0], responses[:, :, -1]


def _spread(objective: Objective, responses: np.ndarray) -> np.ndarray:
    """What a score is a multiple of."""
    powers = {"poisson": 0.5, "gamma": 1.0}
    return responses ** powers.get(objective.loss, 0.0)

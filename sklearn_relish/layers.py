"""The choice of a layer: what the states of a few of them foretell of some training rows."""

from __future__ import annotations

import numpy as np

from sklearn_relish.ridges import fit_ridges, stack
from sklearn_relish.states import TokenStates

# Shares of the depth that are compared; the first is taken unless another is clearly better.
SHARES = (0.6, 0.5, 0.55, 0.65)
SAMPLE_SHARE, SAMPLE_ROWS = 0.45, 1_000  # of the training rows, and at most


def sample_rows(n_rows: int, random: np.random.RandomState) -> np.ndarray:
    """The rows whose states are compared; so few that reading costs a seventh more at most."""
    n_sample = min(int(np.ceil(SAMPLE_SHARE * n_rows)), SAMPLE_ROWS)
    return np.sort(random.permutation(n_rows)[:n_sample])


def choose_layer(
    states: dict[int, TokenStates], state_norm: str | None, y: np.ndarray, weight: np.ndarray
) -> tuple[int, dict[int, float]]:
    """The layer whose states tell most about the targets, and the evidence.

    Ridges on mean and last state, stacked, foretell each row from the others. The first layer is
    taken unless another one's squared errors are lower by more than the standard error of the
    difference.

    Parameters
    ----------
    states : dict of int to TokenStates
        States of the same texts at each layer.
    state_norm : {"rms", None}
        As of the head.
    y : ndarray of shape (n_texts, n_outputs)
        Standardized targets.
    weight : ndarray of shape (n_texts,)

    Returns
    -------
    layer : int
    scores : dict of int to float
        For each layer the R² of what was foretold, the mean over outputs.
    """
    errors = {}
    for layer, some in states.items():
        ridges = fit_ridges(some, state_norm, y, weight)
        squared = np.zeros(len(y))
        for j in range(y.shape[1]):
            told = [ridge.foretold[:, j] for ridge in ridges]
            share = stack(told, y[:, j], weight, [0.5, 0.5])
            squared += (np.column_stack(told) @ share - y[:, j]) ** 2
        errors[layer] = squared / y.shape[1]
    spread = np.mean(
        [np.average((t - np.average(t, weights=weight)) ** 2, weights=weight) for t in y.T]
    )
    loss = {layer: np.average(error, weights=weight) for layer, error in errors.items()}
    scores = {layer: float(1 - loss[layer] / spread) if spread else 0.0 for layer in sorted(loss)}
    first, best = next(iter(states)), min(loss, key=loss.__getitem__)
    gain = errors[first] - errors[best]
    doubt = np.linalg.norm(weight * (gain - np.average(gain, weights=weight))) / weight.sum()
    return (best if loss[first] - loss[best] > doubt else first), scores

"""The choice of a layer: ridges on a sample of the rows compare the states of a few layers."""

from __future__ import annotations

import numpy as np

from sklearn_relish.training.stacking import fit_ridges, stack
from sklearn_relish.training.trainer import Examples

# Fractions of the depth that are compared. The first is taken unless another is clearly better.
SHARES = (0.6, 0.5, 0.55, 0.65)
SAMPLE_FRACTION, MIN_TEXTS, MAX_TEXTS = 0.4, 10, 1_000


def sample_texts(n_texts: int, random: np.random.RandomState) -> np.ndarray:
    """The texts on which layers are compared: reading them costs a seventh more at most.

    Empty if there are too few texts to compare layers.
    """
    n_sample = min(int(SAMPLE_FRACTION * n_texts), MAX_TEXTS)
    return np.sort(random.permutation(n_texts)[: n_sample if n_sample >= MIN_TEXTS else 0])


def choose_layer(
    examples: dict[int, Examples], state_norm: str | None
) -> tuple[int, dict[int, float]]:
    """The layer whose states predict the targets best, and the scores of all.

    Stacked ridges on pooled states predict each row without having been fitted on it. The first
    layer is taken unless the squared errors of another one are lower by more than the standard
    error of the difference.

    Parameters
    ----------
    examples : dict of int to Examples
        The same texts, all different, with their states at each layer.
    state_norm : {"rms", None}
        As of the head.

    Returns
    -------
    layer : int
    scores : dict of int to float
        R² of the out-of-fold predictions at each layer.
    """
    first, default = next(iter(examples.items()))
    y, weight = default.y.double().numpy(), default.weight.double().numpy()
    errors = {
        layer: _squared_errors(texts, y, weight, state_norm) for layer, texts in examples.items()
    }
    variance = np.mean(
        [np.average((t - np.average(t, weights=weight)) ** 2, weights=weight) for t in y.T]
    )
    loss = {layer: np.average(error, weights=weight) for layer, error in errors.items()}
    scores = {
        layer: float(1 - loss[layer] / variance) if variance else 0.0 for layer in sorted(loss)
    }
    best = min(loss, key=loss.__getitem__)
    gain = errors[first] - errors[best]
    deviation = weight * (gain - np.average(gain, weights=weight))
    standard_error = np.linalg.norm(deviation) / weight.sum()
    return (best if loss[first] - loss[best] > standard_error else first), scores


def _squared_errors(
    texts: Examples, y: np.ndarray, weight: np.ndarray, state_norm: str | None
) -> np.ndarray:
    """Squared error of the stacked ridges' out-of-fold predictions, the mean of the outputs."""
    ridges = fit_ridges(texts.states, state_norm, y, weight)
    squared = np.zeros(len(y))
    for j in range(y.shape[1]):
        predictions = np.column_stack([ridge.oof_predictions[:, j] for ridge in ridges])
        weights = stack(predictions, y[:, j], weight, [1 / len(ridges)] * len(ridges))
        squared += (predictions @ weights - y[:, j]) ** 2
    return squared / y.shape[1]

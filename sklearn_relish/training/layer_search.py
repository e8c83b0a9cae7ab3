"""The choice of a layer: ridges on a sample of the rows compare the states of a few layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np

from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training.stacking import fit_ridges, stack
from sklearn_relish.training.trainer import Examples
from sklearn_relish.utils.progress import log

logger = logging.getLogger(__name__)

# Fractions of the depth that are compared. The first is taken unless another is clearly better.
SHARES = (0.6, 0.5, 0.55, 0.65)
SAMPLE_FRACTION, MIN_TEXTS, MAX_TEXTS = 0.4, 10, 1_000


def sample_texts(n_texts: int, random: np.random.RandomState) -> np.ndarray:
    """The texts on which layers are compared: reading them costs a seventh more at most.

    Empty if there are too few texts to compare layers.
    """
    n_sample = min(int(SAMPLE_FRACTION * n_texts), MAX_TEXTS)
    return np.sort(random.permutation(n_texts)[: n_sample if n_sample >= MIN_TEXTS else 0])


def search_layer(
    layers: Sequence[int],
    texts: Sequence[str],
    groups: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray,
    read: Callable[..., TokenStates],
    state_norm: str | None,
    random: np.random.RandomState,
) -> tuple[int, dict[int, float] | None]:
    """Read a sample of the texts at some layers, and choose one of them.

    Parameters
    ----------
    layers : sequence of int
    texts : sequence of str
        One for each row.
    groups : int64 ndarray of shape (n,)
        A number from 0 for each row, the same for equal texts.
    y : ndarray of shape (n, n_outputs)
        Standardized targets.
    weight : ndarray of shape (n,)
    read : callable
        Returns the states of texts at a layer; it keeps those of the layers in `also`.
    state_norm : {"rms", None}
        As of the head.
    random : RandomState

    Returns
    -------
    layer : int
    scores : dict of int to float, or None
        As `choose_layer`. None if there are too few texts; then it is the first layer.
    """
    sample = sample_texts(groups.max() + 1, random)
    if len(sample) == 0:
        return layers[0], None
    rows = np.flatnonzero(np.isin(groups, sample))
    _, sample_groups = np.unique(groups[rows], return_inverse=True)
    sample_rows = [texts[row] for row in rows.tolist()]
    deepest = max(layers)  # one pass to the deepest layer gives the states of all
    read(sample_rows, deepest, also=[layer for layer in layers if layer != deepest])
    examples = {}
    for layer in layers:
        states = read(sample_rows, layer)
        examples[layer] = Examples.of(states, y[rows], weight[rows]).merged(sample_groups)
    return choose_layer(examples, state_norm)


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
    layer = best if loss[first] - loss[best] > standard_error else first
    compared = ", ".join(f"layer {number} {score:.4f}" for number, score in scores.items())
    log(logger, logging.INFO, "Chose layer %d by R² of ridges: %s", layer, compared)
    return layer, scores


def _squared_errors(
    texts: Examples, y: np.ndarray, weight: np.ndarray, state_norm: str | None
) -> np.ndarray:
    """Squared error of the stacked ridges' out-of-fold predictions, the mean of the outputs."""
    ridges = fit_ridges(texts.states, state_norm, y, weight)
    squared = np.zeros(len(y))
    for j in range(y.shape[1]):
        predictions = np.column_stack([ridge.oof_predictions[:, j] for ridge in ridges.values()])
        weights = stack(predictions, y[:, j], weight, [1 / len(ridges)] * len(ridges))
        squared += (predictions @ weights - y[:, j]) ** 2
    return squared / y.shape[1]

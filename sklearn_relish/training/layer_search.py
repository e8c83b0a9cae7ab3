"""The choice of a layer: what the states of a few of them foretell of some training rows."""

from __future__ import annotations

import numpy as np

from sklearn_relish.training.ridges import fit_ridges, stack
from sklearn_relish.training.trainer import Examples

# Shares of the depth that are compared; the first is taken unless another is clearly better.
SHARES = (0.6, 0.5, 0.55, 0.65)
SAMPLE_SHARE, LEAST_TEXTS, MOST_TEXTS = 0.4, 10, 1_000


def sample_texts(n_texts: int, random: np.random.RandomState) -> np.ndarray:
    """The texts whose states are compared, so few that reading costs a seventh more at most.

    None of a set that is too small to tell the layers apart.
    """
    n_sample = min(int(SAMPLE_SHARE * n_texts), MOST_TEXTS)
    return np.sort(random.permutation(n_texts)[: n_sample if n_sample >= LEAST_TEXTS else 0])


def choose_layer(
    examples: dict[int, Examples], state_norm: str | None
) -> tuple[int, dict[int, float]]:
    """The layer whose states tell most about the targets, and the evidence.

    Ridges on mean and last state, stacked, foretell each row from the others. The first layer is
    taken unless another one's squared errors are lower by more than the standard error of the
    difference.

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
        For each layer the share of the targets' variance that was foretold.
    """
    some = next(iter(examples.values()))
    y, weight = some.y.double().numpy(), some.weight.double().numpy()
    errors = {}
    for layer, texts in examples.items():
        ridges = fit_ridges(texts.states, state_norm, y, weight)
        squared = np.zeros(len(y))
        for j in range(y.shape[1]):
            told = [ridge.oof_predictions[:, j] for ridge in ridges]
            share = stack(told, y[:, j], weight, [0.5, 0.5])
            squared += (np.column_stack(told) @ share - y[:, j]) ** 2
        errors[layer] = squared / y.shape[1]
    spread = np.mean(
        [np.average((t - np.average(t, weights=weight)) ** 2, weights=weight) for t in y.T]
    )
    loss = {layer: np.average(error, weights=weight) for layer, error in errors.items()}
    scores = {layer: float(1 - loss[layer] / spread) if spread else 0.0 for layer in sorted(loss)}
    first, best = next(iter(examples)), min(loss, key=loss.__getitem__)
    gain = errors[first] - errors[best]
    doubt = np.linalg.norm(weight * (gain - np.average(gain, weights=weight))) / weight.sum()
    return (best if loss[first] - loss[best] > doubt else first), scores

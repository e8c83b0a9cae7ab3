"""What each part of an ensemble contributes to its predictions: a row for each head and ridge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import r2_score

from sklearn_relish.head.losses import Loss
from sklearn_relish.states.vectors import PAIR_RIDGES, lower_layer
from sklearn_relish.training.trainer import Examples, Training


def summarize_heads(
    examples: Examples,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    trainings: Sequence[Training],
    loss_fn: Loss,
) -> list[dict[str, Any]]:
    """A row for each head of an ensemble without ridges, whose heads have equal weights.

    Parameters
    ----------
    examples : Examples
    folds : sequence of (int64 ndarray, int64 ndarray)
        For each head, the rows that it was trained on, and its held-out rows.
    trainings : sequence of Training
    loss_fn : Loss

    Returns
    -------
    list of dict
        See `RelishRegressor.ensemble_summary_`.
    """
    rows = []
    for number, ((train, held_out), training) in enumerate(zip(folds, trainings, strict=True), 1):
        r2 = None
        if training.oof_predictions is not None:
            r2 = weighted_r2(
                examples.y[held_out].double().numpy(),
                loss_fn.point_prediction(training.oof_predictions),
                examples.weight[held_out].double().numpy(),
            )
        rows.append(
            {
                "part": f"head {number}",
                "best_epoch": training.best_epoch,
                "n_rows": len(train),
                "n_held_out": len(held_out),
                "validation_r2": r2,
                "weight": 1 / len(folds),
                "contribution": 1 / len(folds),
            }
        )
    return rows


def add_ridges(
    heads: list[dict[str, Any]],
    ridges: list[dict[str, Any]],
    weights: np.ndarray,
    sizes: np.ndarray,
) -> list[dict[str, Any]]:
    """The rows of an ensemble of heads and ridges.

    Parameters
    ----------
    heads : list of dict
        From `summarize_heads`.
    ridges : list of dict
        A row for each ridge, without its weight and contribution.
    weights, sizes : ndarray of shape (n_outputs, 1 + n_ridges)
        For each output the weight of the heads' mean and of each ridge, and the root mean square of
        their out-of-fold predictions, which are minus the mean of the targets.
    """
    part_sizes = weights * sizes
    total = part_sizes.sum(axis=1, keepdims=True)
    contributions = (part_sizes / np.where(total > 0, total, 1)).mean(axis=0)
    weight, *ridge_weights = weights.mean(axis=0).tolist()
    contribution, *ridge_contributions = contributions.tolist()
    for row in heads:
        row["weight"], row["contribution"] = weight / len(heads), contribution / len(heads)
    for row, *values in zip(ridges, ridge_weights, ridge_contributions, strict=True):
        row["weight"], row["contribution"] = values
    return heads + ridges


def continue_summary(
    before: list[dict[str, Any]], heads: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The rows after further training of all heads; weights and ridges are as before.

    There are no scores of the heads: they may have been trained on the rows that are held out now.
    """
    kept = ("weight", "contribution")
    trained = [
        row | {name: old[name] for name in kept} | {"validation_r2": None}
        for row, old in zip(heads, before, strict=False)
    ]
    return trained + before[len(heads) :]


def history_of(trainings: Sequence[Training]) -> list[dict[str, Any]]:
    """The epochs of all heads, for `RelishRegressor.history_`."""
    return [
        {"estimator": number, **epoch}
        for number, training in enumerate(trainings)
        for epoch in training.history
    ]


def weighted_r2(y: np.ndarray, predictions: np.ndarray, weight: np.ndarray) -> float | None:
    """R² of predictions, (n, n_outputs), the mean of the outputs.

    None if no target varies, or if a prediction is not finite.
    """
    varies = (y != y[:1]).any(axis=0)
    if not varies.any() or not np.isfinite(predictions[:, varies]).all():
        return None
    return float(r2_score(y[:, varies], predictions[:, varies], sample_weight=weight))


def with_layers(summary: list[dict[str, Any]], layer: int) -> list[dict[str, Any]]:
    """The rows with the layer that each part reads; rows that have one keep it.

    Ridges of pairs read the lower layer alone, other ridges read it in addition.
    """
    layers = {f"ridge {name}": lower_layer(layer) for name in PAIR_RIDGES}
    return [
        {"part": row["part"], "layer": layers.get(row["part"], layer), **row} for row in summary
    ]

"""The losses: one class each, with everything that depends on the loss.

To add a loss, write a subclass of `Loss` here and name it in `LOSSES`.

The head returns raw predictions. The inverse link of a loss turns them into predictions in
standardized units: those of the target after division by its scale and, without a log-link,
subtraction of its mean.
"""

# ruff: noqa: D102 (the methods of a subclass are documented in `Loss`)
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import huber_loss, softplus

from sklearn_relish.utils.messages import name_rows

Array = TypeVar("Array", Tensor, np.ndarray)


@dataclass(frozen=True)
class Loss(ABC):
    """A loss on standardized targets. The subclasses are the losses.

    Parameters
    ----------
    quantiles : tuple of float, default=()
        The quantiles that are predicted. Only `QuantileLoss` has any.

    Attributes
    ----------
    name : str
        What `RelishRegressor` calls it.
    log_link : bool
        Whether raw predictions are logarithms of predictions. Targets are then divided by their
        mean and not centred.
    allows_linear_path : bool
        Whether ridge models, which estimate a mean, can be added to the heads.
    valid_targets : str
        Which targets the loss is made for, as the error message says it.
    """

    quantiles: tuple[float, ...] = ()

    name: ClassVar[str]
    log_link: ClassVar[bool] = False
    allows_linear_path: ClassVar[bool] = False
    valid_targets: ClassVar[str] = "that are finite"

    def __post_init__(self) -> None:
        if self.quantiles:
            raise ValueError(f"loss={self.name!r} takes no quantiles, got {self.quantiles}.")

    @abstractmethod
    def loss(self, raw: Tensor, y: Tensor) -> Tensor:
        """Loss of each target.

        Parameters
        ----------
        raw : Tensor of shape (n, n_outputs * n_predictions)
        y : Tensor of shape (n, n_outputs)

        Returns
        -------
        Tensor of shape (n, n_outputs)
        """

    @property
    def n_predictions(self) -> int:
        """Number of predictions for each output."""
        return 1

    def inverse_link(self, raw: Tensor) -> Tensor:
        """Predictions in standardized units, of the shape of the raw predictions."""
        return raw.exp() if self.log_link else raw

    def point_prediction(self, predictions: Array) -> Array:
        """The one prediction of each output, (n, n_outputs), that `predict` returns.

        `predictions` is a Tensor or an ndarray of shape (n, n_outputs * n_predictions).
        """
        return predictions

    def is_valid(self, y: np.ndarray) -> np.ndarray:
        """Whether the loss is made for each of the targets, a bool array of their shape."""
        return np.isfinite(y)

    def check_targets(self, y: np.ndarray) -> None:
        """Raise a ValueError with the row numbers of the targets that are not valid."""
        rows = np.flatnonzero(~self.is_valid(y).reshape(len(y), -1).all(axis=1))
        if len(rows):
            raise ValueError(
                f"loss={self.name!r} is for targets {self.valid_targets}: y is not in"
                f" {name_rows(rows)}."
            )

    def interval_scale(self, predictions: np.ndarray) -> np.ndarray:
        """How errors grow with the prediction: conformal intervals are multiples of this."""
        return np.ones_like(predictions)


class HuberLoss(Loss):
    """Huber's loss: squared up to 1 and linear beyond."""

    name = "huber"
    allows_linear_path = True

    def loss(self, raw: Tensor, y: Tensor) -> Tensor:
        return huber_loss(raw, y, reduction="none")


class SquaredLoss(Loss):
    """The squared error, whose minimum is at the mean."""

    name = "squared_error"
    allows_linear_path = True

    def loss(self, raw: Tensor, y: Tensor) -> Tensor:
        return (raw - y) ** 2


class AbsoluteLoss(Loss):
    """The absolute error, whose minimum is at the median."""

    name = "absolute_error"

    def loss(self, raw: Tensor, y: Tensor) -> Tensor:
        return (raw - y).abs()


class QuantileLoss(Loss):
    """The mean of the pinball losses of one or several quantiles.

    The raw predictions of an output are the first quantile and the steps from each to the next.
    The steps are made positive, so the predicted quantiles never cross.

    Parameters
    ----------
    quantiles : tuple of float
        Above 0 and below 1, in rising order.

    Examples
    --------
    >>> import torch
    >>> loss = QuantileLoss((0.1, 0.5, 0.9))
    >>> predictions = loss.inverse_link(torch.tensor([[-1.0, 0.0, 3.0]]))
    >>> [round(float(prediction), 3) for prediction in predictions[0]]
    [-1.0, -0.307, 2.742]
    >>> round(float(loss.point_prediction(predictions)), 3)
    -0.307
    """

    name = "quantile"

    def __post_init__(self) -> None:
        levels = (0.0, *self.quantiles, 1.0)
        if not self.quantiles or not (np.diff(levels) > 0).all():
            raise ValueError(
                "loss='quantile' needs one or several quantiles above 0 and below 1, in rising"
                f" order, got {self.quantiles}."
            )

    @property
    def n_predictions(self) -> int:
        return len(self.quantiles)

    def loss(self, raw: Tensor, y: Tensor) -> Tensor:
        predictions = self.inverse_link(raw).unflatten(1, (-1, self.n_predictions)).unbind(2)
        losses = [
            torch.maximum(quantile * (y - prediction), (quantile - 1) * (y - prediction))
            for quantile, prediction in zip(self.quantiles, predictions, strict=True)
        ]
        return cast(Tensor, sum(losses)) / len(losses)

    def inverse_link(self, raw: Tensor) -> Tensor:
        if self.n_predictions == 1:
            return raw
        first, *steps = raw.unflatten(1, (-1, self.n_predictions)).unbind(2)  # each (n, n_outputs)
        increments = torch.stack([first, *(softplus(step) for step in steps)], dim=2)
        return increments.cumsum(2).flatten(1)

    def point_prediction(self, predictions: Array) -> Array:
        """The quantile nearest to the median, or the mean of two that are equally near."""
        distances = [abs(quantile - 0.5) for quantile in self.quantiles]
        nearest = [i for i, far in enumerate(distances) if far < min(distances) + 1e-9]
        predictions = predictions.reshape(len(predictions), -1, self.n_predictions)
        return predictions[:, :, nearest].mean(2)


class PoissonLoss(Loss):
    """Half the Poisson deviance, up to a constant, as in scikit-learn."""

    name = "poisson"
    log_link = True
    valid_targets = "of 0 or more"

    def loss(self, raw: Tensor, y: Tensor) -> Tensor:
        return raw.exp() - y * raw

    def is_valid(self, y: np.ndarray) -> np.ndarray:
        return y >= 0

    def interval_scale(self, predictions: np.ndarray) -> np.ndarray:
        return np.sqrt(predictions)


class GammaLoss(Loss):
    """Half the gamma deviance, up to a constant, as in scikit-learn."""

    name = "gamma"
    log_link = True
    valid_targets = "above 0"

    def loss(self, raw: Tensor, y: Tensor) -> Tensor:
        return raw + y * (-raw).exp()

    def is_valid(self, y: np.ndarray) -> np.ndarray:
        return y > 0

    def interval_scale(self, predictions: np.ndarray) -> np.ndarray:
        return predictions


LOSSES: dict[str, type[Loss]] = {
    loss.name: loss
    for loss in (HuberLoss, SquaredLoss, AbsoluteLoss, QuantileLoss, PoissonLoss, GammaLoss)
}


def make_loss(name: str, quantiles: Sequence[float] = ()) -> Loss:
    """A loss by its name.

    Parameters
    ----------
    name : str
        A key of `LOSSES`.
    quantiles : sequence of float, default=()
        With ``"quantile"``, the quantiles that are predicted.

    Returns
    -------
    Loss

    Raises
    ------
    ValueError
        If there is no such loss, or the quantiles are not valid for it.

    Examples
    --------
    >>> make_loss("poisson").log_link
    True
    """
    if name not in LOSSES:
        names = ", ".join(map(repr, LOSSES))
        raise ValueError(f"loss must be one of {names}, got {name!r}.")
    return LOSSES[name](tuple(quantiles))


def loss_of(loss: str, quantile: float | Sequence[float], linear_path: bool | str) -> Loss:
    """The loss that the parameters of a regressor describe.

    Raises
    ------
    ValueError
        If the parameters do not fit together.
    """
    if loss == "quantile":
        quantiles = np.atleast_1d(np.asarray(quantile, dtype=float))
        rising = quantiles.ndim == 1 and (np.diff(quantiles) > 0).all()
        if not (rising and len(quantiles) and quantiles[0] > 0 and quantiles[-1] < 1):
            raise ValueError(
                f"quantile={quantile!r} is neither a number above 0 and below 1 nor several of them"
                " in rising order."
            )
        loss_fn = make_loss(loss, quantiles.tolist())
    elif isinstance(quantile, Real) and quantile == 0.5:
        loss_fn = make_loss(loss)
    else:
        raise ValueError(
            f"quantile={quantile!r} has no effect with loss={loss!r}: pass loss='quantile', or"
            " leave quantile at 0.5."
        )
    if linear_path != "auto" and linear_path and not loss_fn.allows_linear_path:
        raise ValueError(
            f"linear_path=True is not available with loss={loss!r}: pass linear_path='auto' or"
            " False."
        )
    return loss_fn

"""What a head is trained for: a loss, and what its raw answers mean under it.

A raw answer is whatever the read-out gives; a response is a number in standardized units, which the
target's mean and scale lead back to its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import huber_loss, softplus

IDENTITY = frozenset(["huber", "squared_error", "absolute_error", "quantile"])
LOG = frozenset(["poisson", "gamma"])  # their link: raw answers are logarithms
LOSSES = IDENTITY | LOG


@dataclass(frozen=True)
class Loss:
    """A loss on standardized targets.

    Parameters
    ----------
    loss : {"huber", "squared_error", "absolute_error", "quantile", "poisson", "gamma"}
        Huber's is squared up to 1 and linear beyond; the last two are half the deviances of these
        distributions, less what no answer changes, as in scikit-learn.
    quantiles : tuple of float, default=()
        With ``"quantile"`` what is asked for, in rising order. Several of them take as many raw
        answers for each output, the first and the steps from one to the next, which are positive:
        they never cross.

    Examples
    --------
    >>> import torch
    >>> loss_fn = Loss("quantile", (0.1, 0.5, 0.9))
    >>> responses = loss_fn.inverse_link(torch.tensor([[-1.0, 0.0, 3.0]]))
    >>> [round(float(some), 3) for some in responses[0]]
    [-1.0, -0.307, 2.742]
    >>> loss_fn.point_prediction(responses).shape
    torch.Size([1, 1])
    """

    name: str
    quantiles: tuple[float, ...] = ()

    @property
    def n_predictions(self) -> int:
        """Raw answers for each output."""
        return max(1, len(self.quantiles))

    @property
    def log_link(self) -> bool:
        """Whether raw answers are logarithms of responses."""
        return self.name in LOG

    @property
    def predicts_mean(self) -> bool:
        """Whether it asks for a mean in the target's own units, as a least squares fit does."""
        return self.name in ("huber", "squared_error")

    def inverse_link(self, raw: Tensor) -> Tensor:
        """Responses, of the same shape as raw answers, (n, n_outputs * n_predictions)."""
        if self.log_link:
            return raw.exp()
        if self.n_predictions == 1:
            return raw
        first, *steps = raw.unflatten(1, (-1, self.n_predictions)).unbind(2)
        rising = torch.stack([first, *(softplus(step) for step in steps)], dim=2)
        return rising.cumsum(2).flatten(1)

    def point_prediction(self, responses: Tensor) -> Tensor:
        """One response for each output, (n, n_outputs): of several quantiles the middle one.

        Where two are as near to the median as each other, their mean.
        """
        if self.n_predictions == 1:
            return responses
        return responses.unflatten(1, (-1, self.n_predictions))[:, :, middle(self.quantiles)].mean(
            2
        )

    def losses(self, raw: Tensor, y: Tensor) -> Tensor:
        """Loss of each output, (n, n_outputs), of raw answers for targets of that shape."""
        if self.name == "huber":
            return huber_loss(raw, y, reduction="none")
        if self.name == "squared_error":
            return (raw - y) ** 2
        if self.name == "absolute_error":
            return (raw - y).abs()
        if self.name == "poisson":
            return raw.exp() - y * raw
        if self.name == "gamma":
            return raw + y * (-raw).exp()
        responses = self.inverse_link(raw).unflatten(1, (-1, self.n_predictions)).unbind(2)
        losses = [
            torch.maximum(quantile * (y - response), (quantile - 1) * (y - response))
            for quantile, response in zip(self.quantiles, responses, strict=True)
        ]
        return sum(losses) / len(losses)


def middle(quantiles: Sequence[float]) -> list[int]:
    """The places of the quantiles that are nearest to the median: one, or two on its sides.

    Examples
    --------
    >>> middle([0.05, 0.5, 0.95]), middle([0.05, 0.95])
    ([1], [0, 1])
    """
    far = [abs(quantile - 0.5) for quantile in quantiles]
    return [place for place, some in enumerate(far) if some < min(far) + 1e-9]

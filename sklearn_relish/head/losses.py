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
class Objective:
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
    >>> objective = Objective("quantile", (0.1, 0.5, 0.9))
    >>> responses = objective.respond(torch.tensor([[-1.0, 0.0, 3.0]]))
    >>> [round(float(some), 3) for some in responses[0]]
    [-1.0, -0.307, 2.742]
    >>> objective.point(responses).shape
    torch.Size([1, 1])
    """

    loss: str
    quantiles: tuple[float, ...] = ()

    @property
    def n_answers(self) -> int:
        """Raw answers for each output."""
        return max(1, len(self.quantiles))

    @property
    def log_link(self) -> bool:
        """Whether raw answers are logarithms of responses."""
        return self.loss in LOG

    @property
    def of_mean(self) -> bool:
        """Whether it asks for a mean in the target's own units, as a least squares fit does."""
        return self.loss in ("huber", "squared_error")

    def respond(self, raw: Tensor) -> Tensor:
        """Responses, of the same shape as raw answers, (n, n_outputs * n_answers)."""
        if self.log_link:
            return raw.exp()
        if self.n_answers == 1:
            return raw
        first, *steps = raw.unflatten(1, (-1, self.n_answers)).unbind(2)
        rising = torch.stack([first, *(softplus(step) for step in steps)], dim=2)
        return rising.cumsum(2).flatten(1)

    def point(self, responses: Tensor) -> Tensor:
        """One response for each output, (n, n_outputs): of several quantiles the middle one.

        Where two are as near to the median as each other, their mean.
        """
        if self.n_answers == 1:
            return responses
        return responses.unflatten(1, (-1, self.n_answers))[:, :, middle(self.quantiles)].mean(2)

    def losses(self, raw: Tensor, y: Tensor) -> Tensor:
        """Loss of each output, (n, n_outputs), of raw answers for targets of that shape."""
        if self.loss == "huber":
            return huber_loss(raw, y, reduction="none")
        if self.loss == "squared_error":
            return (raw - y) ** 2
        if self.loss == "absolute_error":
            return (raw - y).abs()
        if self.loss == "poisson":
            return raw.exp() - y * raw
        if self.loss == "gamma":
            return raw + y * (-raw).exp()
        responses = self.respond(raw).unflatten(1, (-1, self.n_answers)).unbind(2)
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

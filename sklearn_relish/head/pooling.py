"""Poolings: one vector for each text, computed from the states of its tokens.

`LLMEncoder` offers every entry of `POOLINGS`. To add one, write a function here and name it there.
The linear path of the regressor has a list of its own, `LINEAR_POOLINGS` in `ensemble.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sklearn_relish.head.head import rms_scale

STD_VALUES = 2**17  # values whose standard deviation is computed at once, about
STD_DIMENSIONS = 64  # the smallest number of dimensions of which it is computed at once


def mean(states: Tensor, mask: Tensor, state_norm: str | None) -> Tensor:
    """The mean of each text's normalized token states."""
    weights = mask.to(states.dtype)  # (B, S)
    weights = weights / weights.sum(dim=1, keepdim=True)
    if state_norm == "rms":
        weights = weights * rms_scale(states)
    return (weights[:, None] @ states)[:, 0]  # (B, D)


def last(states: Tensor, mask: Tensor, state_norm: str | None) -> Tensor:
    """The normalized state of each text's last token."""
    texts = torch.arange(len(states), device=states.device)
    states = states[texts, mask.sum(dim=1) - 1]  # (B, D)
    return states * rms_scale(states)[:, None] if state_norm == "rms" else states


def std(states: Tensor, mask: Tensor, state_norm: str | None) -> Tensor:
    """The standard deviation of each text's normalized token states, 0 for a single token."""
    centers = mean(states, mask, state_norm)[:, None]  # (B, 1, D)
    weights = mask.to(states.dtype)  # (B, S)
    weights = (weights / weights.sum(dim=1, keepdim=True))[:, None]  # (B, 1, S)
    scale = rms_scale(states)[..., None] if state_norm == "rms" else 1.0
    # Of some dimensions at a time: a copy of all states of a large batch would be large.
    n_dimensions = max(STD_DIMENSIONS, STD_VALUES // mask.numel())
    parts = states.split(n_dimensions, dim=-1), centers.split(n_dimensions, dim=-1)
    variances = [
        weights @ (part * scale).sub_(center).square_() for part, center in zip(*parts, strict=True)
    ]
    return torch.cat(variances, dim=-1)[:, 0].sqrt()  # (B, D)


POOLINGS: dict[str, Callable[[Tensor, Tensor, str | None], Tensor]] = {
    "mean": mean,
    "last": last,
    "std": std,
}


def pool(states: Tensor, mask: Tensor, pooling: str, state_norm: str | None) -> Tensor:
    """One vector for each text of a padded batch.

    Parameters
    ----------
    states : Tensor of shape (B, S, D)
        Token states, with zeros in the padding.
    mask : bool Tensor of shape (B, S)
        True on real tokens, which come before the padding.
    pooling : str
        A key of `POOLINGS`.
    state_norm : {"rms", None}
        ``"rms"`` divides each token's state by its root mean square first.

    Returns
    -------
    Tensor of shape (B, D)
        In float32, or in the dtype of the states where that is finer.

    Examples
    --------
    >>> import torch
    >>> states, mask = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[True, True]])
    >>> pool(states, mask, "mean", None), pool(states, mask, "last", None)
    (tensor([[2.]]), tensor([[3.]]))
    """
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    return POOLINGS[pooling](states, mask, state_norm)

"""Poolings: one vector for each text, computed from the states of its tokens.

`LLMEncoder` offers every entry of `POOLINGS`. To add one, write a function here and name it there.
The linear path of the regressor has a list of its own, `LINEAR_POOLINGS` in `ensemble.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from sklearn_relish.head.head import RMS_EPSILON


def normalize(states: Tensor, state_norm: str | None) -> Tensor:
    """States in float32 or finer; with ``"rms"``, divided by their root mean square."""
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    if state_norm == "rms":
        return rms_norm(states, states.shape[-1:], eps=RMS_EPSILON)
    return states


def mean(states: Tensor, mask: Tensor, state_norm: str | None) -> Tensor:
    """The mean of each text's normalized token states."""
    lengths = mask.sum(dim=1, keepdim=True)  # (B, 1)
    return normalize(states, state_norm).sum(dim=1) / lengths  # (B, D); the padding is zero


def last(states: Tensor, mask: Tensor, state_norm: str | None) -> Tensor:
    """The normalized state of each text's last token."""
    texts = torch.arange(len(states), device=states.device)
    return normalize(states[texts, mask.sum(dim=1) - 1], state_norm)  # (B, D)


POOLINGS: dict[str, Callable[[Tensor, Tensor, str | None], Tensor]] = {"mean": mean, "last": last}


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
    return POOLINGS[pooling](states, mask, state_norm)

"""One vector for each text: the mean of its token states, or the last of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from sklearn_relish.head.head import RMS_EPSILON
from sklearn_relish.states.token_states import TokenStates

POOLINGS = ("mean", "last")


def pool(states: TokenStates, pooling: str, state_norm: str | None) -> Tensor:
    """Pooled states of texts.

    Parameters
    ----------
    states : TokenStates
    pooling : {"mean", "last"}
        The mean over a text's tokens, or its last token's state.
    state_norm : {"rms", None}
        ``"rms"`` divides each token's state by its root mean square first.

    Returns
    -------
    float32 Tensor of shape (n_texts, D)

    Examples
    --------
    >>> import torch
    >>> from sklearn_relish.states.token_states import TokenStates
    >>> states = TokenStates.from_lengths(torch.tensor([[1.0], [3.0]]), torch.tensor([2]))
    >>> pool(states, "mean", None), pool(states, "last", None)
    (tensor([[2.]]), tensor([[3.]]))
    """
    pooled = torch.empty(len(states), states.hidden_size)
    for row, text in enumerate(states):
        tokens = text[-1:] if pooling == "last" else text
        tokens = tokens.float()
        if state_norm == "rms":
            tokens = rms_norm(tokens, tokens.shape[-1:], eps=RMS_EPSILON)
        pooled[row] = tokens.mean(dim=0)
    return pooled

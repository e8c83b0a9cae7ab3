"""Vectors of a text, and matches of its tokens, from a lower layer; kept next to the states.

The linear path of a `RelishEnsemble` reads them. They are computed whenever a layer is read, since
the pass computes the lower layer anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from sklearn_relish.states.pairs import N_PAIR_VECTORS, match_tokens, pair_vectors
from sklearn_relish.states.token_states import TokenStates

SHARE = 5 / 6  # of the layer that is read: half of the depth, where that is 60 %
N_VECTORS = 3  # mean, last state and standard deviation
# The vectors of a pair that each of its ridges reads, see `pair_vectors`.
PAIR_RIDGES = {"pair means": slice(N_VECTORS, -2), "pair distances": slice(-2, None)}
RMS_EPSILON = 1e-6  # added to the mean square of a token's state, as in the head


def lower_layer(layer: int) -> int | None:
    """The layer whose pooled states are kept with those of a layer, if there is one.

    Examples
    --------
    >>> lower_layer(18), lower_layer(11), lower_layer(2)
    (15, 9, None)
    """
    lower = max(1, round(SHARE * layer))
    return lower if lower < layer else None


def layers_to_read(layers: list[int]) -> list[int]:
    """Some layers, and their lower layers after them; each once.

    Examples
    --------
    >>> layers_to_read([18, 15])
    [18, 15, 12]
    """
    lower = [number for layer in layers if (number := lower_layer(layer)) is not None]
    return list(dict.fromkeys([*layers, *lower]))


def text_vectors(
    states: TokenStates,
    lower: TokenStates | None,
    parts: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
) -> tuple[Tensor, Tensor]:
    """What is kept of a batch of texts next to their states.

    Parameters
    ----------
    states, lower : TokenStates
        Of one array each, of the layer that is read and of the lower one.
    parts : sequence of (bool ndarray, bool ndarray), default=None
        For each text, the tokens of the two parts of a pair. None: the texts are not pairs.

    Returns
    -------
    vectors : Tensor of shape (n_texts, n_vectors, D)
        In the dtype of the states. The first `N_VECTORS` are the mean, the last and the standard
        deviation of the states of the lower layer, each divided by its root mean square. Pairs have
        those of `pair_vectors` in addition. The vectors of a text do not depend on the other texts.
        There are none, (n_texts, 0, D), without a lower layer, or if its states have another size.
    matches : int32 Tensor of shape (n_tokens, 1)
        The matches of the tokens of pairs, by the states of the lower layer if there is one; see
        `match_tokens`. There are none, (0, 1), if the texts are not pairs.

    Examples
    --------
    >>> import torch
    >>> lower = TokenStates.from_lengths(torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.tensor([2]))
    >>> vectors, _ = text_vectors(lower, lower)
    >>> vectors[0].sum(dim=1)  # mean and last are 0.85, 1.13
    tensor([1.9799, 1.9799, 0.0000])
    """
    dtype, size = states.arrays[0].dtype, states.hidden_size
    has_vectors = lower is not None and lower.hidden_size == size
    n_vectors = (N_VECTORS if parts is None else N_VECTORS + N_PAIR_VECTORS) if has_vectors else 0
    vectors = torch.empty(len(states), n_vectors, size, dtype=dtype)
    matches = [torch.empty(0, dtype=torch.int32)]
    used = states if lower is None else lower
    for number, text in enumerate(used if has_vectors or parts is not None else ()):
        text = text.to(torch.promote_types(dtype, torch.float32))  # (S, D)
        text = rms_norm(text, text.shape[1:], eps=RMS_EPSILON)
        if parts is not None:
            first, second = map(torch.from_numpy, parts[number])
            matches.append(match_tokens(text, first, second))
        if has_vectors:
            mean = text.mean(dim=0)
            vectors[number, 0], vectors[number, 1] = mean, text[-1]
            vectors[number, 2] = (text - mean).square_().mean(dim=0).sqrt_()
            if parts is not None:
                vectors[number, N_VECTORS:] = pair_vectors(text, first, second, matches[-1])
    return vectors, torch.cat(matches)[:, None]

"""Vectors of a text: pooled states of a lower layer, kept next to the states of its tokens.

The linear path of a `RelishEnsemble` reads them. They are computed whenever a layer is read, since
the pass computes the lower layer anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from sklearn_relish.states.token_states import TokenStates

SHARE = 5 / 6  # of the layer that is read: half of the depth, where that is 60 %
N_VECTORS = 3  # mean, last state and standard deviation
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


def text_vectors(states: TokenStates, lower: TokenStates | None) -> Tensor:
    """The vectors of a batch of texts, (n_texts, N_VECTORS, D) in the dtype of the states.

    They are the mean, the last and the standard deviation of the states of a lower layer, each
    divided by its root mean square. Those of a text do not depend on the other texts. There are
    none, (n_texts, 0, D), without a lower layer, or if its states have another size.

    Parameters
    ----------
    states, lower : TokenStates
        Of one array each, of the layer that is read and of the lower one.

    Examples
    --------
    >>> import torch
    >>> lower = TokenStates.from_lengths(torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.tensor([2]))
    >>> text_vectors(lower, lower)[0].sum(dim=1)  # mean and last are 0.85, 1.13
    tensor([1.9799, 1.9799, 0.0000])
    """
    dtype, size = states.arrays[0].dtype, states.hidden_size
    if lower is None or lower.hidden_size != size:
        return torch.empty(len(states), 0, size, dtype=dtype)
    vectors = torch.empty(len(states), N_VECTORS, size, dtype=dtype)
    for text, of_text in zip(lower, vectors, strict=True):
        text = text.to(torch.promote_types(dtype, torch.float32))  # (S, D)
        text = rms_norm(text, (size,), eps=RMS_EPSILON)
        mean = text.mean(dim=0)
        of_text[0], of_text[1] = mean, text[-1]
        of_text[2] = (text - mean).square_().mean(dim=0).sqrt_()
    return vectors

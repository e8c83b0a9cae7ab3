"""Pairs: which tokens belong to which of two texts, and vectors that compare them.

A prompt that names two columns of texts makes one text of two, such as a sentence and its
paraphrase or translation. Four more vectors of such a text are kept, see `pair_vectors`.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

N_PAIR_VECTORS = 4  # the means of the two parts, and their distances from each other's tokens
MAX_MATCHED = 2_048  # tokens of a part that are compared; of a longer part, evenly spaced ones


class PairTemplate(NamedTuple):
    r"""The template of a text that is made of two.

    Parameters
    ----------
    before, between, after : str
        What stands before the first part, between the parts, and after the second; in a chat, also
        what the chat template puts around the text.

    Examples
    --------
    >>> template = PairTemplate("Sentence 1: ", "\nSentence 2: ", "")
    >>> template.parts("Sentence 1: a man\nSentence 2: a boy")
    ((12, 17), (30, 35))
    """

    before: str
    between: str
    after: str

    @property
    def name(self) -> str:
        """Suffix of the collection's name: other templates find other parts of a text."""
        identity = repr(tuple(self))
        return "pair" + hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()

    def parts(self, text: str) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Where the two parts begin and end in a text; None if it lacks what is between them.

        The first part ends where this occurs first.
        """
        begin = len(self.before) if text.startswith(self.before) else 0
        end = len(text) - (len(self.after) if text.endswith(self.after) else 0)
        middle = text.find(self.between, begin, end)
        if middle < 0:
            return None
        return (begin, middle), (middle + len(self.between), end)

    def tokens_of_parts(self, text: str, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens belong to each part of a text; none if the text does not have the parts.

        Parameters
        ----------
        text : str
        spans : int64 ndarray of shape (n_tokens, 2)
            Where each token begins and ends in the text; empty for a special token.

        Returns
        -------
        first, second : bool ndarray of shape (n_tokens,)
        """
        begins, ends = spans.T
        first, second = (
            (begins < end) & (ends > begin) & (ends > begins)
            for begin, end in self.parts(text) or ((0, 0), (0, 0))
        )
        return first, second


def pair_vectors(states: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Vectors of a pair, (N_PAIR_VECTORS, D).

    The first two are the means of the tokens of each part. The others say how much a part differs
    from the other one: the mean of ``|a - b|`` over the tokens a of a part, where b is the token of
    the other part that is most similar to a, by the cosine of their differences from the mean of
    the text. BERTScore matches tokens in this way [1]_.

    Parameters
    ----------
    states : Tensor of shape (n_tokens, D)
        Normalized token states of a text, in float32 or finer.
    first, second : bool Tensor of shape (n_tokens,)
        The tokens of each part. A part without tokens counts as one token whose state is the mean
        of the text.

    References
    ----------
    .. [1] Zhang et al., "BERTScore: Evaluating Text Generation with BERT", arXiv 1904.09675.

    Examples
    --------
    >>> import torch
    >>> states = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [1.0, 0.0]])
    >>> first = torch.tensor([True, True, False, False])
    >>> pair_vectors(states, first, ~first)
    tensor([[0.5000, 0.5000],
            [0.5000, 1.0000],
            [0.0000, 0.5000],
            [0.0000, 0.5000]])
    """
    center = states.mean(dim=0)
    parts = [states[part] if part.any() else center[None] for part in (first, second)]
    means = [part.mean(dim=0) for part in parts]
    a, b = (part[:: -(-len(part) // MAX_MATCHED)] for part in parts)
    cosine = normalize(a - center, dim=1) @ normalize(b - center, dim=1).T  # (n_first, n_second)
    distances = [
        (a - b[cosine.argmax(dim=1)]).abs().mean(dim=0),
        (b - a[cosine.argmax(dim=0)]).abs().mean(dim=0),
    ]
    return torch.stack([*means, *distances])

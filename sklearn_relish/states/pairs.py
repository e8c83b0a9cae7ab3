"""Pairs: which tokens belong to which of two texts, and what compares them.

A prompt that names two columns of texts makes one text of two, such as a sentence and its
paraphrase or translation. Of such a text, the match of each token in the other part is kept, see
`match_tokens`, and four more vectors, see `pair_vectors`. If a row is read in both orders, each
token has a counterpart in the other text of the row, see `counterparts`.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

N_PAIR_VECTORS = 4  # the means of the two parts, and their distances from each other's tokens
NO_MATCH = -1  # in place of the position of a token
MATCH_BYTES = 4  # of an int32
MAX_MATCHED = 2_048  # tokens that may be matches; of a longer part, evenly spaced ones


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

    def parts(self, text: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where the two parts begin and end in a text.

        The first part ends where the text between them occurs first. If it does not occur, as in a
        row with a missing cell, the second part is empty.
        """
        begin = len(self.before) if text.startswith(self.before) else 0
        end = len(text) - (len(self.after) if text.endswith(self.after) else 0)
        middle = text.find(self.between, begin, end)
        if middle < 0:
            return (begin, end), (end, end)
        return (begin, middle), (middle + len(self.between), end)

    def tokens_of_parts(self, text: str, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens belong to each part of a text.

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
            (begins < end) & (ends > begin) & (ends > begins) for begin, end in self.parts(text)
        )
        return first, second


def match_tokens(states: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """For each token, the position of its match; int32, (n_tokens,).

    The match of a token of one part is the most similar token of the other one, by the cosine of
    their differences from the mean of the text, as in BERTScore [1]_. It is `NO_MATCH` if the other
    part has no tokens. The match of a token of neither part is the token itself.

    Parameters
    ----------
    states : Tensor of shape (n_tokens, D)
        Normalized token states of a text, in float32 or finer.
    first, second : bool Tensor of shape (n_tokens,)
        The tokens of each part.

    References
    ----------
    .. [1] Zhang et al., "BERTScore: Evaluating Text Generation with BERT", arXiv 1904.09675.

    Examples
    --------
    >>> states = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [1.0, 0.0], [5.0, 5.0]])
    >>> first = torch.tensor([True, True, False, False, False])
    >>> second = torch.tensor([False, False, True, True, False])
    >>> match_tokens(states, first, second)
    tensor([3, 2, 1, 0, 4], dtype=torch.int32)
    """
    matches = torch.arange(len(states))
    centered = states - states.mean(dim=0)
    for part, other in ((first, second), (second, first)):
        candidates = other.nonzero()[:, 0]
        if len(candidates) == 0:
            matches[part] = NO_MATCH
            continue
        candidates = candidates[:: -(-len(candidates) // MAX_MATCHED)]
        directions = normalize(centered[candidates], dim=1).T  # (D, n_candidates)
        for tokens in part.nonzero()[:, 0].split(MAX_MATCHED):
            matches[tokens] = candidates[(centered[tokens] @ directions).argmax(dim=1)]
    return matches.int()


def pair_vectors(states: Tensor, first: Tensor, second: Tensor, matches: Tensor) -> Tensor:
    """Vectors of a pair, (N_PAIR_VECTORS, D).

    The first two are the means of the tokens of each part. The others say how much a part differs
    from the other one: the mean of ``|a - b|`` over the tokens a of a part and their matches b.

    Parameters
    ----------
    states, first, second
        As of `match_tokens`. A part without tokens has the mean of the text, which is also the
        match of the tokens of the other part, and their distance.
    matches : int Tensor of shape (n_tokens,)
        What `match_tokens` returns.

    Examples
    --------
    >>> states = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [1.0, 0.0]])
    >>> first = torch.tensor([True, True, False, False])
    >>> pair_vectors(states, first, ~first, match_tokens(states, first, ~first))
    tensor([[0.5000, 0.5000],
            [0.5000, 1.0000],
            [0.0000, 0.5000],
            [0.0000, 0.5000]])
    """
    center, every = states.mean(dim=0), torch.ones_like(first)
    matched = torch.where(matches[:, None] == NO_MATCH, center, states[matches])
    differences = (states - matched).abs()  # (n_tokens, D)
    means = [states[part].mean(dim=0) if part.any() else center for part in (first, second)]
    distances = [
        differences[next(part for part in parts if part.any())].mean(dim=0)
        for parts in ((first, second, every), (second, first, every))
    ]
    return torch.stack([*means, *distances])


def counterparts(
    matches: Tensor, mask: Tensor, other_matches: Tensor, other_mask: Tensor
) -> Tensor:
    """For each token, the position of the same token in the text with the parts in the other order.

    Which part a token belongs to follows from its match: a token of the first part has a later
    one, a token of the second part an earlier one. The tokens of a part are counted from its
    beginning, since its end may be cut in one of the orders.

    Parameters
    ----------
    matches : int64 Tensor of shape (B, S)
        What `match_tokens` returns for each text.
    mask : bool Tensor of shape (B, S)
        True on real tokens.
    other_matches, other_mask : Tensor of shape (B, T)
        The same of the texts in the other order.

    Returns
    -------
    int64 Tensor of shape (B, S)
        `NO_MATCH` for a token of neither part, of a part whose other part has no tokens, or that is
        cut in the other order.

    Examples
    --------
    >>> matches = torch.tensor([[0, 3, 3, 1]])  # a token before the parts, two, one
    >>> other_matches = torch.tensor([[0, 2, 1, 1]])
    >>> mask = torch.ones(1, 4, dtype=torch.bool)
    >>> counterparts(matches, mask, other_matches, mask)
    tensor([[-1,  2,  3,  1]])
    """
    parts, other_parts = _parts(matches, mask), _parts(other_matches, other_mask)
    positions = torch.full_like(matches, NO_MATCH)
    n_places = 1 + max(matches.shape[1], other_matches.shape[1])
    every = torch.arange(other_matches.shape[1], device=matches.device).expand_as(other_matches)
    for part, other in zip(parts, reversed(other_parts), strict=True):
        places = positions.new_full((len(matches), n_places), NO_MATCH)
        places.scatter_(1, _numbers(other), every)
        places[:, 0] = NO_MATCH  # where the tokens outside of the part are
        positions = torch.where(part, places.gather(1, _numbers(part)), positions)
    return positions


def _parts(matches: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of the first and of the second part, from their matches."""
    own = torch.arange(matches.shape[1], device=matches.device)
    is_matched = mask & (matches != NO_MATCH)
    return is_matched & (matches > own), is_matched & (matches < own)


def _numbers(part: Tensor) -> Tensor:
    """The tokens of a part, numbered from 1; 0 for other tokens."""
    return part.cumsum(1) * part

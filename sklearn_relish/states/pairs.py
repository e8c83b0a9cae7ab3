"""Pairs: which tokens belong to which of two texts, and how the two are compared.

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

    def places(self, text: str, spans: np.ndarray) -> np.ndarray:
        """The part of each token, and where in the part it begins and ends.

        Parameters
        ----------
        text, spans
            As of `tokens_of_parts`.

        Returns
        -------
        int64 ndarray of shape (n_tokens, 3)
            The number of the part, 0 or 1, and -1 for a token of neither. What a token has of the
            text around the part does not count.
        """
        places = np.full((len(spans), 3), -1)
        both = zip(self.parts(text), self.tokens_of_parts(text, spans), strict=True)
        for number, ((begin, end), tokens) in enumerate(both):
            places[tokens, 0] = number
            places[tokens, 1:] = spans[tokens].clip(begin, end) - begin
        return places


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


def counterparts(places: np.ndarray, other_places: np.ndarray) -> np.ndarray:
    """For each token, the position of the same token in the text with the parts in the other order.

    Parameters
    ----------
    places, other_places : int64 ndarray of shape (n_tokens, 3)
        What `PairTemplate.places` returns for the text, and for the one in the other order.

    Returns
    -------
    int32 ndarray of shape (n_tokens,)
        `NO_MATCH` for a token of neither part, and for one that the other text does not have: a
        part may be cut there, or its beginning may be divided into other tokens.

    Examples
    --------
    >>> places = np.array([[-1, 0, 0], [0, 0, 3], [0, 3, 5], [1, 0, 4]])
    >>> other_places = np.array([[0, 0, 4], [-1, 0, 0], [1, 0, 3]])
    >>> counterparts(places, other_places)
    array([-1,  2, -1,  0], dtype=int32)
    """
    other_part = np.where(other_places[:, :1] < 0, -1, 1 - other_places[:, :1])
    keys = _keys(np.hstack([other_part, other_places[:, 1:]]))
    found = {key: position for position, key in enumerate(keys) if key[0] >= 0}
    positions = [found.get(key, NO_MATCH) for key in _keys(places)]
    return np.array(positions, dtype=np.int32)


def _keys(places: np.ndarray) -> list[tuple[int, ...]]:
    """The place of each token, and a number for those of several tokens that form a character."""
    n = np.arange(len(places))
    is_new = np.ones(len(places), dtype=bool)
    is_new[1:] = (places[1:] != places[:-1]).any(axis=1)
    number = n - np.maximum.accumulate(np.where(is_new, n, 0))
    return list(map(tuple, np.column_stack([places, number]).tolist()))

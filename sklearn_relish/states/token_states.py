"""Token states of many texts: a few arrays of tokens, and where each text's tokens lie in them.

Texts have different lengths. Nothing is padded or copied before a batch is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sklearn_relish.states.quantization import n_rows, quantizer_of, state_size


@dataclass(frozen=True)
class TokenStates:
    """Ragged token states.

    Parameters
    ----------
    arrays : tuple of Tensor of shape (n_tokens, D)
        States of tokens, text after text; each may be a file's memory map. Quantized states
        have another width, and a text has further rows, see `quantization`.
    array_index : int64 Tensor of shape (n_texts,)
        Which of `arrays` holds the text.
    starts : int64 Tensor of shape (n_texts,)
        The row of that array at which the text begins. Several texts may begin at the same row,
        so a selection of texts, repeated or not, shares the arrays.
    lengths : int64 Tensor of shape (n_texts,)
        Tokens of each text, at least one.
    files : tuple of Path or None, default=()
        The shard's file of each array; None for an array in memory. Empty: all are in memory.
    vectors : TokenStates, default=None
        Vectors of each text, the same number for all, in place of states of tokens. None: none.
    matches : TokenStates, default=None
        Of pairs of texts: int32 arrays of shape (n_tokens, 1) in place of states, for each token
        the position of the one that it is compared with, see `match_tokens`. None: the texts are
        not pairs.
    others : TokenStates, default=None
        Of pairs that are read in both orders: the states of each row's text in the other order.
        None: they are read in one order.
    counterparts : TokenStates, default=None
        With `others`: int32 arrays of shape (n_tokens, 1) in place of states, for each token its
        position in the other text, see `sklearn_relish.states.pairs.counterparts`.

    Examples
    --------
    >>> import torch
    >>> from sklearn_relish import TokenStates
    >>> states = TokenStates.from_lengths(torch.arange(10.0).reshape(5, 2), torch.tensor([2, 3]))
    >>> padded, mask = states.batch(torch.tensor([0, 1]))
    >>> padded.shape, mask.tolist()
    (torch.Size([2, 3, 2]), [[True, True, False], [True, True, True]])
    """

    arrays: tuple[Tensor, ...]
    array_index: Tensor
    starts: Tensor
    lengths: Tensor
    files: tuple[Path | None, ...] = ()
    vectors: TokenStates | None = None
    matches: TokenStates | None = None
    others: TokenStates | None = None
    counterparts: TokenStates | None = None

    @classmethod
    def from_lengths(cls, values: Tensor, lengths: Tensor) -> TokenStates:
        """States of texts that follow each other in one array, without gaps.

        Parameters
        ----------
        values : Tensor of shape (n_tokens, D)
            States of all tokens, text after text; or quantized.
        lengths : int64 Tensor of shape (n_texts,)
            Tokens of each text, at least one.

        Examples
        --------
        >>> import torch
        >>> from sklearn_relish import TokenStates
        >>> len(TokenStates.from_lengths(torch.zeros(5, 2), torch.tensor([2, 3])))
        2
        """
        rows = n_rows(values, lengths)
        return cls((values,), torch.zeros_like(lengths), rows.cumsum(0) - rows, lengths)

    @classmethod
    def concatenated(cls, parts: Sequence[TokenStates]) -> TokenStates:
        """The texts of several states, one after the other; the arrays are shared.

        Examples
        --------
        >>> import torch
        >>> from sklearn_relish import TokenStates
        >>> states = TokenStates.from_lengths(torch.zeros(5, 2), torch.tensor([2, 3]))
        >>> TokenStates.concatenated([states, states]).lengths.tolist()
        [2, 3, 2, 3]
        """
        if len(parts) == 1:
            return parts[0]
        n_before = np.cumsum([0, *(len(part.arrays) for part in parts[:-1])]).tolist()
        array_index = [part.array_index + n for part, n in zip(parts, n_before, strict=True)]
        files = [part.files or (None,) * len(part.arrays) for part in parts]
        vectors = [part.vectors for part in parts if part.vectors is not None]
        matches = [part.matches for part in parts if part.matches is not None]
        others = [part.others for part in parts if part.others is not None]
        counterparts = [part.counterparts for part in parts if part.counterparts is not None]
        return cls(
            tuple(array for part in parts for array in part.arrays),
            torch.cat(array_index),
            torch.cat([part.starts for part in parts]),
            torch.cat([part.lengths for part in parts]),
            tuple(file for part in files for file in part),
            cls.concatenated(vectors) if len(vectors) == len(parts) else None,
            cls.concatenated(matches) if len(matches) == len(parts) else None,
            cls.concatenated(others) if len(others) == len(parts) else None,
            cls.concatenated(counterparts) if len(counterparts) == len(parts) else None,
        )

    @staticmethod
    def aligned(parts: Sequence[TokenStates]) -> list[TokenStates]:
        """States with equally many vectors; with matches if all have them.

        Examples
        --------
        >>> import torch
        >>> from sklearn_relish import TokenStates
        >>> states = TokenStates.from_lengths(torch.zeros(5, 2), torch.tensor([2, 3]))
        >>> len(TokenStates.aligned([states, states]))
        2
        """
        if len(parts) == 1:
            return list(parts)
        n_vectors = min(part.n_vectors for part in parts)
        has_matches = all(part.matches is not None for part in parts)
        result = []
        for part in parts:
            vectors = part.vectors
            if vectors is not None:
                lengths = torch.full_like(vectors.lengths, n_vectors)
                vectors = replace(vectors, lengths=lengths) if n_vectors else None
            matches = part.matches if has_matches else None
            result.append(replace(part, vectors=vectors, matches=matches))
        return result

    @property
    def hidden_size(self) -> int:
        """Size D of a token's state."""
        return state_size(self.arrays[0])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: Tensor) -> TokenStates:
        return TokenStates(
            self.arrays,
            self.array_index[rows],
            self.starts[rows],
            self.lengths[rows],
            self.files,
            None if self.vectors is None else self.vectors[rows],
            None if self.matches is None else self.matches[rows],
            None if self.others is None else self.others[rows],
            None if self.counterparts is None else self.counterparts[rows],
        )

    def __iter__(self) -> Iterator[Tensor]:
        """The states of each text, (length, D); views, unless they are quantized."""
        form = quantizer_of(self.arrays[0])
        for kept, length in zip(self._slices(), self.lengths, strict=True):
            yield kept if form is None else form.dequantize_texts(kept[None], length[None])[0]

    @property
    def n_vectors(self) -> int:
        """Number of vectors of each text."""
        if self.vectors is None or len(self) == 0:
            return 0
        return int(self.vectors.lengths[0])

    @property
    def head_options(self) -> dict[str, bool]:
        """The arguments of `RelishHead` that say what a head reads in addition to the states."""
        return {"pair": self.matches is not None, "both_orders": self.others is not None}

    @property
    def n_rows(self) -> Tensor:
        """Rows of each text in its array, int64 (n_texts,): its tokens, or more if quantized."""
        return n_rows(self.arrays[0], self.lengths)

    @property
    def n_bytes(self) -> int:
        """Bytes of the texts' states."""
        array = self.arrays[0]
        return int(self.n_rows.sum()) * array.shape[1] * array.element_size()

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """States of a batch of texts, padded with zeros, and a mask of the real tokens.

        Parameters
        ----------
        rows : int64 Tensor of shape (B,)

        Returns
        -------
        states : Tensor of shape (B, S, D)
        mask : bool Tensor of shape (B, S)

        Examples
        --------
        >>> import torch
        >>> from sklearn_relish import TokenStates
        >>> states = TokenStates.from_lengths(torch.ones(5, 2), torch.tensor([2, 3]))
        >>> padded, mask = states.batch(torch.tensor([0, 1]))
        >>> padded.shape
        torch.Size([2, 3, 2])
        """
        texts = self[rows]
        states = pad_sequence(list(texts._slices()), batch_first=True)
        form = quantizer_of(states)
        if form is not None:
            states = form.dequantize_texts(states, texts.lengths)
        return states, torch.arange(states.shape[1]) < texts.lengths[:, None]

    def _slices(self) -> Iterator[Tensor]:
        places = (self.array_index.tolist(), self.starts.tolist(), self.n_rows.tolist())
        for index, start, n_rows_of_text in zip(*places, strict=True):
            yield self.arrays[index].narrow(0, start, n_rows_of_text)

"""Token states of many texts: one array of tokens, and where each text's tokens lie in it.

Texts have different lengths; nothing is padded until a batch is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenStates:
    """Ragged token states.

    Parameters
    ----------
    values : Tensor of shape (n_tokens, D)
        The states of all tokens, text after text.
    lengths : int64 Tensor of shape (n_texts,)
        Tokens of each text, at least one.
    starts : int64 Tensor of shape (n_texts,)
        The row of `values` at which each text begins. A text may be pointed to twice, so a
        selection of texts, repeated or not, shares `values`.

    Examples
    --------
    >>> import torch
    >>> states = TokenStates.from_lengths(torch.arange(10.0).reshape(5, 2), torch.tensor([2, 3]))
    >>> padded, mask = states.batch(torch.tensor([0, 1]))
    >>> padded.shape, mask.tolist()
    (torch.Size([2, 3, 2]), [[True, True, False], [True, True, True]])
    """

    values: Tensor
    lengths: Tensor
    starts: Tensor

    @classmethod
    def from_lengths(cls, values: Tensor, lengths: Tensor) -> TokenStates:
        """States of texts that lie one after the other, without gaps."""
        return cls(values, lengths, lengths.cumsum(0) - lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: Tensor) -> TokenStates:
        return TokenStates(self.values, self.lengths[rows], self.starts[rows])

    def compact(self) -> TokenStates:
        """A copy that holds the tokens of these texts alone, text after text."""
        last = self.lengths.cumsum(0)
        shift = self.starts - (last - self.lengths)
        tokens = torch.arange(int(last[-1])) + shift.repeat_interleave(self.lengths)
        return TokenStates.from_lengths(self.values[tokens], self.lengths)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """States of some texts, padded to the longest of them, and which tokens are real.

        Parameters
        ----------
        rows : int64 Tensor of shape (B,)

        Returns
        -------
        states : Tensor of shape (B, S, D)
            The padding repeats tokens of `values`; a head must not look at it.
        mask : bool Tensor of shape (B, S)
        """
        lengths, starts = self.lengths[rows, None], self.starts[rows, None]  # (B, 1)
        positions = torch.arange(int(lengths.max()))  # (S,)
        mask = positions < lengths  # (B, S)
        tokens = starts + positions.minimum(lengths - 1)  # (B, S)
        return self.values[tokens], mask

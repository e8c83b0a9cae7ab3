"""Token states of many texts: a few arrays of tokens, and where each text's tokens lie in them.

Texts have different lengths. Nothing is padded or copied before a batch is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

CODE = torch.float8_e4m3fn
SCALE_BYTES = 4  # of float32
COPY_TEXTS = 1024  # texts that are copied to a device at once


@dataclass(frozen=True)
class TokenStates:
    """Ragged token states.

    Parameters
    ----------
    arrays : tuple of Tensor of shape (n_tokens, D)
        States of tokens, text after text; each may be a file's memory map. Packed states, see
        `pack_states`, are of shape (n_tokens, D + 4).
    array : int64 Tensor of shape (n_texts,)
        Which of `arrays` holds the text.
    starts : int64 Tensor of shape (n_texts,)
        The row of that array at which the text begins. Several texts may begin at the same row,
        so a selection of texts, repeated or not, shares the arrays.
    lengths : int64 Tensor of shape (n_texts,)
        Tokens of each text, at least one.

    Examples
    --------
    >>> import torch
    >>> states = TokenStates.from_lengths(torch.arange(10.0).reshape(5, 2), torch.tensor([2, 3]))
    >>> padded, mask = states.batch(torch.tensor([0, 1]))
    >>> padded.shape, mask.tolist()
    (torch.Size([2, 3, 2]), [[True, True, False], [True, True, True]])
    """

    arrays: tuple[Tensor, ...]
    array: Tensor
    starts: Tensor
    lengths: Tensor

    @classmethod
    def from_lengths(cls, values: Tensor, lengths: Tensor) -> TokenStates:
        """States of texts that follow each other in one array, without gaps."""
        return cls((values,), torch.zeros_like(lengths), lengths.cumsum(0) - lengths, lengths)

    @property
    def hidden_size(self) -> int:
        """Size D of a token's state."""
        return self.arrays[0].shape[1] - (SCALE_BYTES if self.packed else 0)

    @property
    def packed(self) -> bool:
        """Whether states are kept in 8 bits."""
        return self.arrays[0].dtype == torch.uint8

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: Tensor) -> TokenStates:
        return TokenStates(self.arrays, self.array[rows], self.starts[rows], self.lengths[rows])

    def __iter__(self) -> Iterator[Tensor]:
        """The states of each text, (length, D); views, unless they are packed."""
        return map(unpack_states, self._slices()) if self.packed else self._slices()

    @property
    def device(self) -> torch.device:
        """Where the states lie."""
        return self.arrays[0].device

    @property
    def n_bytes(self) -> int:
        """Bytes of the texts' states."""
        array = self.arrays[0]
        return int(self.lengths.sum()) * array.shape[1] * array.element_size()

    def to(self, device: torch.device) -> TokenStates:
        """Copy the states of these texts, and only these, to one array on a device."""
        n_tokens = int(self.lengths.sum())
        values = self.arrays[0].new_empty(n_tokens, self.arrays[0].shape[1], device=device)
        end = 0
        for rows in torch.arange(len(self)).split(COPY_TEXTS):
            chunk = torch.cat(list(self[rows]._slices()))
            values[end : end + len(chunk)] = chunk.to(device)
            end += len(chunk)
        return TokenStates.from_lengths(values, self.lengths.to(device))

    def batch(self, rows: Tensor, n_tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """States of a batch of texts, padded with zeros, and a mask of the real tokens.

        Parameters
        ----------
        rows : int64 Tensor of shape (B,)
        n_tokens : int, default=None
            Length S to which texts are padded; no text may be longer. None: that of the longest.

        Returns
        -------
        states : Tensor of shape (B, S, D)
        mask : bool Tensor of shape (B, S)
        """
        texts = self[rows]
        longest = int(texts.lengths.max()) if n_tokens is None else n_tokens
        mask = torch.arange(longest, device=self.device) < texts.lengths[:, None]
        if self.device.type == "cpu":
            padded = pad_sequence(list(texts._slices()), batch_first=True)
            if padded.shape[1] < longest:
                padded = pad(padded, (0, 0, 0, longest - padded.shape[1]))
            return unpack_states(padded) if self.packed else padded, mask
        return texts._gathered(mask), mask

    def _gathered(self, mask: Tensor) -> Tensor:
        """All texts, padded to the shape of a mask, by one indexing operation on one array."""
        (values,) = self.arrays
        tokens = self.starts[:, None] + torch.arange(mask.shape[1], device=self.device)  # (B, S)
        padded = values[tokens.clamp_(max=len(values) - 1)]  # (B, S, D)
        padded = unpack_states(padded) if self.packed else padded
        return padded.masked_fill_(~mask[:, :, None], 0.0)

    def _slices(self) -> Iterator[Tensor]:
        places = (self.array.tolist(), self.starts.tolist(), self.lengths.tolist())
        for array, start, length in zip(*places, strict=True):
            yield self.arrays[array].narrow(0, start, length)


def pack_states(states: Tensor) -> Tensor:
    """Pack states in 8 bits: one float8 (e4m3) per value, and one power of two as scale per token.

    Parameters
    ----------
    states : Tensor of shape (..., D)

    Returns
    -------
    uint8 Tensor of shape (..., D + 4)

    Examples
    --------
    >>> import torch
    >>> packed = pack_states(torch.tensor([[1000.0, -3.14, 0.0, 17.0]]))
    >>> packed.shape
    torch.Size([1, 8])
    >>> unpack_states(packed).tolist()
    [[1024.0, -3.25, 0.0, 16.0]]
    """
    largest = states.abs().amax(dim=-1, keepdim=True).float()
    largest = largest.clamp(min=torch.finfo(torch.bfloat16).tiny)
    scale = (largest / torch.finfo(CODE).max).log2().ceil().exp2()  # (..., 1)
    codes = (states.float() / scale).to(CODE)
    return torch.cat([codes.view(torch.uint8), scale.view(torch.uint8)], dim=-1)


def unpack_states(packed: Tensor) -> Tensor:
    """Unpack what `pack_states` has packed, as bfloat16, which represents it exactly."""
    codes, scale = packed[..., :-SCALE_BYTES].view(CODE), packed[..., -SCALE_BYTES:]
    return codes.bfloat16() * scale.contiguous().view(torch.float32).bfloat16()

"""Token states of many texts: a few arrays of tokens, and where each text's tokens lie in them.

Texts have different lengths. Nothing is padded or copied before a batch is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

CODE_DTYPE = torch.float8_e4m3fn  # of a quantized value
SCALE_BYTES = 4  # of a token's scale, a float32
QUANTIZED_SUFFIX = "-8bit"  # of the dtype's name, for quantized states


@dataclass(frozen=True)
class TokenStates:
    """Ragged token states.

    Parameters
    ----------
    arrays : tuple of Tensor of shape (n_tokens, D)
        States of tokens, text after text; each may be a file's memory map. Quantized states,
        see `quantize_states`, are of shape (n_tokens, D + 4).
    array_index : int64 Tensor of shape (n_texts,)
        Which of `arrays` holds the text.
    starts : int64 Tensor of shape (n_texts,)
        The row of that array at which the text begins. Several texts may begin at the same row,
        so a selection of texts, repeated or not, shares the arrays.
    lengths : int64 Tensor of shape (n_texts,)
        Tokens of each text, at least one.
    files : tuple of Path or None, default=()
        The shard's file of each array; None for an array in memory. Empty: all are in memory.

    Examples
    --------
    >>> import torch
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

    @classmethod
    def from_lengths(cls, values: Tensor, lengths: Tensor) -> TokenStates:
        """States of texts that follow each other in one array, without gaps."""
        return cls((values,), torch.zeros_like(lengths), lengths.cumsum(0) - lengths, lengths)

    @property
    def hidden_size(self) -> int:
        """Size D of a token's state."""
        return state_size(self.arrays[0])

    @property
    def quantized(self) -> bool:
        """Whether states are kept in 8 bits."""
        return is_quantized(self.arrays[0])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: Tensor) -> TokenStates:
        return TokenStates(
            self.arrays,
            self.array_index[rows],
            self.starts[rows],
            self.lengths[rows],
            self.files,
        )

    def __iter__(self) -> Iterator[Tensor]:
        """The states of each text, (length, D); views, unless they are quantized."""
        return map(dequantize_states, self._slices()) if self.quantized else self._slices()

    @property
    def n_bytes(self) -> int:
        """Bytes of the texts' states."""
        array = self.arrays[0]
        return int(self.lengths.sum()) * array.shape[1] * array.element_size()

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """States of a batch of texts, padded with zeros, and a mask of the real tokens.

        Parameters
        ----------
        rows : int64 Tensor of shape (B,)

        Returns
        -------
        states : Tensor of shape (B, S, D)
        mask : bool Tensor of shape (B, S)
        """
        texts = self[rows]
        padded = pad_sequence(list(texts._slices()), batch_first=True)
        mask = torch.arange(padded.shape[1]) < texts.lengths[:, None]
        return dequantize_states(padded) if self.quantized else padded, mask

    def _slices(self) -> Iterator[Tensor]:
        places = (self.array_index.tolist(), self.starts.tolist(), self.lengths.tolist())
        for index, start, length in zip(*places, strict=True):
            yield self.arrays[index].narrow(0, start, length)


def quantize_states(states: Tensor) -> Tensor:
    """Quantize states to 8 bits: a float8 (e4m3) per value, and a power of two as scale per token.

    Parameters
    ----------
    states : Tensor of shape (..., D)

    Returns
    -------
    uint8 Tensor of shape (..., D + 4)

    Examples
    --------
    >>> import torch
    >>> quantized = quantize_states(torch.tensor([[1000.0, -3.14, 0.0, 17.0]]))
    >>> quantized.shape
    torch.Size([1, 8])
    >>> dequantize_states(quantized).tolist()
    [[1024.0, -3.25, 0.0, 16.0]]
    """
    largest = states.abs().amax(dim=-1, keepdim=True).float()
    largest = largest.clamp(min=torch.finfo(torch.bfloat16).tiny)
    scale = (largest / torch.finfo(CODE_DTYPE).max).log2().ceil().exp2()  # (..., 1)
    codes = (states.float() / scale).to(CODE_DTYPE)
    return torch.cat([codes.view(torch.uint8), scale.view(torch.uint8)], dim=-1)


def dequantize_states(quantized: Tensor) -> Tensor:
    """Restore states from `quantize_states` as bfloat16, which represents their values exactly."""
    codes, scale = quantized[..., :-SCALE_BYTES].view(CODE_DTYPE), quantized[..., -SCALE_BYTES:]
    return codes.bfloat16() * scale.contiguous().view(torch.float32).bfloat16()


def is_quantized(array: Tensor) -> bool:
    """Whether an array holds states from `quantize_states`."""
    return array.dtype == torch.uint8


def state_size(array: Tensor) -> int:
    """Size D of the states in an array; each takes `SCALE_BYTES` more if quantized."""
    return array.shape[1] - (SCALE_BYTES if is_quantized(array) else 0)


def kept_dtype_name(dtype: torch.dtype, bits: int | None) -> str:
    """Name of the dtype in which states are kept: of the model's dtype, or quantized to 8 bits."""
    name = str(dtype).removeprefix("torch.")
    return name if bits is None else name + QUANTIZED_SUFFIX


def array_dtype(name: str) -> torch.dtype | None:
    """Dtype of the arrays that `kept_dtype_name` names; None if there is no such dtype."""
    return torch.uint8 if name.endswith(QUANTIZED_SUFFIX) else getattr(torch, name, None)

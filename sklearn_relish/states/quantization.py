"""Quantization: token states in 8 or 4 bits per value. Add a form of kept states here.

The dtype of an array says in which form it holds states. Each token but the last of its text has a
row of a few bits per value. Further rows of the text hold the state of its last token in bfloat16:
most prompts end with the same token, so these states differ by little, and the errors of a few bits
would hide it.

Kept and restored values depend on the text alone, not on the batch: sums over the values of a token
are sums of integers that floats represent exactly, and tokens are added in their order.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

Length = TypeVar("Length", int, Tensor)

FLOAT8 = torch.float8_e4m3fn
# Positive levels of the Lloyd-Max quantizer with 16 levels for a standard Gaussian (Max 1960,
# table I), rounded to multiples of 1 / LEVEL_UNIT; and the bounds between all levels, not rounded.
LEVEL_UNIT = 46
LEVELS = (6, 18, 30, 43, 58, 74, 95, 126)
BOUNDS = (0.2582, 0.5224, 0.7996, 1.0993, 1.4371, 1.8435, 2.4008)
N_OUTLIERS = 4  # largest values of a state that 4 bits keep in bfloat16
OUTLIER_BYTES = 4  # an int16 and a bfloat16 for each
MIN_VARIANCE = 2.0**-8  # of a value over the tokens of a text, relative to its mean square
FIXED_POINT = 2.0**19  # what the largest value of a token becomes before it is rotated
PIECE_VALUES = 2**17  # restored at once, so that they stay in the processor's cache


class Quantizer(ABC):
    """A form of kept states.

    Attributes
    ----------
    bits : int
        Bits per value, without the scale of a token.
    dtype : torch.dtype
        Of the arrays; no two forms have the same.
    scale_dtype : torch.dtype
        Of a token's scale, whose bytes follow the token's values.
    n_scale_rows : int
        Rows of each text that hold scales of its values, 0 or 1.
    """

    bits: int
    dtype: torch.dtype
    scale_dtype: torch.dtype
    n_scale_rows: int = 0

    @property
    def suffix(self) -> str:
        """What is added to the name of the model's dtype."""
        return f"-{self.bits}bit"

    def state_size(self, width: int) -> int:
        """Size D of states whose kept form has a width; not positive if there are none."""
        return (width - self.scale_dtype.itemsize) * 8 // self.bits

    def extra_rows(self, width: int) -> int:
        """Rows of a text beyond one for each token."""
        return self.n_scale_rows + self._last_rows(width) - 1

    def quantize_texts(self, states: Tensor, lengths: Tensor) -> Tensor:
        """Quantize the states of texts.

        Parameters
        ----------
        states : Tensor of shape (n_tokens, D)
            Text after text.
        lengths : int64 Tensor of shape (n_texts,)
            Tokens of each text.

        Returns
        -------
        Tensor of shape (n_rows, width)
            Text after text. Of a text of n tokens: n - 1 rows of a token each, a row of scales if
            the form has them, and rows of the bytes of the last token's state, then zeros.
        """
        last = lengths.cumsum(0) - 1
        is_last = torch.zeros(len(states), dtype=torch.bool).index_fill_(0, last, True)
        scaled, scale_bytes = self._scale_texts(states, lengths)
        tokens = self.quantize(scaled[~is_last])
        width = tokens.shape[1]
        last_bytes = states[last].bfloat16().view(self.dtype)
        last_bytes = pad(last_bytes, (0, self._last_rows(width) * width - last_bytes.shape[1]))
        scale_bytes = pad(scale_bytes, (0, self.n_scale_rows * width - scale_bytes.shape[1]))
        further = torch.cat([scale_bytes, last_bytes], dim=1)
        n_further = further.shape[1] // width
        order = torch.cat([torch.arange(len(states))[~is_last], last.repeat_interleave(n_further)])
        return torch.cat([tokens, further.view(-1, width)])[order.argsort(stable=True)]

    def dequantize_texts(self, kept: Tensor, lengths: Tensor) -> Tensor:
        """Restore the states of a batch of texts, as bfloat16.

        Parameters
        ----------
        kept : Tensor of shape (B, n_rows, width)
            The rows of each text; their padding does not matter.
        lengths : int64 Tensor of shape (B,)
            Tokens of each text.

        Returns
        -------
        Tensor of shape (B, S, D)
            With zeros in the padding; S is the length of the longest text.
        """
        texts, n_tokens = torch.arange(len(kept)), int(lengths.max())
        is_token = torch.arange(n_tokens) < lengths[:, None] - 1  # that has a row of its own
        states = self.dequantize(kept[:, :n_tokens].masked_fill(~is_token[:, :, None], 0))
        rows = lengths[:, None] - 1 + torch.arange(1 + self.extra_rows(kept.shape[2]))
        further = kept[texts[:, None], rows]  # (B, n_further, width)
        states = self._unscale_texts(states, further[:, : self.n_scale_rows])
        states[texts, lengths - 1] = self._last_states(further, states.shape[2])
        return states

    def is_finite(self, kept: Tensor, lengths: Tensor) -> bool:
        """Whether all restored states of texts are finite, (n_rows, width)."""
        counts = n_rows(kept, lengths)
        first = counts.cumsum(0) - counts
        row = torch.arange(len(kept)) - first.repeat_interleave(counts)  # of its text
        is_token = row < (lengths - 1).repeat_interleave(counts)
        further = kept[~is_token].unflatten(0, (len(lengths), -1))
        last = self._last_states(further, self.state_size(kept.shape[1]))
        return self._are_finite(kept[is_token]) and bool(last.isfinite().all())

    def _last_rows(self, width: int) -> int:
        """Rows that hold the state of a text's last token."""
        return math.ceil(self.state_size(width) * torch.bfloat16.itemsize / width)

    def _scale_texts(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """States as `quantize` takes them, and the bytes of each text's scales, (n_texts, n)."""
        return states, torch.empty(len(lengths), 0, dtype=self.dtype)

    def _unscale_texts(self, states: Tensor, rows: Tensor) -> Tensor:
        """Undo `_scale_texts` for (B, S, D), given the (B, n_scale_rows, width) of the scales."""
        return states

    def _last_states(self, further: Tensor, size: int) -> Tensor:
        """The states of last tokens, (n_texts, n_further, width) to (n_texts, D)."""
        bytes_ = further[:, self.n_scale_rows :].flatten(1)[:, : size * torch.bfloat16.itemsize]
        return bytes_.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)

    @abstractmethod
    def quantize(self, states: Tensor) -> Tensor:
        """Quantize states, one by one.

        Parameters
        ----------
        states : Tensor of shape (..., D)

        Returns
        -------
        Tensor of shape (..., width)
        """

    @abstractmethod
    def dequantize(self, kept: Tensor) -> Tensor:
        """Restore states as bfloat16, (..., width) to (..., D). Kept zeros are restored as zeros.

        Rounding to bfloat16 is part of the form: a state has the same bits wherever it is restored.
        """

    def _are_finite(self, kept: Tensor) -> bool:
        """Whether all restored values of tokens are finite."""
        return bool(self.dequantize(kept).isfinite().all())

    def _scales(self, kept: Tensor) -> Tensor:
        """The scale of each token, (..., 1). A copy, since the bytes may not be aligned."""
        scales = kept[..., -self.scale_dtype.itemsize :]
        return scales.clone(memory_format=torch.contiguous_format).view(self.scale_dtype)


class Quantizer8(Quantizer):
    """A float8 (e4m3) per value, and a power of two as scale per token.

    Examples
    --------
    >>> import torch
    >>> kept = Quantizer8().quantize(torch.tensor([[1000.0, -3.14, 0.0, 17.0]]))
    >>> kept.shape
    torch.Size([1, 8])
    >>> Quantizer8().dequantize(kept).tolist()
    [[1024.0, -3.25, 0.0, 16.0]]
    """

    bits = 8
    dtype = torch.uint8
    scale_dtype = torch.float32

    def quantize(self, states: Tensor) -> Tensor:
        """Divide by the scale, which brings the largest value into the range of float8."""
        largest = states.abs().amax(dim=-1, keepdim=True).float()
        largest = largest.clamp(min=torch.finfo(torch.bfloat16).tiny)
        scale = (largest / torch.finfo(FLOAT8).max).log2().ceil().exp2()  # (..., 1)
        codes = (states.float() / scale).to(FLOAT8)
        return torch.cat([codes.view(torch.uint8), scale.view(torch.uint8)], dim=-1)

    def dequantize(self, kept: Tensor) -> Tensor:
        """Look up the float8 values, and multiply by the scale: bfloat16 represents the results."""
        codes = kept[..., : -self.scale_dtype.itemsize]
        values = _float8_values().index_select(0, codes.reshape(-1).int())
        return values.view(codes.shape) * self._scales(kept).bfloat16()


class Quantizer4(Quantizer):
    """One of 16 levels per value of the rotated state; its largest values are kept in bfloat16.

    In middle layers of language models a few values may be much larger than all others: in
    Gemma-3-270M, 4 of 640 have 97 % of the sum of squares. The `N_OUTLIERS` largest values are
    kept with their positions, and count as zero in what follows. The rest of the state is rotated
    at random, so that its values are nearly Gaussian. The scale of a token is their root mean
    square. The rotation is fixed, see `_rotated`. Two values share a byte, the first in its lower
    half. Scale, positions and largest values follow.

    The rotation spreads the error evenly, and would hide values that vary by little. So the states
    of a text are divided by scales of their values before, see `_scale_texts`, which a row of the
    text keeps.

    Examples
    --------
    >>> import torch
    >>> kept = Quantizer4().quantize(torch.tensor([[1000.0, -300.0, 0.0, 17.0, 2.0, 1.0]]))
    >>> kept.shape
    torch.Size([1, 21])
    >>> Quantizer4().dequantize(kept)[0, :2].tolist()
    [1000.0, -300.0]
    """

    bits = 4
    dtype = torch.int8
    scale_dtype = torch.bfloat16  # has the range of float32: tokens may have norms above 10,000
    n_scale_rows = 1

    def state_size(self, width: int) -> int:
        """Size D of states whose kept form has a width; not positive if there are none."""
        return super().state_size(width - N_OUTLIERS * OUTLIER_BYTES)

    def quantize(self, states: Tensor) -> Tensor:
        """Keep the largest values. Rotate and scale the rest, and take the nearest levels.

        Raises
        ------
        ValueError
            If D is odd, less than `N_OUTLIERS`, or too large for an int16.
        """
        size = states.shape[-1]
        _check_size(size)
        positions = _largest(states)
        outliers = states.gather(-1, positions).to(self.scale_dtype)
        values = states.double().scatter(-1, positions, 0.0)
        fixed, unit = _fixed(values)
        rms = fixed.square().mean(dim=-1, keepdim=True).sqrt() * unit
        scale = rms.to(self.scale_dtype)  # (..., 1)
        divisor = scale.double().clamp(min=torch.finfo(torch.bfloat16).tiny)
        rotated = _rotated(fixed) * (unit / divisor / _block_size(size))
        bounds = torch.tensor(BOUNDS, dtype=torch.float64)
        codes = torch.bucketize(rotated.abs(), bounds) + 8 * (rotated < 0)
        pairs = codes.to(torch.uint8).unflatten(-1, (size // 2, 2))
        packed = pairs[..., 0] | pairs[..., 1] << 4
        parts = (packed, scale, positions.to(torch.int16), outliers)
        return torch.cat([part.view(self.dtype) for part in parts], dim=-1)

    def dequantize(self, kept: Tensor) -> Tensor:
        """Look up the levels of each byte, rotate and scale them; then put the largest values."""
        size = self.state_size(kept.shape[-1])
        restored = torch.empty(*kept.shape[:-1], size, dtype=torch.bfloat16)
        n_tokens = max(1, PIECE_VALUES // size)
        factor = 1 / (LEVEL_UNIT * _block_size(size))
        pieces = kept.reshape(-1, kept.shape[-1]).split(n_tokens)
        for piece, out in zip(pieces, restored.view(-1, size).split(n_tokens), strict=True):
            codes = piece[:, : size // 2].view(torch.uint8)
            pairs = _level_pairs().index_select(0, codes.reshape(-1).int())
            levels = _rotated_back(pairs.view(torch.float32).view(-1, size))
            scales, positions, outliers = self._parts(piece)
            torch.mul(levels, scales.float() * factor, out=out)
            out.scatter_(-1, positions.long(), outliers)
        return restored

    def _scale_texts(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Divide by powers of two near the standard deviation of each value over a text's tokens.

        A byte has two scales, as powers of one half of the largest; its exponent follows them. For
        the deviation, states are divided by their root mean square. The last token does not count.
        """
        _check_size(states.shape[1])
        fixed, _ = _fixed(states.double())
        normalized = fixed / fixed.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1.0)
        last, text = lengths.cumsum(0) - 1, torch.arange(len(lengths)).repeat_interleave(lengths)
        normalized[last] = 0
        sums = torch.zeros(2, len(lengths), states.shape[1], dtype=torch.float64)
        for moment, values in zip(sums, (normalized, normalized.square()), strict=True):
            moment.index_add_(0, text, values)
        mean, square = sums / (lengths - 1).clamp(min=1)[:, None]
        # At least a part of the root mean square: with few tokens the deviation may be tiny.
        variance = torch.maximum(square - mean.square(), square * MIN_VARIANCE)
        exponents = (variance.clamp(min=1e-30).log2() / 2).round()  # (n_texts, D)
        largest = exponents.amax(dim=1, keepdim=True)
        exponents = torch.maximum(exponents, largest - 15)
        codes = (largest - exponents).to(torch.uint8)
        packed = (codes[:, ::2] | codes[:, 1::2] << 4).view(self.dtype)
        scale_bytes = torch.cat([packed, largest.to(self.dtype)], dim=1)
        return states / exponents.exp2().float()[text], scale_bytes

    def _unscale_texts(self, states: Tensor, rows: Tensor) -> Tensor:
        """Multiply by the scales, which bfloat16 represents."""
        row, n_packed = rows[:, 0], states.shape[2] // 2
        packed, largest = row[:, :n_packed].view(torch.uint8), row[:, n_packed, None]
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
        return states.mul_((largest.float() - codes).exp2().bfloat16()[:, None])

    def _are_finite(self, kept: Tensor) -> bool:
        """Whether scales and largest values are finite: each code stands for a level."""
        scales, _, outliers = self._parts(kept)
        return bool(scales.isfinite().all() and outliers.isfinite().all())

    def _parts(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, positions and values of the outliers of each token. Copies: bytes aren't aligned.

        A damaged file never has positions out of range here: its checksum is compared before.
        """
        first = kept.shape[-1] - N_OUTLIERS * OUTLIER_BYTES - self.scale_dtype.itemsize
        n_bytes = [self.scale_dtype.itemsize, 2 * N_OUTLIERS, 2 * N_OUTLIERS]
        scale, positions, outliers = (
            part.clone(memory_format=torch.contiguous_format)
            for part in kept[..., first:].split(n_bytes, dim=-1)
        )
        return (
            scale.view(self.scale_dtype),
            positions.view(torch.int16),
            outliers.view(self.scale_dtype),
        )


QUANTIZERS: dict[int, Quantizer] = {form.bits: form for form in (Quantizer8(), Quantizer4())}
SUFFIXES = tuple(form.suffix for form in QUANTIZERS.values())  # of the names of dtypes


def quantizer_of(array: Tensor) -> Quantizer | None:
    """The form of an array of states; None if they are kept in a model's dtype."""
    return next((form for form in QUANTIZERS.values() if form.dtype == array.dtype), None)


def state_size(array: Tensor) -> int:
    """Size D of the states in an array, quantized or not."""
    form = quantizer_of(array)
    return array.shape[1] if form is None else form.state_size(array.shape[1])


def n_rows(array: Tensor, lengths: Length) -> Length:
    """Rows of an array that texts of some lengths take."""
    form = quantizer_of(array)
    return lengths if form is None else lengths + form.extra_rows(array.shape[1])


def kept_dtype_name(dtype: torch.dtype, bits: int | None) -> str:
    """Name of the form in which states are kept: of the model's dtype, and how it is quantized."""
    name = str(dtype).removeprefix("torch.")
    return name if bits is None else name + QUANTIZERS[bits].suffix


def array_dtype(name: str) -> torch.dtype | None:
    """Dtype of the arrays that `kept_dtype_name` names; None if there is no such dtype."""
    for form in QUANTIZERS.values():
        if name.endswith(form.suffix):
            return form.dtype
    return getattr(torch, name, None)


def _check_size(size: int) -> None:
    """Raise a ValueError unless states of this size can be kept in 4 bits."""
    if size % 2 or not N_OUTLIERS <= size < 2**15:
        raise ValueError(
            f"States of size {size} can't be kept in 4 bits, which need an even size from"
            f" {N_OUTLIERS} to {2**15 - 2}: pass a StateStore with bits=8, or bits=None."
        )


def _fixed(values: Tensor) -> tuple[Tensor, Tensor]:
    """States as integers, whose sums are exact, times a unit: float64, (..., D) and (..., 1)."""
    largest = values.abs().amax(dim=-1, keepdim=True)
    largest = largest.clamp(min=torch.finfo(torch.bfloat16).tiny)
    return (values / largest * FIXED_POINT).round(), largest / FIXED_POINT


def _largest(states: Tensor) -> Tensor:
    """Positions of the `N_OUTLIERS` largest values, int64 (..., N_OUTLIERS); first ones of equals.

    A key is the magnitude's 16 bits in bfloat16, then the position, in reverse: no two are equal.
    """
    magnitudes = states.bfloat16().abs().float().view(torch.int32)
    keys = magnitudes + (2**15 - 1 - torch.arange(states.shape[-1], dtype=torch.int32))
    return keys.topk(N_OUTLIERS, dim=-1).indices


def _rotated(values: Tensor) -> Tensor:
    """Rotate states of size D, and multiply them by `_block_size(D)`.

    The signs of half of the values are changed, and each block is multiplied by a Hadamard matrix.
    Then the values are reordered, so that each block has values of many blocks, and the blocks are
    multiplied again.
    """
    size = values.shape[-1]
    block = _block_size(size)
    hadamard = _hadamard(block).to(values.dtype)
    mixed = (values * _signs(size)).unflatten(-1, (size // block, block)) @ hadamard
    mixed = mixed.transpose(-1, -2).reshape(*values.shape[:-1], size // block, block) @ hadamard
    return mixed.flatten(-2)


def _rotated_back(values: Tensor) -> Tensor:
    """Undo `_rotated` for float32 integers of shape (n, D), except for the factor."""
    n_rows, size = values.shape
    block = _block_size(size)
    mixed = values.view(-1, block) @ _hadamard(block)  # the matrix is symmetric
    mixed = mixed.view(n_rows, block, size // block).transpose(1, 2).reshape(-1, block)
    return (mixed @ _hadamard(block)).view(n_rows, size).mul_(_signs(size))


@cache
def _block_size(size: int) -> int:
    """The smallest power of two whose square is at least `size`, or the largest that divides it."""
    block = 1
    while block * block < size and size % (2 * block) == 0:
        block *= 2
    return block


@cache
def _hadamard(block: int) -> Tensor:
    """Hadamard matrix of Sylvester's construction, (block, block) of 1 and -1."""
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@cache
def _signs(size: int) -> Tensor:
    """Fixed pseudo-random signs, (size,): the same in every version of every library."""
    digest = hashlib.shake_128(b"sklearn-relish rotation").digest(size // 8 + 1)
    bits = np.unpackbits(np.frombuffer(digest, dtype=np.uint8))[:size]
    return torch.from_numpy(1.0 - 2.0 * bits.astype(np.float32))


@cache
def _level_pairs() -> Tensor:
    """The two float32 levels of each byte as one item, (256,), which is faster to look up."""
    levels = torch.tensor([*LEVELS, *(-level for level in LEVELS)], dtype=torch.float32)
    byte = torch.arange(256)
    return torch.stack([levels[byte & 15], levels[byte >> 4]], dim=-1).view(torch.int64).view(-1)


@cache
def _float8_values() -> Tensor:
    """The value of each float8 code as bfloat16, (256,): a table is faster than torch's cast."""
    return torch.arange(256, dtype=torch.int16).to(torch.uint8).view(FLOAT8).bfloat16()

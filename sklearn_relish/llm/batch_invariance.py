"""Forward passes on a CPU in which the states of a text do not depend on the rest of its batch.

A matrix product chooses its kernel by the number of rows, and two kernels round differently. Here
products run only with numbers of rows that give equal bits on this machine; other numbers are split
or padded with zeros. Attention runs on one text, or on texts of one length, at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from sklearn_relish.utils.locks import ForkSafeLock

ROW_STEP = 16  # products run with multiples of this number of rows
FEW_ROWS = 64  # or with any number up to this one, if that gives equal bits
PROBE_ROWS = 512  # rows that a number of rows is tested on
REFERENCE_ROWS = 256  # the number of rows that all others are compared with
MAX_ROWS = 1024  # more rows are split
CALL_ROWS = 24  # overhead of a call, as a number of rows
JOINT_TOKENS = 64  # shorter texts may share a call of attention, where torch packs no keys
GRAIN = 32_768  # elements below which torch runs an elementwise operation in one thread
VECTOR = 64  # elements, a multiple of the size of any vector register
ELEMENTWISE = {
    getattr(module, name)
    for module in (torch, Tensor, torch.nn.functional)
    for name in (
        *("cos", "elu", "erf", "exp", "expm1", "gelu", "hardswish", "log", "log1p", "logsigmoid"),
        *("mish", "pow", "rsqrt", "selu", "sigmoid", "silu", "sin", "softplus", "sqrt", "tanh"),
    )
    if hasattr(module, name)
}
MATRIX_PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm}


class BatchInvariant(TorchFunctionMode):
    """A context in which each text of a batch gets the same bits as in any other batch.

    It covers the operations of Transformers' models whose rounding depends on the batch: linear
    layers, attention, products of batches of matrices, and elementwise functions, because torch
    computes the last few elements of a thread's part differently. All others work row by row.

    Parameters
    ----------
    lengths : sequence of int, default=None
        Lengths of the texts that are packed one after the other in a single row. None: each row of
        the batch is a text, and all have the same length.
    joint : bool, default=False
        Whether short packed texts of one length share a call of attention, which is faster. The
        bits may then depend on the thread that computes a text: in float32 they do.

    Examples
    --------
    >>> import torch
    >>> layer, x = torch.nn.Linear(32, 32), torch.randn(100, 32)
    >>> with torch.inference_mode(), BatchInvariant():
    ...     together, alone = layer(x), layer(x[7:8])
    >>> torch.equal(together[7:8], alone)
    True
    """

    def __init__(self, lengths: Sequence[int] | None = None, *, joint: bool = False) -> None:
        super().__init__()
        self.lengths = lengths
        self.joint = joint
        self.n_attentions = 0
        self._causal: dict[tuple[int, int], tuple[Tensor, bool]] = {}  # by mask and length

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace the functions that depend on the batch."""
        kwargs = kwargs or {}
        replacement = _REPLACED.get(func)
        if replacement is None:
            return func(*args, **kwargs)
        return replacement(self, func, args, kwargs)

    def _linear(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return func(*args, **kwargs) if kwargs else _linear(*args)

    def _addmm(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if kwargs:
            return func(*args, **kwargs)
        bias, rows, weight = args
        return _linear(rows, weight.t(), bias)

    def _attention(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        self.n_attentions += 1
        if self.lengths is None:
            return _text_by_text(func, args, kwargs)
        return self._packed_attention(self.lengths, *args, **kwargs)

    def _matrix_product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        left, right = args[:2]
        if right.ndim == 2 and left.ndim >= 2:
            return _linear(left, right.t())
        if left.ndim >= 3 and right.ndim >= 3:
            return _text_by_text(func, args, kwargs)
        return func(*args, **kwargs)

    def _elementwise(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        is_tensor = [isinstance(value, Tensor) for value in (*args, *kwargs.values())]
        if kwargs.get("inplace") or not is_tensor[0] or any(is_tensor[1:]):
            return func(*args, **kwargs)
        return _aligned(func, *args, **kwargs)

    def _packed_attention(
        self,
        lengths: Sequence[int],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Attention within each text of a packed row; shapes are (1, heads, tokens, size)."""
        n_heads, n_tokens = query.shape[1:3]
        result = query.new_empty(1, n_tokens, n_heads, value.shape[3])
        start = 0
        for length, group in itertools.groupby(lengths):
            n_texts = len(list(group))
            step = n_texts if self.joint and length < JOINT_TOKENS else 1
            mask, causal = attn_mask, is_causal
            if attn_mask is not None:  # the same for all texts of a length
                mask = attn_mask[:, :, start : start + length, start : start + length]
                causal = self._is_causal(attn_mask, mask, length)
                mask = None if causal else mask
            for _ in range(0, n_texts, step):
                end = start + step * length
                queries, keys, values = (
                    states[0, :, start:end].unflatten(1, (step, length)).transpose(0, 1)
                    for states in (query, key, value)  # (step, heads, length, size)
                )
                attended = scaled_dot_product_attention(
                    queries, keys, values, attn_mask=mask, is_causal=causal, **kwargs
                )
                result[0, start:end] = attended.transpose(1, 2).flatten(0, 1)
                start = end
        return result.transpose(1, 2)

    def _is_causal(self, batch_mask: Tensor, mask: Tensor, length: int) -> bool:
        """Whether each token attends to itself and those before: attention has a fast path then."""
        key = id(batch_mask), length
        if key not in self._causal:
            is_bool = mask.dtype == torch.bool and mask.shape[:2] == (1, 1)
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            # The mask is kept too: otherwise a new mask could get the id of a deleted one.
            self._causal[key] = batch_mask, is_bool and torch.equal(mask[0, 0], causal)
        return self._causal[key][1]


_REPLACED: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys(ELEMENTWISE, BatchInvariant._elementwise),
    **dict.fromkeys(MATRIX_PRODUCTS, BatchInvariant._matrix_product),
    torch.nn.functional.linear: BatchInvariant._linear,
    torch.addmm: BatchInvariant._addmm,
    scaled_dot_product_attention: BatchInvariant._attention,
}


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A product of rows (..., K) and a weight (N, K), with numbers of rows that give equal bits."""
    n_rows = x.numel() // x.shape[-1]
    counts = _row_counts(n_rows, weight, x.dtype)
    if counts in ((), (n_rows,)):
        return linear(x, weight, bias)
    rows = x.reshape(n_rows, -1)  # (M, K)
    results = []
    for part, count in zip(
        rows.split([*counts[:-1], n_rows - sum(counts[:-1])]), counts, strict=True
    ):
        if len(part) < count:
            padded = part.new_zeros(count, part.shape[1])
            padded[: len(part)] = part
            results.append(linear(padded, weight, bias)[: len(part)])
        else:
            results.append(linear(part, weight, bias))
    return torch.cat(results).view(*x.shape[:-1], len(weight))


def _row_counts(n_rows: int, weight: Tensor, dtype: torch.dtype) -> tuple[int, ...]:
    """Rows of each call that a product of `n_rows` is split into; the last may be padded."""
    if n_rows == 0:  # an expert of a mixture that got no token
        return ()
    equal = _equality(weight, dtype)
    if n_rows <= FEW_ROWS and equal(n_rows):
        return (n_rows,)
    rest = (n_rows - 1) % MAX_ROWS + 1
    first = (MAX_ROWS,) * ((n_rows - rest) // MAX_ROWS)
    count = math.ceil(rest / ROW_STEP) * ROW_STEP
    if equal(count) and (not first or equal(MAX_ROWS)):
        return (*first, count)
    return split_rows(n_rows, tuple(n for n in equal.ladder if equal(n)))


@lru_cache(maxsize=4096)
def split_rows(n_rows: int, counts: tuple[int, ...]) -> tuple[int, ...]:
    """The cheapest numbers of rows for the calls of a product; the last call may be padded.

    Parameters
    ----------
    n_rows : int
    counts : tuple of int
        Allowed numbers of rows, in rising order.

    Examples
    --------
    >>> split_rows(1000, (64, 256, 1024)), split_rows(300, (64, 256, 1024))
    ((1024,), (256, 64))
    """
    if n_rows > counts[-1]:
        n_full = (n_rows - 1) // counts[-1]
        return (counts[-1],) * n_full + split_rows(n_rows - n_full * counts[-1], counts)
    best: tuple[int, ...] = (next(count for count in counts if count >= n_rows),)
    below = max((count for count in counts if count < n_rows), default=0)
    if below:
        split = (below, *split_rows(n_rows - below, counts))
        if sum(split) + CALL_ROWS * (len(split) - 1) < best[0]:
            best = split
    return best


class _Equality:
    """Which numbers of rows give equal bits in products with weights of one shape.

    Each number of rows is measured once, when it is first needed.
    """

    ladder = (16, 32, 64, 128, 256, 512, 1024)

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        # The terms of each dot product come in pairs that cancel, in random order. What is left is
        # rounding error, which shows the order of the sum; in a product of random numbers, the
        # rounding to bfloat16 would hide most of it.
        n_outputs, size = weight.shape
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(size, generator=generator)
        rows = torch.zeros(MAX_ROWS, size)
        weights = torch.zeros(n_outputs, size)
        first, second = order[: size // 2], order[size // 2 : size // 2 * 2]
        rows[:, first] = rows[:, second] = torch.randn(MAX_ROWS, size // 2, generator=generator)
        weights[:, first] = torch.randn(n_outputs, size // 2, generator=generator)
        weights[:, second] = -weights[:, first]
        self._rows, self._weight = rows.to(dtype), weights.to(weight.dtype)
        if weight.stride(0) == 1:  # the kernel depends on the layout too
            self._weight = self._weight.t().contiguous().t()
        parts = self._rows.split(REFERENCE_ROWS)
        self._reference = torch.cat([linear(part, self._weight) for part in parts])
        self._equal = {REFERENCE_ROWS: True}

    def __call__(self, count: int) -> bool:
        """Whether products of `count` rows have the same bits as products of REFERENCE_ROWS."""
        if count not in self._equal:
            n_rows = max(count, PROBE_ROWS // count * count)
            rows = torch.cat([self._rows[:n_rows], self._rows[-count:]])
            expected = torch.cat([self._reference[:n_rows], self._reference[-count:]])
            found = torch.cat([linear(part, self._weight) for part in rows.split(count)])
            self._equal[count] = torch.equal(found, expected)
        return self._equal[count]


_equalities: dict[tuple[Any, ...], _Equality] = {}
_equalities_lock = ForkSafeLock()


def _equality(weight: Tensor, dtype: torch.dtype) -> _Equality:
    key = (weight.shape, weight.stride(), weight.dtype, dtype, torch.get_num_threads())
    equality = _equalities.get(key)
    if equality is None:
        with _equalities_lock:
            if key not in _equalities:
                _equalities[key] = _Equality(weight, dtype)
            equality = _equalities[key]
    return equality


def _text_by_text(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Call a function of batches for one text at a time."""
    n_texts = max(len(value) for value in args if isinstance(value, Tensor) and value.ndim >= 3)
    if n_texts == 1:
        return func(*args, **kwargs)

    def one(value: Any, text: int) -> Any:
        is_batch = isinstance(value, Tensor) and value.ndim >= 3 and len(value) == n_texts
        return value[text : text + 1] if is_batch else value

    return torch.cat(
        [
            func(
                *(one(value, text) for value in args),
                **{name: one(value, text) for name, value in kwargs.items()},
            )
            for text in range(n_texts)
        ]
    )


def _aligned(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Call an elementwise function such that each thread works on complete vectors."""
    n_threads = min(torch.get_num_threads(), math.ceil(x.numel() / GRAIN))
    step = VECTOR * max(1, n_threads)
    if x.numel() % step == 0 and x.is_contiguous():
        return func(x, *args, **kwargs)
    padded = x.new_zeros(math.ceil(x.numel() / step) * step)
    padded[: x.numel()] = x.flatten()
    return func(padded, *args, **kwargs)[: x.numel()].view(x.shape)

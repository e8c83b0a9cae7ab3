"""A prefix that is read once for all texts: instructions, a rubric, rated examples.

In a causal model the states of a prefix do not depend on the text after it. So its keys and values
are computed once, and each text attends to them. `Prefix` keeps them; `RecordKeys` and
`RecordMasks` are the contexts of the passes that compute them, and `AfterPrefix` is that of the
passes of texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from sklearn_relish.llm.batch_invariance import ROW_STEP, BatchInvariant
from sklearn_relish.llm.batching import Batch

MASK_ROWS = 256  # of a mask that are checked at once


@dataclass(frozen=True)
class PrefixCache:
    """What a prefix contributes to the forward passes of texts.

    Parameters
    ----------
    keys, values : list of Tensor of shape (1, n_heads, n_tokens, size)
        Of each call of attention, in the order of the calls.
    n_special : int
        How many special tokens begin each text.
    special_states : dict of int to Tensor of shape (n_special, D)
        Their states, by layer.
    masks : sequence of (bool Tensor of shape (max_length, max_length) or None)
        Which tokens attend to which, for each call of attention. None: each token to itself and
        all before.
    max_length : int
        Tokens of the prefix and the longest text that `masks` are for.
    """

    keys: list[Tensor]
    values: list[Tensor]
    n_special: int
    special_states: dict[int, Tensor]
    masks: Sequence[Tensor | None] = ()
    max_length: int = 0

    @property
    def n_tokens(self) -> int:
        """Tokens of the prefix, with the special tokens that begin each text."""
        return self.keys[0].shape[2]


@dataclass
class Prefix:
    """Tokens before each text, and what is kept of them.

    Parameters
    ----------
    ids : int64 array
        Token ids, with the special tokens that begin each text.
    n_special : int
        How many special tokens begin `ids`; their states are the text's.
    caches : dict of int to PrefixCache
        By the number of threads.
    not_cached : set of int
        Numbers of threads with which the prefix is read with each text.
    """

    ids: np.ndarray
    n_special: int
    caches: dict[int, PrefixCache] = field(default_factory=dict)
    not_cached: set[int] = field(default_factory=set)

    @property
    def n_tokens(self) -> int:
        """Tokens that are read in addition to those of a text."""
        return len(self.ids) - self.n_special

    def before(self, tokens: np.ndarray) -> np.ndarray:
        """The prefix and the tokens of a text, which begin with the special tokens."""
        return np.concatenate([self.ids, tokens[self.n_special :]])

    def rows_of_texts(self, lengths: Tensor) -> Tensor:
        """Rows of the texts' own tokens, where texts of `lengths` with prefixes follow each other.

        Parameters
        ----------
        lengths : int64 Tensor of shape (n_texts,)
            Tokens of each text, its prefix included.
        """
        place = torch.cat([torch.arange(length) for length in lengths.tolist()])
        return ((place < self.n_special) | (place >= len(self.ids))).nonzero()[:, 0]


class NotCausalError(ValueError):
    """The states of a prefix may depend on the text after it."""


class RecordKeys(BatchInvariant):
    """A context that records the keys and values of a text in a row that is filled up.

    Parameters
    ----------
    length : int
        Tokens of the text.
    row_length : int
        Tokens of the row.
    """

    def __init__(self, length: int, row_length: int) -> None:
        super().__init__([length, row_length - length] if row_length > length else [length])
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def _packed_attention(
        self,
        lengths: Sequence[int],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attention within each text of a packed row."""
        self.keys.append(key[:, :, : lengths[0]].clone())
        self.values.append(value[:, :, : lengths[0]].clone())
        return super()._packed_attention(lengths, query, key, value, *args, **kwargs)


class RecordMasks(TorchFunctionMode):
    """A context that records the masks of attention, in a pass that computes nothing else.

    Products with weights and attention give zeros, because masks depend on positions alone.

    Raises
    ------
    NotCausalError
        Within the context, if a token attends to a later one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor | None] = []
        self._checked: dict[int, tuple[Tensor, Tensor | None]] = {}  # by a mask's id

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace products and attention."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and len(args) >= 2:
            return args[0].new_zeros(*args[0].shape[:-1], len(args[1]))
        if func is torch.addmm and len(args) == 3:
            return args[1].new_zeros(len(args[1]), args[2].shape[1])
        if func is scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        if attn_mask is None and not is_causal:
            raise NotCausalError
        self.masks.append(None if attn_mask is None else self._checked_mask(attn_mask))
        return query.new_zeros(*query.shape[:3], value.shape[3])

    def _checked_mask(self, mask: Tensor) -> Tensor | None:
        """The mask of shape (length, length); None if each token attends to all before."""
        if id(mask) not in self._checked:
            if mask.dtype != torch.bool or mask.shape[:2] != (1, 1):
                raise NotCausalError
            rows, is_complete = mask[0, 0], True
            for start in range(0, len(rows), MASK_ROWS):  # copies of a long mask would be large
                part = rows[start : start + MASK_ROWS]
                causal = torch.ones_like(part).tril(start)
                if bool((part & ~causal).any()):
                    raise NotCausalError
                is_complete &= torch.equal(part, causal)
            # The mask is kept: otherwise a new one could get the id of a deleted one.
            self._checked[id(mask)] = mask, None if is_complete else rows
        return self._checked[id(mask)][1]


class AfterPrefix(BatchInvariant):
    """A context in which each text of a packed row attends to a prefix too.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each text, without the special tokens that the cache contains.
    cache : PrefixCache
    """

    def __init__(self, lengths: Sequence[int], cache: PrefixCache) -> None:
        super().__init__(lengths)
        self.cache = cache
        self._masks: dict[tuple[int | None, int], Tensor] = {}  # by the cache's mask and length

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
        """Attention of each text to the prefix and itself; shapes are (1, heads, tokens, size)."""
        call, n_prefix = self.n_attentions - 1, self.cache.n_tokens
        n_heads, n_tokens = query.shape[1:3]
        # Transformers repeats the heads of keys and values in some passes, and torch in others.
        kwargs.pop("enable_gqa", None)
        key, value, *before = (
            states.repeat_interleave(n_heads // states.shape[1], 1)
            for states in (key, value, self.cache.keys[call], self.cache.values[call])
        )
        result = query.new_empty(1, n_tokens, n_heads, value.shape[3])
        keys = values = key.new_empty(1, 0, 0, 0)
        start = 0
        for length in lengths:
            if keys.shape[2] != n_prefix + length:
                # Exactly as long as needed: the kernel may depend on the strides.
                room = [states.new_empty(1, n_heads, length, states.shape[3]) for states in before]
                keys, values = (torch.cat(parts, 2) for parts in zip(before, room, strict=True))
            end = start + length
            keys[:, :, n_prefix:] = key[:, :, start:end]
            values[:, :, n_prefix:] = value[:, :, start:end]
            attended = scaled_dot_product_attention(
                query[:, :, start:end], keys, values, attn_mask=self._mask(call, length), **kwargs
            )
            result[0, start:end] = attended[0].transpose(0, 1)
            start = end
        return result.transpose(1, 2)

    def _mask(self, call: int, length: int) -> Tensor:
        """Which tokens of the prefix and the text each token of the text attends to."""
        all_tokens = self.cache.masks[call]
        key = None if all_tokens is None else id(all_tokens), length
        if key not in self._masks:
            n_prefix = self.cache.n_tokens
            end = n_prefix + length
            self._masks[key] = (
                torch.ones(length, end, dtype=torch.bool).tril(n_prefix)
                if all_tokens is None
                else all_tokens[n_prefix:end, :end].contiguous()
            )
        return self._masks[key]


def pack_after_prefix(tokens: list[np.ndarray], cache: PrefixCache, filler_id: int) -> Batch:
    """Texts one after the other in one row, filled up to a multiple of ROW_STEP tokens.

    Parameters
    ----------
    tokens : list of int64 arrays
        Without the special tokens that the cache contains; may be empty.
    cache : PrefixCache
    filler_id : int
    """
    own_lengths = torch.tensor([len(ids) for ids in tokens])
    n_tokens = int(own_lengths.sum())
    parts = [ids for ids in tokens if len(ids)]
    filling = np.full(-n_tokens % ROW_STEP if n_tokens else ROW_STEP, filler_id)
    longest = max(1, int(own_lengths.max()))  # there may be no positions and masks beyond it
    parts += [filling[start : start + longest] for start in range(0, len(filling), longest)]
    lengths = [len(ids) for ids in parts]
    positions = torch.cat([torch.arange(length) for length in lengths])
    inputs = {
        "input_ids": torch.from_numpy(np.concatenate(parts))[None],  # (1, S)
        "position_ids": (cache.n_tokens + positions)[None],
    }
    return Batch(inputs, own_lengths, n_tokens, AfterPrefix(lengths, cache))

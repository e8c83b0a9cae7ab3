"""Windows: a training set larger than memory is read from its files a part at a time.

A window is a set of texts whose states fit into a budget. They are read from the files in the order
in which they lie there, into memory of the process. An epoch thus reads each file once, in long
pieces, and twice if pairs are read in both orders. The files' memory maps are not used for this:
their pages would count as the process's.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from sklearn_relish.states.shard import open_states
from sklearn_relish.states.token_states import TokenStates

MIN_MEMORY = 16 * 2**20  # bytes of states that a training may hold in any case
UNIT_BYTES = 64 * 2**20  # states that stay together in a shuffle; as many as a shard holds
MIN_UNITS = 8  # of a window
GAP_BYTES = 2**20  # states between two texts that are read ahead with them


def window_size(n_bytes: int, max_memory: float) -> float:
    """Bytes of a window; infinity if `n_bytes` of states fit into `max_memory`.

    Sizes alone decide, not the memory that happens to be free: the batches of a training depend on
    it. A window takes half of the memory. The system may read ahead into the other half.
    """
    max_memory = max(max_memory, MIN_MEMORY)
    return math.inf if n_bytes <= max_memory else max_memory / 2


class Windows:
    """The windows of a training or of predictions.

    The texts are sorted as they lie in the files and cut into units of at most `UNIT_BYTES`. A
    window has `MIN_UNITS` or more of them: neighbours for predictions, random ones for training.
    The texts in the other order, if there are any, are loaded with those of a window.
    The texts of a file have similar lengths, because texts are sorted by length before the language
    model reads them. A window of random units has texts of many lengths.

    Parameters
    ----------
    states : TokenStates
    n_bytes : float
        Bytes of a window. Infinity: there is one window, and its states are not copied.
    """

    def __init__(self, states: TokenStates, n_bytes: float) -> None:
        self.states = states
        self.n_bytes = n_bytes if states.others is None else n_bytes / 2
        self._others = None if states.others is None else Windows(states.others, self.n_bytes)
        self._buffer: Tensor | None = None

    def in_order(self) -> list[Tensor]:
        """The rows of each window, as they lie in the files."""
        if math.isinf(self.n_bytes):
            return [torch.arange(len(self.states))]
        return self._join(self._units())

    def shuffled(self, generator: torch.Generator) -> list[Tensor]:
        """The rows of each window, which consists of random units."""
        if math.isinf(self.n_bytes):
            return [torch.arange(len(self.states))]
        units = self._units()
        return self._join([units[i] for i in torch.randperm(len(units), generator=generator)])

    def load(self, rows: Tensor) -> TokenStates:
        """Read the states of some rows.

        Parameters
        ----------
        rows : int64 Tensor of shape (n_rows,)

        Returns
        -------
        TokenStates
            Of all texts; but only the given rows may be used, and only until the next call.

        Raises
        ------
        OSError
            If a file can't be read.
        """
        states = self.states
        if math.isinf(self.n_bytes):
            return states
        buffer, end = self._empty(int(states.n_rows[rows].sum())), 0
        # Array 0 is the buffer. Texts in no file stay in their arrays, which follow it.
        array_index, starts = states.array_index + 1, states.starts.clone()
        for part in self._parts(rows):
            try:
                file, offset = open_states(part.file)
            except FileNotFoundError:  # it was merged or evicted, but its map can still be read
                continue
            with file:
                array_index[part.rows] = 0
                starts[part.rows] = part.positions + end
                for start, length in _runs(part, gap=0):
                    file.seek(offset + start * self._row_bytes)
                    if not _read(file, buffer[end : end + length]):
                        raise OSError(
                            f"The file {part.file} of token states has become shorter: fit again,"
                            " and let nothing else change the files of the store."
                        )
                    end += length
        matches = None if states.matches is None else _in_memory(states.matches, rows)
        arrays = buffer, *states.arrays
        window = TokenStates(arrays, array_index, starts, states.lengths, matches=matches)
        if self._others is None or states.counterparts is None:
            return window
        counterparts = _in_memory(states.counterparts, rows)
        return replace(window, others=self._others.load(rows), counterparts=counterparts)

    def read_ahead(self, rows: Tensor) -> None:
        """Ask the system to read the rows' files into its cache, without waiting for that."""
        if math.isinf(self.n_bytes) or not hasattr(os, "posix_fadvise"):
            return
        for part in self._parts(rows):
            with suppress(OSError):  # `load` raises it
                file, offset = open_states(part.file)
                with file:
                    for start, length in _runs(part, gap=GAP_BYTES // self._row_bytes):
                        os.posix_fadvise(
                            file.fileno(),
                            offset + start * self._row_bytes,
                            length * self._row_bytes,
                            os.POSIX_FADV_WILLNEED,
                        )
        if self._others is not None:
            self._others.read_ahead(rows)

    def release(self) -> None:
        """Free the memory of the last window."""
        self._buffer = None
        if self._others is not None:
            self._others.release()

    @property
    def _row_bytes(self) -> int:
        array = self.states.arrays[0]
        return array.shape[1] * array.element_size()

    def _empty(self, n_rows: int) -> Tensor:
        """Memory for states, that of the last window if it suffices."""
        if self._buffer is None or len(self._buffer) < n_rows:
            array = self.states.arrays[0]
            # With room for texts that a training moves to the next window, so that it is not made
            # anew. Memory that is not written takes none.
            n_rows = max(n_rows, int(1.25 * self.n_bytes) // self._row_bytes)
            self._buffer = torch.empty(n_rows, array.shape[1], dtype=array.dtype)
        return self._buffer

    def _units(self) -> list[Tensor]:
        """Rows in the order of the files, in units."""
        states = self.states
        order = _storage_order(states)
        n_rows = states.n_rows[order]
        begins = (n_rows.cumsum(0) - n_rows) * self._row_bytes
        numbers = begins // int(min(UNIT_BYTES, self.n_bytes / MIN_UNITS))
        _, counts = numbers.unique_consecutive(return_counts=True)
        return list(order.split(counts.tolist()))

    def _join(self, units: list[Tensor]) -> list[Tensor]:
        """Windows of equal numbers of units."""
        largest = max(int(self.states.n_rows[unit].sum()) for unit in units) * self._row_bytes
        n_windows = math.ceil(len(units) / max(1, self.n_bytes // largest))
        bounds = [round(i * len(units) / n_windows) for i in range(n_windows + 1)]
        return [torch.cat(units[a:b]) for a, b in pairwise(bounds)]

    def _parts(self, rows: Tensor) -> Iterator[_Part]:
        """The rows of each file."""
        states = self.states
        if not states.files:
            return
        rows = rows[_storage_order(states[rows])]
        numbers, counts = states.array_index[rows].unique_consecutive(return_counts=True)
        for number, of_file in zip(numbers.tolist(), rows.split(counts.tolist()), strict=True):
            file = states.files[number]
            if file is not None:
                # Several rows may have the same text.
                starts, inverse = states.starts[of_file].unique(return_inverse=True)
                n_rows = torch.empty_like(starts)
                n_rows[inverse] = states.n_rows[of_file]
                positions = (n_rows.cumsum(0) - n_rows)[inverse]
                yield _Part(file, of_file, positions, starts, n_rows)


class _Part(NamedTuple):
    """The rows of a window that lie in one file.

    `starts` and `n_rows` are those of their different texts in the file. `positions` is where each
    row's states begin if these texts follow each other without gaps.
    """

    file: Path
    rows: Tensor
    positions: Tensor
    starts: Tensor
    n_rows: Tensor


def _in_memory(numbers: TokenStates, rows: Tensor) -> TokenStates:
    """Matches or counterparts of some rows, copied; those of others may not be used."""
    copied = TokenStates.from_lengths(torch.cat(list(numbers[rows])), numbers.lengths[rows])
    starts = torch.zeros_like(numbers.starts)
    starts[rows] = copied.starts
    return TokenStates(copied.arrays, torch.zeros_like(starts), starts, numbers.lengths)


def _storage_order(states: TokenStates) -> Tensor:
    """The order in which texts lie in their arrays."""
    places = states.array_index * (int(states.starts.max()) + 1) + states.starts
    return places.argsort(stable=True)


def _runs(part: _Part, gap: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each run of texts with gaps of at most `gap` rows."""
    ends = part.starts + part.n_rows
    first = torch.ones(len(ends), dtype=torch.bool)
    first[1:] = part.starts[1:] > ends[:-1] + gap
    last = first.roll(-1)  # the first text begins a run, so the last one ends a run
    starts, ends = part.starts[first], ends[last]
    yield from zip(starts.tolist(), (ends - starts).tolist(), strict=True)


def _read(file: BinaryIO, states: Tensor) -> bool:
    """Fill a tensor from a file. Return False if the file ends before."""
    values = states.view(torch.uint8).numpy().reshape(-1).data
    n_bytes = 0
    while n_bytes < len(values):
        n_read = file.readinto(values[n_bytes:])  # type: ignore[attr-defined]
        if not n_read:
            return False
        n_bytes += n_read
    return True

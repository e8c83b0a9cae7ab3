"""States of recently predicted texts, in this process's memory and within a bound.

A search predicts a fold and then fits on the same fold. States that were read for the prediction
need not be read again for the fit.
"""

from __future__ import annotations

from collections import OrderedDict

from sklearn_relish.states.quantization import n_rows
from sklearn_relish.states.shard import Entry, MemoryStates

TEXT_BYTES = 1024  # of a text's entry, without its states


class RecentStates:
    """Entries by text key, the least recently used first. Callers lock it against other threads.

    Attributes
    ----------
    n_bytes : int
        Memory of all entries.
    """

    def __init__(self) -> None:
        self.n_bytes = 0
        self._entries: OrderedDict[bytes, Entry[MemoryStates]] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Entry[MemoryStates] | None:
        """A text's entry, which becomes the most recently used."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: bytes, entry: Entry[MemoryStates], bound: float) -> None:
        """Keep a copy of a text's states if it fits the bound, and drop older ones for it."""
        states, vectors = entry.holder.states, entry.holder.vectors[entry.number][None]
        states = states.narrow(0, entry.start, n_rows(states, entry.length))
        matches = entry.holder.matches[entry.first_token :][: entry.length]
        n_bytes = states.nbytes + vectors.nbytes + matches.nbytes + TEXT_BYTES
        if n_bytes <= bound:
            self.pop(key)
            self.shrink(bound - n_bytes)
            # A copy: a view would keep the states of all texts of the batch.
            copy = MemoryStates(states.clone(), vectors.clone(), matches.clone())
            self._entries[key] = entry._replace(holder=copy, number=0, first_token=0, start=0)
            self.n_bytes += n_bytes

    def pop(self, key: bytes) -> Entry[MemoryStates] | None:
        """Remove a text's entry."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.n_bytes -= entry.holder.n_bytes + TEXT_BYTES
        return entry

    def shrink(self, bound: float) -> None:
        """Drop the least recently used entries until the rest is within a bound."""
        while self._entries and self.n_bytes > bound:
            self.pop(next(iter(self._entries)))

    def clear(self) -> None:
        """Drop all entries."""
        self._entries.clear()
        self.n_bytes = 0

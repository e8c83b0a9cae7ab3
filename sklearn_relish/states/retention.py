"""Retention: which states stay in memory and on disk, and what is evicted beyond the bounds."""

from __future__ import annotations

import os
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

from sklearn_relish.states.contents import Call, Contents
from sklearn_relish.states.index import ShardIndex
from sklearn_relish.states.shard import SMALL_BYTES, Shard
from sklearn_relish.states.temporary import made_temporary_folder, temporary_folder
from sklearn_relish.utils.messages import warn

RECENT_FRACTION = 0.25  # of max_memory, for the states of recently predicted texts
SHARD_BYTES = 64 * 2**20  # states gathered before a shard is made


class Retention:
    """Keeps shards within a store's bounds.

    Parameters
    ----------
    contents : Contents
    max_memory : float
        Bytes of states in this process's memory.
    max_bytes : float or None
        Bytes of states in all. None: no bound.
    """

    def __init__(self, contents: Contents, max_memory: float, max_bytes: float | None) -> None:
        self.contents = contents
        self.max_memory = max_memory
        self.max_bytes = max_bytes

    @property
    def shard_bytes(self) -> float:
        """States gathered before a shard is made: at most a quarter of `max_memory`.

        The shards of a folder are not so small that files are merged.
        """
        least = 2**20 if self.contents.backend.in_memory else SMALL_BYTES
        return min(SHARD_BYTES, max(self.max_memory / 4, least))

    @property
    def recent_bytes(self) -> float:
        """Bytes that the states of recently predicted texts may take now."""
        free = self.max_memory - self.contents.memory_bytes
        bound = min(RECENT_FRACTION * self.max_memory, free)
        return max(0, bound if self.max_bytes is None else min(bound, self.max_bytes))

    def keep(self, index: ShardIndex, shard: Shard, call: Call) -> None:
        """Save a shard. If it can't be saved, keep it in memory."""
        try:
            kept = index.save(shard)
        except OSError as error:
            _warn_unwritable(
                error,
                index.backend.location(index.collection),
                "they stay in memory as far as max_memory allows, and are lost with this"
                " process. Pass the path of a folder that you may write to, on a disk with"
                " room",
                call,
            )
            kept = shard
            index.add(kept)
        if kept.path is None:
            with self.contents.lock:
                self.contents.recent.shrink(self.recent_bytes)
            self._spill(call)

    def evict(self, used: set[Shard]) -> None:
        """Evict the least recently used shards beyond the bounds, those of this call last."""
        contents = self.contents
        temporary = made_temporary_folder()
        evicted: set[Shard] = set()
        bound = None
        with contents.lock:
            shards = [(i, shard) for i in contents.indexes.values() for shard in i.shards]
            if self.max_bytes is not None:
                excess = sum(shard.n_bytes for _, shard in shards) - self.max_bytes
                if excess > 0:
                    bound = self.max_bytes
                    evicted |= self._evict_oldest(shards, excess, used)
            if temporary is not None:
                with suppress(OSError):
                    excess = temporary.n_bytes - temporary.max_bytes
                    spilled = [
                        (index, shard)
                        for index, shard in shards
                        if shard.path is not None
                        and shard.path.parent == temporary.path
                        and shard not in evicted
                    ]
                    if excess > 0:
                        bound = temporary.max_bytes if bound is None else bound
                        evicted |= self._evict_oldest(spilled, excess, used)
        if evicted & used:
            needed = sum(shard.n_bytes for shard in used)
            warn(
                f"The store's bound of {bound} bytes is less than the {needed} bytes of one call's"
                " states: some states are removed now, and their texts are read again next time."
                " Raise max_bytes, make room on the disk, or keep states in fewer bits"
                " with StateStore(bits=8) or StateStore(bits=4).",
            )

    def _evict_oldest(
        self, shards: list[tuple[ShardIndex, Shard]], n_bytes: float, used: set[Shard]
    ) -> set[Shard]:
        """Evict the least recently used shards until `n_bytes` are free, used ones last."""
        evicted = set()
        for index, shard in sorted(shards, key=lambda pair: (pair[1] in used, pair[1].used_at())):
            if n_bytes <= 0:
                break
            self.contents.evict(index, shard)
            evicted.add(shard)
            n_bytes -= shard.n_bytes
        return evicted

    def _spill(self, call: Call) -> None:
        """Move the least recently used shards from memory to temporary files beyond the bound.

        Shards that can't be written there are evicted.
        """
        contents = self.contents
        with contents.spill_lock:
            while in_memory := self._beyond_memory():
                index, n_bytes = in_memory[0][0], 0
                shards: list[Shard] = []
                for owner, shard in in_memory:
                    if owner is not index or n_bytes >= self.shard_bytes:
                        break
                    if shards and shard.kind != shards[0].kind:
                        break
                    shards.append(shard)
                    n_bytes += shard.n_bytes
                place = Path(tempfile.gettempdir())
                try:
                    place = temporary_folder().path
                    path = place / f"{uuid.uuid4().hex}.safetensors"
                    merged = Shard.merged(shards).save(path, map_small=True)
                except OSError as error:
                    self._evict_beyond_memory()
                    _warn_unwritable(
                        error,
                        os.fspath(place),
                        f"states beyond max_memory={self.max_memory} are dropped, and their texts"
                        " are read again when they are needed. Make room there, or raise"
                        " max_memory",
                        call,
                    )
                    return
                with contents.lock:
                    if all(shard in index.shards for shard in shards):
                        index.add(merged)  # it replaces these shards
                        continue
                with suppress(OSError):  # a shard was removed meanwhile: try again without it
                    path.unlink()

    def _beyond_memory(self) -> list[tuple[ShardIndex, Shard]]:
        """All shards in memory, the least recently used first, if they are beyond the bound."""
        contents = self.contents
        with contents.lock:
            if contents.memory_bytes <= self.max_memory:
                return []
            shards = [(i, shard) for i in contents.indexes.values() for shard in i.shards]
            in_memory = [(index, shard) for index, shard in shards if shard.path is None]
            return sorted(in_memory, key=lambda pair: pair[1].last_used)

    def _evict_beyond_memory(self) -> None:
        contents = self.contents
        with contents.lock:
            for index, shard in self._beyond_memory():
                if contents.memory_bytes > self.max_memory:
                    contents.evict(index, shard)


def _warn_unwritable(error: OSError, place: str, consequence: str, call: Call) -> None:
    if place not in call.warned:
        call.warned.add(place)
        warn(
            f"Token states could not be written to {place}"
            f" ({error.strerror or error}): {consequence}.",
        )

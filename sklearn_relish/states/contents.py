"""The in-process cache of one store: shard indexes, recent states, locks."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sklearn_relish.states.backend import Backend, FolderBackend, MemoryBackend
from sklearn_relish.states.index import ShardIndex
from sklearn_relish.states.recent import RecentStates
from sklearn_relish.states.shard import Entry, MemoryStates, Shard
from sklearn_relish.utils.locks import ForkSafeLock, renew_in_forked_child

MAX_FOLDERS = 16  # whose indexes are kept in memory


@dataclass(eq=False)
class Call:
    """A call of the store that has not returned yet.

    Attributes
    ----------
    wanted : collection of bytes
        Keys of all texts that it will return at once.
    held : dict
        Entries of wanted texts whose shards were evicted during the call.
    warned : set of str
        Places of which the call has warned already.
    """

    wanted: Collection[bytes] = ()
    held: dict[bytes, Entry[Shard]] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)


@dataclass(eq=False)
class Contents:
    """The indexes of one place, and the states that this process holds in memory.

    All attributes are guarded by `lock`. No thread holds it while texts are read, files are read
    or written, or another process is waited for. It may be held while files are removed.
    """

    backend: Backend
    indexes: dict[str, ShardIndex] = field(default_factory=dict)  # by collection
    recent: RecentStates = field(default_factory=RecentStates)
    hits: int = 0
    misses: int = 0
    calls: set[Call] = field(default_factory=set)
    reserved: set[bytes] = field(default_factory=set)  # texts that a thread is reading

    def __post_init__(self) -> None:
        self._make_locks()
        renew_in_forked_child(self, Contents._renew)

    def _make_locks(self) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)  # texts were read, or are free again
        self.spill_lock = threading.Lock()  # held while states are moved to temporary files

    def _renew(self) -> None:
        if not self.lock.acquire(blocking=False):  # a thread may have left it half changed
            self.indexes, self.recent = {}, RecentStates()
        self._make_locks()
        self.calls, self.reserved = set(), set()
        for index in self.indexes.values():
            index.renew(self.lock)

    @property
    def memory_bytes(self) -> int:
        """Bytes of states that are kept in memory, without recent ones."""
        return sum(index.memory_bytes for index in self.indexes.values())

    def index(self, collection: str) -> ShardIndex:
        """The index of a collection, made when it is first needed."""
        with self.lock:
            if collection not in self.indexes:
                self.indexes[collection] = ShardIndex(collection, self.backend, self.lock)
            return self.indexes[collection]

    def find(self, index: ShardIndex, key: bytes) -> Entry[Shard | MemoryStates] | None:
        """A text's entry among kept and recent states."""
        return index.entries.get(key) or self.recent.get(key)

    def evict(self, index: ShardIndex, shard: Shard) -> None:
        """Remove a shard to keep a bound. Calls that want its texts hold them until they return."""
        for call in self.calls:
            if call.wanted:
                call.held |= {key: e for key, e in shard.entries() if key in call.wanted}
        index.remove(shard)

    @contextmanager
    def calling(self, call: Call) -> Iterator[None]:
        """Have a call among `calls` until the context is left."""
        with self.lock:
            self.calls.add(call)
        try:
            yield
        finally:
            with self.lock:
                self.calls.discard(call)

    @contextmanager
    def reserve(self, keys: Iterable[bytes]) -> Iterator[set[bytes]]:
        """Keep other threads from reading the texts of the yielded set, which may shrink."""
        mine = set(keys)
        with self.lock:
            self.reserved |= mine
        try:
            yield mine
        finally:
            self.release(mine, mine.copy())

    def release(self, mine: set[bytes], keys: Iterable[bytes]) -> None:
        """Let other threads have texts that were read, or will be read later."""
        with self.lock:
            keys = mine.intersection(keys)
            self.reserved -= keys
            mine -= keys
            self.changed.notify_all()

    def reserve_again(self, mine: set[bytes], keys: Iterable[bytes]) -> None:
        """Take texts back after `release`, except those that another thread has taken."""
        with self.lock:
            keys = set(keys) - self.reserved
            self.reserved |= keys
            mine |= keys


_cached: dict[Path | None, Contents] = {}  # the most recently used last
_cached_lock = ForkSafeLock()


def contents_of(folder: Path | None) -> Contents:
    """The cache of a folder's states in this process, or of the states without a folder.

    It is shared by all stores of the folder. The least recently used folders are discarded.
    """
    with _cached_lock:
        contents = _cached.pop(folder, None)
        new = contents is None
        if contents is None:
            contents = Contents(MemoryBackend() if folder is None else FolderBackend(folder))
        _cached[folder] = contents
        other_folders = [path for path in _cached if path not in (None, folder)]
    if new and other_folders:
        gone = [path for path in other_folders if not os.path.exists(path)]
        with _cached_lock:
            for path in [*gone, *(other_folders[: -(MAX_FOLDERS - 1)])]:
                if path in _cached and not _cached[path].calls:
                    del _cached[path]
    return contents

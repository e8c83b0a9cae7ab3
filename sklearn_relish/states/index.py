"""The index of one collection of shards: where this process finds the states of each text.

It notices shards that other processes add and remove, refuses those whose checksum does not agree,
and merges small ones.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress

import torch

from sklearn_relish.states.backend import COLLECTION_NAME, Backend
from sklearn_relish.states.quantization import array_dtype, state_size
from sklearn_relish.states.shard import (
    KEY_BYTES,
    SMALL_BYTES,
    DamagedShardError,
    Entry,
    MemoryStates,
    Shard,
)
from sklearn_relish.states.temporary import remove_temporary_file
from sklearn_relish.states.token_states import TokenStates

STATES_VERSION = 1  # goes up when this package computes other states for the same text
MERGE_SHARDS = 32  # small shards of similar size that are merged


class ShardIndex:
    """The texts of one collection, and the shards that hold their states.

    Shards lie in the backend, in memory, or in the temporary folder. Methods may be called by
    several threads. Files are read and written without the lock; it may be held while they are
    removed.

    Parameters
    ----------
    collection : str
        Its name, see `Backend`.
    backend : Backend
    lock : RLock
        Guards all attributes; other indexes may share it.

    Attributes
    ----------
    entries : dict
        Where each text's states lie, by the text's key.
    shards : Counter
        Number of texts that `entries` finds in each shard. It is zero if all of a shard's texts
        are found in other shards.
    n_bytes, memory_bytes : int
        Bytes of all states, and of those that lie in memory.
    sizes : collection of int
        Sizes D that a token's state may have; empty: any size.
    """

    def __init__(self, collection: str, backend: Backend, lock: threading.RLock) -> None:
        self.collection = collection
        self.backend = backend
        self.entries: dict[bytes, Entry[Shard]] = {}
        self.shards: Counter[Shard] = Counter()
        self.n_bytes = self.memory_bytes = 0
        self.sizes: Collection[int] = ()
        match = COLLECTION_NAME.fullmatch(collection.rpartition("/")[2])
        if match is None:
            raise ValueError(f"{collection!r} is not the name of a collection.")
        self._label = match.groupdict()
        self._names: dict[Shard, str] = {}  # of the backend's shards
        self._seen: set[str] = set()  # names in the backend that need not be opened any more
        self.renew(lock)

    def renew(self, lock: threading.RLock) -> None:
        """Use another lock, as a forked child does, in which no other thread is saving."""
        self.lock = lock
        self._saving: set[str] = set()  # names of shards that threads are saving

    def refresh(self) -> list[str]:
        """Add shards that are new in the backend and discard those that are gone.

        A damaged shard is removed.

        Returns
        -------
        list of str
            For each shard that can't be used, where it lies and what is wrong.

        Raises
        ------
        OSError
            If the backend can't be read.
        """
        with self.lock:
            before = self._seen.copy()
        listed = self.backend.names(self.collection)
        with self.lock:
            for shard, name in list(self._names.items()):
                # `listed` may lack what another thread has added since.
                if name in before and name not in listed:
                    self.discard(shard)
            self._seen -= before - listed
            new = sorted(listed - self._seen - self._saving)
        problems = []
        for name in new:
            location = self.backend.location(self.collection, name)
            try:
                shard = self.backend.load(self.collection, name)
                self._check(shard)
                with self.lock:
                    if name not in self._seen:  # another thread may have opened it too
                        self._add_stored(shard, name)
            except DamagedShardError as error:
                self.backend.remove(self.collection, name)
                problems.append(f"{location} ({error})")
            except FileNotFoundError:
                pass
            except OSError as error:
                problems.append(f"{location} ({error.strerror or error})")
            with self.lock:
                self._seen.add(name)
        return problems

    def require_sizes(self, sizes: Collection[int]) -> list[str]:
        """Accept only states of these sizes D; remove and report shards of another size."""
        problems = []
        with self.lock:
            if sizes != self.sizes:
                self.sizes = sizes
                for shard in list(self.shards):
                    try:
                        self._check(shard)
                    except DamagedShardError as error:
                        problems.append(f"{shard.path} ({error})")
                        self.remove(shard)
        return problems

    def verify(self, keys: Iterable[bytes]) -> list[str]:
        """Drop the shards of these texts whose states are not what was saved, and report them."""
        problems = []
        with self.lock:
            shards = {self.entries[key].holder for key in keys if key in self.entries}
        for shard in shards:
            problem, damaged = None, False
            try:
                if shard.is_intact():
                    continue
                problem = f"{shard.path} (its states do not agree with their checksum)"
                damaged = True
            except FileNotFoundError:
                pass
            except OSError as error:
                problem = f"{shard.path} ({error.strerror or error})"
            with self.lock:
                if shard not in self.shards:  # another thread has dropped it already
                    continue
                if damaged:
                    self.remove(shard)
                else:
                    self.discard(shard)
            if problem is not None:
                problems.append(problem)
        return problems

    def save(self, shard: Shard) -> Shard:
        """Save a shard in the backend and add it.

        Raises
        ------
        OSError
            If it can't be saved.
        """
        name = uuid.uuid4().hex
        with self.lock:
            self._saving.add(name)  # before it appears: `refresh` is not to open it
        try:
            saved = self.backend.save(self.collection, name, shard)
            with self.lock:
                self._add_stored(saved, name)
        finally:
            with self.lock:
                self._saving.discard(name)
        return saved

    def add(self, shard: Shard) -> None:
        """Add a shard. Texts that other shards hold too are found in this one from now on."""
        with self.lock:
            self.n_bytes += shard.n_bytes
            if shard.path is None:
                self.memory_bytes += shard.n_bytes
            self.shards[shard] += 0
            for key, entry in shard.entries():
                self.shards[shard] += 1
                self._discard_text(key)
                self.entries[key] = entry

    def discard(self, shard: Shard) -> None:
        """Drop a shard from the index. Texts that other shards hold too are found there."""
        with self.lock:
            for key in shard.text_keys():
                if key in self.entries and self.entries[key].holder is shard:
                    self._discard_text(key)
            self._drop(shard)
            for other, n_texts in self.shards.items():
                if n_texts < len(other.lengths):
                    found = {k: e for k, e in other.entries() if k not in self.entries}
                    self.entries |= found
                    self.shards[other] += len(found)

    def remove(self, shard: Shard) -> None:
        """Discard a shard and delete it from the backend or this process's temporary folder."""
        with self.lock:
            name = self._names.get(shard)
        self.discard(shard)
        if name is not None:
            self.backend.remove(self.collection, name)
        elif shard.path is not None:
            remove_temporary_file(shard.path)

    def merge_small(self) -> list[str]:
        """Merge the backend's small shards if there are many, as single predictions make them.

        A merged shard is of another size, so a text is rewritten only a few times. A process that
        is killed while it merges leaves texts stored twice, which does no harm.

        Returns
        -------
        list of str
            Shards that can't be used, as `refresh` reports them.
        """
        with self.lock:
            groups = self._mergeable()
            if self.backend.in_memory:  # within one lock: no other process takes part
                for group in groups:
                    self.save(Shard.merged(group))  # the group's shards are dropped
                return []
        if not groups:
            return []
        problems: list[str] = []
        with suppress(OSError), self.backend.lock(self.collection):
            problems = self.refresh()
            self.backend.clean(self.collection)
            with self.lock:
                for shard, n_texts in list(self.shards.items()):
                    if not n_texts and shard.n_bytes < SMALL_BYTES:
                        self.remove(shard)
                groups = self._mergeable()
            for group in groups:
                intact = [shard for shard in group if shard.is_intact()]
                if len(intact) > 1:
                    self.save(Shard.merged(intact))
                    for shard in intact:
                        self.remove(shard)
        return problems

    def _mergeable(self) -> list[list[Shard]]:
        """Groups of the backend's small shards of similar size."""
        groups = defaultdict(list)
        for shard in self._names:
            if shard.n_bytes < SMALL_BYTES:
                size = shard.n_bytes.bit_length() // 5  # up to 32 times as large
                groups[size, shard.kind].append(shard)
        return [group for group in groups.values() if len(group) >= MERGE_SHARDS]

    def _check(self, shard: Shard) -> None:
        """Refuse a shard whose states are not those of this collection."""
        if any(shard.label[name] != value for name, value in self._label.items()):
            raise DamagedShardError("its label does not agree with its folder")
        if shard.states.dtype != array_dtype(self._label["dtype"]):
            raise DamagedShardError(f"its states are {shard.states.dtype}")
        size = state_size(shard.states)
        if self.sizes and size not in self.sizes:
            raise DamagedShardError(f"its states have {size} numbers instead of {self.sizes}")

    def _add_stored(self, shard: Shard, name: str) -> None:
        """Add a shard that the backend holds. The caller holds the lock."""
        self._seen.add(name)
        self._names[shard] = name
        self.add(shard)

    def _discard_text(self, key: bytes) -> None:
        entry = self.entries.pop(key, None)
        if entry is not None:
            self.shards[entry.holder] -= 1
            if not self.shards[entry.holder] and entry.holder.path is None:
                self._drop(entry.holder)

    def _drop(self, shard: Shard) -> None:
        name = self._names.pop(shard, None)
        if self.shards.pop(shard, None) is not None:
            self.n_bytes -= shard.n_bytes
            if shard.path is None:
                self.memory_bytes -= shard.n_bytes
        if name is not None and self.backend.in_memory:  # what no index finds is not held
            self.backend.remove(self.collection, name)


def text_key(collection: str, text: str) -> bytes:
    """The key of a text's states: a digest of the text and of all that changes its states."""
    identity = f"{STATES_VERSION}/{collection}/{text}"
    return hashlib.blake2b(identity.encode(), digest_size=KEY_BYTES).digest()


def gather(entries: Sequence[Entry[Shard | MemoryStates]]) -> TokenStates:
    """States of texts in the order of their entries; nothing is copied."""
    numbers = {holder: i for i, holder in enumerate(dict.fromkeys(e.holder for e in entries))}
    array_index = torch.tensor([numbers[entry.holder] for entry in entries])
    vectors = None
    n_vectors = min((holder.vectors.shape[1] for holder in numbers), default=0)
    if n_vectors > 0:
        vectors = TokenStates(
            arrays=tuple(holder.vectors.flatten(0, 1) for holder in numbers),
            array_index=array_index,
            starts=torch.tensor([e.holder.vectors.shape[1] * e.number for e in entries]),
            lengths=torch.full((len(entries),), n_vectors),
        )
    matches = None
    if numbers and all(len(holder.matches) for holder in numbers):
        matches = TokenStates(
            arrays=tuple(holder.matches for holder in numbers),
            array_index=array_index,
            starts=torch.tensor([entry.first_token for entry in entries]),
            lengths=torch.tensor([entry.length for entry in entries]),
        )
    return TokenStates(
        arrays=tuple(holder.states for holder in numbers),
        array_index=array_index,
        starts=torch.tensor([entry.start for entry in entries]),
        lengths=torch.tensor([entry.length for entry in entries]),
        files=tuple(holder.path if isinstance(holder, Shard) else None for holder in numbers),
        vectors=vectors,
        matches=matches,
    )

"""A shelf: the states of one model at one layer, as far as this process knows them.

It finds the shards that other processes put into the shelf's folder, trusts none whose checksum
disagrees, and keeps their number small.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError

from sklearn_relish.claims import Claims
from sklearn_relish.shards import DamagedShardError, Entry, Shard
from sklearn_relish.states import TokenStates

SHARD_BYTES = 64 * 2**20  # states gathered before a shard is made
MERGE_SHARDS = 32  # files of like size, smaller than half of that, that are merged
SHARD_FILES = "[0-9a-f]" * 32 + ".safetensors"


class Shelf:
    """An index over shards.

    Parameters
    ----------
    folder : Path or None
        Where its files lie; None: it has none.

    Attributes
    ----------
    entries : dict
        Where each text's states lie, by the text's key.
    shards : Counter
        The shards that hold something, and how many texts.
    n_bytes, memory_bytes : int
        Bytes of all states, and of those that are held in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.entries: dict[bytes, Entry] = {}
        self.shards: Counter[Shard] = Counter()
        self.n_bytes = self.memory_bytes = 0
        self.claims = None if folder is None else Claims(folder / "claims")
        self._seen: set[str] = set()

    def look(self) -> list[str]:
        """Find files that are new; tell which of them can't be used, and why."""
        troubles = []
        for path in [] if self.folder is None else sorted(self.folder.glob(SHARD_FILES)):
            if path.name in self._seen:
                continue
            self._seen.add(path.name)
            try:
                self.add(Shard.open(path))
            except FileNotFoundError:  # merged or removed since
                continue
            except DamagedShardError as error:
                _unlink(path)
                troubles.append(f"{path} ({error})")
            except OSError as error:
                troubles.append(f"{path} ({error})")
        return troubles

    def verify(self, keys: Iterable[bytes]) -> list[str]:
        """Drop shards of these texts whose states aren't what was written; tell which."""
        used = {self.entries[key].shard for key in keys if key in self.entries}
        damaged = [shard for shard in used if not shard.is_whole()]
        for shard in damaged:
            self.remove(shard)
        return [f"{shard.path} (its states do not agree with their checksum)" for shard in damaged]

    def states(self, keys: list[bytes]) -> TokenStates:
        """States of texts that are all here, in the order of their keys; nothing is copied."""
        entries = [self.entries[key] for key in keys]
        numbers = {shard: i for i, shard in enumerate(dict.fromkeys(e.shard for e in entries))}
        return TokenStates(
            arrays=tuple(shard.states for shard in numbers),
            array=torch.tensor([numbers[entry.shard] for entry in entries]),
            starts=torch.tensor([entry.start for entry in entries]),
            lengths=torch.tensor([entry.length for entry in entries]),
        )

    def add(self, shard: Shard) -> None:
        """Take in a shard; where it has a text that others have too, it counts."""
        self.n_bytes += shard.n_bytes
        if shard.path is None:
            self.memory_bytes += shard.n_bytes
        else:
            self._seen.add(shard.path.name)
        for key, entry in shard.entries():
            self._forget(key)
            self.entries[key] = entry
            self.shards[shard] += 1

    def remove(self, shard: Shard) -> None:
        """Forget a shard's texts and delete its file."""
        for key in shard.text_keys():
            if key in self.entries and self.entries[key].shard is shard:
                self._forget(key)
        if shard.path is not None:
            _unlink(shard.path)

    def merge_small(self) -> None:
        """Merge small files when there are many of like size, as single predictions make them.

        A text is rewritten a few times at most, since a merged file is of another size. A process
        that is killed at it leaves texts twice, which does no harm.
        """
        if self.claims is None or not any(True for _ in self._mergeable()):
            return
        with suppress(OSError, NotImplementedError, SafetensorError), self.claims.lock():
            self.look()
            for group in self._mergeable():
                whole = [shard for shard in group if shard.path.exists() and shard.is_whole()]
                if len(whole) > 1:
                    self.add(Shard.merged(whole).save(self.folder))
                    for shard in whole:
                        _unlink(shard.path)

    def _mergeable(self) -> Iterator[list[Shard]]:
        """Groups of small files of like size, each together no larger than two full shards."""
        sizes = defaultdict(list)
        for shard in self.shards:
            if shard.path is not None and shard.n_bytes < SHARD_BYTES // 2:
                sizes[shard.n_bytes.bit_length() // 5].append(shard)  # up to 32 times as large
        for shards in sizes.values():
            group: list[Shard] = []
            for shard in shards if len(shards) >= MERGE_SHARDS else []:
                group.append(shard)
                if sum(shard.n_bytes for shard in group) >= SHARD_BYTES:
                    yield group
                    group = []
            if group:
                yield group

    def _forget(self, key: bytes) -> None:
        entry = self.entries.pop(key, None)
        if entry is None:
            return
        self.shards[entry.shard] -= 1
        if not self.shards[entry.shard]:
            del self.shards[entry.shard]
            self.n_bytes -= entry.shard.n_bytes
            if entry.shard.path is None:
                self.memory_bytes -= entry.shard.n_bytes


def _unlink(path: Path) -> None:
    with suppress(OSError):  # gone, not ours to remove, or mapped by another process on Windows
        path.unlink()

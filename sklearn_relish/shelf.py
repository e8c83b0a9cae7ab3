"""A shelf: the states of one model at one layer, as far as this process knows them.

It finds the shards that other processes put into the shelf's folder, trusts none whose checksum
disagrees, and keeps their number small.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch

from sklearn_relish.claims import Claims
from sklearn_relish.shards import SMALL_BYTES, DamagedShardError, Entry, Shard
from sklearn_relish.states import TokenStates

MERGE_SHARDS = 32  # small shards of like size that are merged
LEFT_BEHIND_SECONDS = 3600.0  # after which a file that is being written is nobody's
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
        How many texts are to be found in each shard; none in a file whose texts others have too.
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
        """Find files that are new, forget those that are gone; tell which can't be used, and why.

        A file found damaged is removed.
        """
        if self.folder is None:
            return []
        paths = {path.name: path for path in self.folder.glob(SHARD_FILES)}
        for shard in list(self.shards):
            ours = shard.path is not None and shard.path.parent == self.folder
            if ours and shard.path.name not in paths:
                self.forget(shard)
        self._seen &= paths.keys()
        troubles = []
        for name in sorted(paths.keys() - self._seen):
            path = paths[name]
            try:
                self.add(Shard.open(path))
            except DamagedShardError as error:
                _unlink(path)
                troubles.append(f"{path} ({error})")
            except OSError as error:
                if path.exists():  # else merged or removed since
                    troubles.append(f"{path} ({error})")
            self._seen.add(name)
        return troubles

    def verify(self, keys: Iterable[bytes]) -> list[str]:
        """Drop the shards of these texts whose states aren't what was written; tell which."""
        troubles = []
        for shard in {self.entries[key].shard for key in keys if key in self.entries}:
            try:
                if not shard.is_whole():
                    troubles.append(f"{shard.path} (its states do not agree with their checksum)")
                    self.remove(shard)
            except FileNotFoundError:
                self.forget(shard)
            except OSError as error:
                troubles.append(f"{shard.path} ({error})")
                self.forget(shard)
        return troubles

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
        self.shards[shard] += 0
        for key, entry in shard.entries():
            self.shards[shard] += 1
            self._forget_text(key)
            self.entries[key] = entry

    def forget(self, shard: Shard) -> None:
        """Have nothing to do with a shard any more; where others have its texts, they count."""
        for key in shard.text_keys():
            if key in self.entries and self.entries[key].shard is shard:
                self._forget_text(key)
        self._drop(shard)
        for other, n_texts in self.shards.items():
            if n_texts < len(other.lengths):
                found = {k: e for k, e in other.entries() if k not in self.entries}
                self.entries |= found
                self.shards[other] += len(found)

    def remove(self, shard: Shard) -> None:
        """Forget a shard and delete its file."""
        self.forget(shard)
        if shard.path is not None:
            _unlink(shard.path)

    def merge_small(self) -> list[str]:
        """Merge small shards when there are many of like size, as single predictions make them.

        A text is rewritten a few times at most, since a merged shard is of another size. A process
        that is killed at it leaves texts twice, which does no harm. Files that can't be used are
        told as by `look`.
        """
        if not self._mergeable():
            return []
        if self.claims is None:
            for group in self._mergeable():
                self.add(Shard.merged(group))  # which takes the place of the group
            return []
        troubles: list[str] = []
        with suppress(OSError), self.claims.lock():
            troubles = self.look()
            for partial in self.folder.glob(".*.partial"):
                if time.time() - partial.stat().st_mtime > LEFT_BEHIND_SECONDS:
                    shutil.rmtree(partial, ignore_errors=True)
            for shard, n_texts in list(self.shards.items()):
                if not n_texts and shard.n_bytes < SMALL_BYTES:
                    self.remove(shard)
            for group in self._mergeable():
                whole = [shard for shard in group if shard.is_whole()]
                if len(whole) > 1:
                    self.add(Shard.merged(whole).save(self.folder))
                    for shard in whole:
                        self.remove(shard)
        return troubles

    def _mergeable(self) -> list[list[Shard]]:
        """Groups of small shards of like size: the folder's files, or without one, in memory."""
        sizes = defaultdict(list)
        for shard in self.shards:
            place = None if shard.path is None else shard.path.parent
            if shard.n_bytes < SMALL_BYTES and place == self.folder:
                sizes[shard.n_bytes.bit_length() // 5].append(shard)  # up to 32 times as large
        return [group for group in sizes.values() if len(group) >= MERGE_SHARDS]

    def _forget_text(self, key: bytes) -> None:
        entry = self.entries.pop(key, None)
        if entry is not None:
            self.shards[entry.shard] -= 1
            if not self.shards[entry.shard] and entry.shard.path is None:
                self._drop(entry.shard)

    def _drop(self, shard: Shard) -> None:
        if self.shards.pop(shard, None) is not None:
            self.n_bytes -= shard.n_bytes
            if shard.path is None:
                self.memory_bytes -= shard.n_bytes


def _unlink(path: Path) -> None:
    with suppress(OSError):  # gone, not ours to remove, or mapped by another process on Windows
        path.unlink()

"""A shelf: the states of one model at one layer, as far as this process knows them.

It finds the shards that other processes put into the shelf's folder, trusts none whose checksum
disagrees, and keeps their number small.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

import torch

from sklearn_relish.states.lease import Claims
from sklearn_relish.states.shard import SMALL_BYTES, DamagedShardError, Entry, Shard
from sklearn_relish.states.temporary import made_temporary_folder
from sklearn_relish.states.token_states import SCALE_BYTES, TokenStates
from sklearn_relish.utils.files import check_no_links

MERGE_SHARDS = 32  # small shards of like size that are merged
LEFT_BEHIND_SECONDS = 3600.0  # after which a file that is being written is nobody's
SHARD_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
SHELF_NAME = re.compile(
    r"layer(?P<layer>\d+)-(?P<dtype>\w+(-8bit)?)-(?P<max_length>\d+)(-windows)?"
)


class Shelf:
    """An index over shards.

    Its methods may be called by several threads. Files are listed, read and written without the
    lock, so that no thread waits for another one's disk.

    Parameters
    ----------
    name : str
        What the states are of; the last part names layer, dtype and length.
    folder : Path or None
        Where its files lie; None: it has none.
    lock : RLock
        Guards all attributes; other indexes may share it.

    Attributes
    ----------
    entries : dict
        Where each text's states lie, by the text's key.
    shards : Counter
        How many texts are to be found in each shard; none in a file whose texts others have too.
    n_bytes, memory_bytes : int
        Bytes of all states, and of those that are held in memory.
    widths : collection of int
        Sizes D that a state may have; none: any.
    writing : set of str
        Names of files that this process is writing.
    """

    def __init__(self, name: str, folder: Path | None, lock: threading.RLock) -> None:
        self.folder = folder
        self.lock = lock
        self.entries: dict[bytes, Entry] = {}
        self.shards: Counter[Shard] = Counter()
        self.n_bytes = self.memory_bytes = 0
        self.widths: Collection[int] = ()
        self.writing: set[str] = set()
        self.claims = None if folder is None else Claims(folder / "claims")
        self._label = SHELF_NAME.fullmatch(name.rpartition("/")[2]).groupdict()
        self._seen: set[str] = set()

    def look(self) -> list[str]:
        """Find files that are new, forget those that are gone; tell which can't be used, and why.

        A file found damaged is removed.

        Raises
        ------
        OSError
            If the folder can't be read, or is a link.
        """
        if self.folder is None:
            return []
        with self.lock:
            before = self._seen.copy()
        paths = self._files()
        with self.lock:
            for shard in list(self.shards):
                name = None if shard.path is None else shard.path.name
                ours = name is not None and shard.path.parent == self.folder
                # What another thread has added since may be missing from the list.
                if ours and name in before and name not in paths:
                    self.forget(shard)
            self._seen -= before - paths.keys()
            new = sorted(paths.keys() - self._seen - self.writing)
        troubles = []
        for name in new:
            path = paths[name]
            try:
                shard = Shard.open(path)
                self._check(shard)
                with self.lock:
                    if name not in self._seen:  # another thread may have found it too
                        self.add(shard)
            except DamagedShardError as error:
                _unlink(path)
                troubles.append(f"{path} ({error})")
            except OSError as error:
                if os.path.lexists(path):  # else merged or removed since
                    troubles.append(f"{path} ({error.strerror or error})")
            with self.lock:
                self._seen.add(name)
        return troubles

    def expect(self, widths: Collection[int]) -> list[str]:
        """Have states of these sizes D alone; shards of another size are removed and reported."""
        troubles = []
        with self.lock:
            if widths != self.widths:
                self.widths = widths
                for shard in list(self.shards):
                    try:
                        self._check(shard)
                    except DamagedShardError as error:
                        troubles.append(f"{shard.path} ({error})")
                        self.remove(shard)
        return troubles

    def verify(self, keys: Iterable[bytes]) -> list[str]:
        """Drop the shards of these texts whose states aren't what was written; tell which."""
        troubles = []
        with self.lock:
            shards = {self.entries[key].shard for key in keys if key in self.entries}
        for shard in shards:
            trouble, remove = None, False
            try:
                if shard.is_whole():
                    continue
                trouble = f"{shard.path} (its states do not agree with their checksum)"
                remove = True
            except FileNotFoundError:
                pass
            except OSError as error:
                trouble = f"{shard.path} ({error.strerror or error})"
            with self.lock:
                if shard not in self.shards:  # another thread was faster
                    continue
                (self.remove if remove else self.forget)(shard)
            if trouble is not None:
                troubles.append(trouble)
        return troubles

    def new_file(self, folder: Path) -> Path:
        """A name for a file of this process; `look` leaves it alone until it has been added."""
        path = folder / f"{uuid.uuid4().hex}.safetensors"
        with self.lock:
            self.writing.add(path.name)
        return path

    def save(self, shard: Shard) -> Shard:
        """Write a shard to the folder and add it.

        Raises
        ------
        OSError
            If it can't be written.
        """
        path = self.new_file(self.folder)
        try:
            saved = shard.save(path)
            with self.lock:
                self.add(saved)
        finally:
            with self.lock:
                self.writing.discard(path.name)
        return saved

    def add(self, shard: Shard) -> None:
        """Take in a shard; where it has a text that others have too, it counts."""
        with self.lock:
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
        with self.lock:
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
        """Forget a shard and delete its file, unless that is another process's temporary one."""
        self.forget(shard)
        if shard.path is not None:
            temporary = made_temporary_folder()
            if shard.path.parent in (self.folder, temporary and temporary.path):
                _unlink(shard.path)

    def merge_small(self) -> list[str]:
        """Merge small shards when there are many of like size, as single predictions make them.

        A text is rewritten a few times at most, since a merged shard is of another size. A process
        that is killed at it leaves texts twice, which does no harm. Files that can't be used are
        told as by `look`.
        """
        with self.lock:
            groups = self._mergeable()
            if self.claims is None:
                for group in groups:
                    self.add(Shard.merged(group))  # which takes the place of the group
        if not groups or self.claims is None:
            return []
        troubles: list[str] = []
        with suppress(OSError), self.claims.lock():
            troubles = self.look()
            for partial in self.folder.glob(".*.partial"):
                old = time.time() - partial.lstat().st_mtime > LEFT_BEHIND_SECONDS
                if old and not partial.is_symlink():
                    shutil.rmtree(partial, ignore_errors=True)
            with self.lock:
                for shard, n_texts in list(self.shards.items()):
                    if not n_texts and shard.n_bytes < SMALL_BYTES:
                        self.remove(shard)
                groups = self._mergeable()
            for group in groups:
                whole = [shard for shard in group if shard.is_whole()]
                if len(whole) > 1:
                    self.save(Shard.merged(whole))
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

    def _files(self) -> dict[str, Path]:
        """The folder's shards by name."""
        check_no_links(self.folder, n_parents=1)
        try:
            with os.scandir(self.folder) as entries:
                return {e.name: Path(e.path) for e in entries if SHARD_NAME.fullmatch(e.name)}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def _check(self, shard: Shard) -> None:
        """Refuse a shard of other states than this index is of."""
        if any(shard.label[name] != value for name, value in self._label.items()):
            raise DamagedShardError("its label does not agree with its folder")
        packed = self._label["dtype"].endswith("-8bit")
        dtype = torch.uint8 if packed else getattr(torch, self._label["dtype"], None)
        if shard.states.dtype != dtype:
            raise DamagedShardError(f"its states are {shard.states.dtype}")
        width = shard.states.shape[1] - (SCALE_BYTES if packed else 0)
        if self.widths and width not in self.widths:
            raise DamagedShardError(f"its states have {width} numbers instead of {self.widths}")

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


def gather(entries: list[Entry]) -> TokenStates:
    """States of texts in the order of their entries; nothing is copied."""
    numbers = {shard: i for i, shard in enumerate(dict.fromkeys(e.shard for e in entries))}
    return TokenStates(
        arrays=tuple(shard.states for shard in numbers),
        array=torch.tensor([numbers[entry.shard] for entry in entries]),
        starts=torch.tensor([entry.start for entry in entries]),
        lengths=torch.tensor([entry.length for entry in entries]),
    )

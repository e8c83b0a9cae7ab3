"""Backends: where shards of token states are stored. Add a storage backend here.

A backend stores, lists and removes shards, and leases texts to one process at a time. It decides
nothing: `StateStore` decides what is read, kept and evicted. A backend is selected in
`contents.contents_of`.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from sklearn_relish.states.lease import Leases
from sklearn_relish.states.quantization import SUFFIXES
from sklearn_relish.states.shard import Shard
from sklearn_relish.utils.files import check_no_links

LEFT_BEHIND_SECONDS = 3600.0  # older unfinished files are removed
FILE_NAME = re.compile(r"([0-9a-f]{32})\.safetensors")
COLLECTION_NAME = re.compile(
    rf"layer(?P<layer>\d+)-(?P<dtype>\w+({'|'.join(SUFFIXES)})?)-(?P<max_length>\d+)"
    r"(-windows)?(-pair[0-9a-f]{16})?"
)
COLLECTION_FOLDERS = "[0-9a-f]" * 32 + "/layer*-*-*/"


class Backend(ABC):
    """Stores the shards of one store.

    Shards are grouped in collections. A collection holds states that one model gave at one layer,
    in one dtype and up to one length, of single texts or of the pairs of one template. Its name is
    a path of two parts, for example ``"0f3a...9c/layer2-float32-512"``: the model's fingerprint,
    and the rest as `COLLECTION_NAME` matches it.

    All methods may be called by several threads at once. `tests/states/test_backend.py` has the
    tests that every backend passes.

    Attributes
    ----------
    in_memory : bool
        Whether the shards lie in this process's memory, within `max_memory`, where no other
        process finds them.
    """

    in_memory: bool = False

    @abstractmethod
    def collections(self) -> list[str]:
        """Names of the collections that exist.

        Raises
        ------
        OSError
            If they can't be listed.
        """

    @abstractmethod
    def names(self, collection: str) -> set[str]:
        """Names of the shards of a collection; none if there is no such collection.

        Raises
        ------
        OSError
            If they can't be listed.
        """

    @abstractmethod
    def load(self, collection: str, name: str) -> Shard:
        """A stored shard.

        Raises
        ------
        FileNotFoundError
            If it was removed.
        DamagedShardError
            If it is not what was saved. The states themselves may be checked later, by
            `Shard.is_intact`.
        OSError
            If it can't be read.
        """

    @abstractmethod
    def save(self, collection: str, name: str, shard: Shard) -> Shard:
        """Store a shard and return it as it is stored. It appears completely or not at all.

        Parameters
        ----------
        collection : str
        name : str
            32 hexadecimal digits, new for each shard.
        shard : Shard
            In memory.

        Raises
        ------
        OSError
            If it can't be stored. Nothing is left of it then.
        """

    @abstractmethod
    def remove(self, collection: str, name: str) -> None:
        """Remove a shard. It may be gone already, or be left if it can't be removed."""

    @abstractmethod
    def location(self, collection: str, name: str | None = None) -> str:
        """Where a collection or one of its shards lies, for messages."""

    def clean(self, collection: str) -> None:
        """Remove what killed processes have left unfinished. The caller holds `lock`."""
        return

    def lock(self, collection: str) -> AbstractContextManager[None]:
        """Exclude other processes, to lease texts of a collection or to merge its shards.

        Raises
        ------
        OSError
            If that is not possible. Each process then reads for itself, and merges nothing.
        """
        return nullcontext()

    def leased(self, collection: str) -> set[bytes]:
        """Keys of the texts that running processes have leased.

        Raises
        ------
        OSError
            As `lock`.
        """
        return set()

    def lease(self, collection: str, keys: list[bytes]) -> AbstractContextManager[None]:
        """Lease texts until the context is left, or the process ends. The caller holds `lock`."""
        return nullcontext()


class MemoryBackend(Backend):
    """Shards in this process's memory."""

    in_memory = True

    def __init__(self) -> None:
        # Each access is one operation on a dict, which is atomic between threads.
        self._shards: dict[str, dict[str, Shard]] = {}

    def collections(self) -> list[str]:
        """Collections that hold a shard."""
        return [name for name, shards in self._shards.copy().items() if shards]

    def names(self, collection: str) -> set[str]:
        """Keys of a collection's dict."""
        return set(self._shards.get(collection, ()))

    def load(self, collection: str, name: str) -> Shard:
        """The shard itself, as it was saved."""
        shard = self._shards.get(collection, {}).get(name)
        if shard is None:
            raise FileNotFoundError(self.location(collection, name))
        return shard

    def save(self, collection: str, name: str, shard: Shard) -> Shard:
        """Hold the shard, which takes no copy."""
        self._shards.setdefault(collection, {})[name] = shard
        return shard

    def remove(self, collection: str, name: str) -> None:
        """Let go of the shard."""
        self._shards.get(collection, {}).pop(name, None)

    def location(self, collection: str, name: str | None = None) -> str:
        """A name for messages."""
        return "memory/" + "/".join(filter(None, (collection, name)))


class FolderBackend(Backend):
    """Shards as files of a folder, which other processes and machines may use at the same time.

    Parameters
    ----------
    folder : Path
        It is made when something is stored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collections(self) -> list[str]:
        """Subfolders that this package has made; links are not followed."""
        with suppress(FileNotFoundError):
            os.scandir(self.folder).close()  # glob would ignore that it can't be read
        paths = [
            path
            for path in sorted(self.folder.glob(COLLECTION_FOLDERS))
            if COLLECTION_NAME.fullmatch(path.name)
        ]
        return [
            path.relative_to(self.folder).as_posix()
            for path in paths
            if not (path.is_symlink() or path.parent.is_symlink())
        ]

    def names(self, collection: str) -> set[str]:
        """The files that are named as shards; links to folders are refused."""
        folder = self.folder / collection
        check_no_links(folder, n_parents=1)
        try:
            with os.scandir(folder) as entries:
                matches = [FILE_NAME.fullmatch(entry.name) for entry in entries]
        except (FileNotFoundError, NotADirectoryError):
            return set()
        return {match[1] for match in matches if match}

    def load(self, collection: str, name: str) -> Shard:
        """Open a file, see `Shard.open`."""
        path = self._path(collection, name)
        try:
            return Shard.open(path)
        except OSError as error:
            if not os.path.lexists(path):  # merged or removed since it was listed
                raise FileNotFoundError(path) from error
            raise

    def save(self, collection: str, name: str, shard: Shard) -> Shard:
        """Write a file, see `Shard.save`."""
        return shard.save(self._path(collection, name))

    def remove(self, collection: str, name: str) -> None:
        """Delete a file."""
        with suppress(OSError):  # gone, not ours to remove, or mapped by a process on Windows
            self._path(collection, name).unlink()

    def location(self, collection: str, name: str | None = None) -> str:
        """The path of a subfolder or a file."""
        path = self.folder / collection if name is None else self._path(collection, name)
        return os.fspath(path)

    def clean(self, collection: str) -> None:
        """Remove unfinished files that have not changed for an hour."""
        for partial in (self.folder / collection).glob(".*.partial"):
            old = time.time() - partial.lstat().st_mtime > LEFT_BEHIND_SECONDS
            if old and not partial.is_symlink():
                shutil.rmtree(partial, ignore_errors=True)

    def lock(self, collection: str) -> AbstractContextManager[None]:
        """Lock a file, see `Leases`."""
        return self._leases(collection).lock()

    def leased(self, collection: str) -> set[bytes]:
        """Keys in the files of leases whose processes run."""
        return self._leases(collection).leased()

    def lease(self, collection: str, keys: list[bytes]) -> AbstractContextManager[None]:
        """Write and lock a file of keys."""
        return self._leases(collection).lease(keys)

    def _leases(self, collection: str) -> Leases:
        return Leases(self.folder / collection / "leases")

    def _path(self, collection: str, name: str) -> Path:
        return self.folder / collection / f"{name}.safetensors"

"""Leases: among processes that share a folder, each text is read by one process at a time.

A lease is a file of text keys and a file lock that the reading process holds. The operating system
releases the lock when the process ends, however it ends, and other processes then read the texts
that it left unread.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sklearn_relish.states.shard import split_keys
from sklearn_relish.utils.files import check_no_links, open_regular


class Leases:
    """The leases on the texts of one folder.

    Parameters
    ----------
    folder : Path
        It is made when it is first needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Exclude all other processes, to list leases and to take one.

        Raises
        ------
        OSError
            If the folder can't be written to, or its file system has no locks.
        """
        check_no_links(self.folder, n_parents=2)
        self.folder.mkdir(parents=True, exist_ok=True)
        with _file_lock(self.folder / "lock"):
            yield

    def leased(self) -> set[bytes]:
        """Keys that running processes have leased; leases of ended processes are removed.

        Raises
        ------
        OSError
            If the folder is a link, or its file system has no locks.
        """
        keys: set[bytes] = set()
        check_no_links(self.folder, n_parents=2)
        for path in self.folder.glob("*.lease"):
            holder = path.with_suffix(".holder")
            if any(p.is_symlink() or (p.exists() and not p.is_file()) for p in (path, holder)):
                continue  # this package did not make it, so no process has a lease by it
            try:
                with _file_lock(holder).acquire(timeout=0):
                    _remove(path)
            except Timeout:
                with suppress(FileNotFoundError), open_regular(path) as file:
                    keys.update(split_keys(file.read()))
        return keys

    @contextmanager
    def lease(self, keys: list[bytes]) -> Iterator[None]:
        """Lease keys until the context is left. Enter it while `lock` is held."""
        path = self.folder / f"{uuid.uuid4().hex}.lease"
        with _file_lock(path.with_suffix(".holder")):
            try:
                path.write_bytes(b"".join(keys))
                yield
            finally:
                _remove(path)


def _file_lock(path: Path) -> FileLock:
    """A lock for all users of the folder; the operating system frees it when its process ends."""
    return FileLock(path, mode=0o666, fallback_to_soft=False)


def _remove(path: Path) -> None:
    for file in (path, path.with_suffix(".holder")):
        with suppress(OSError):
            file.unlink()

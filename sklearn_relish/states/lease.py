"""Claims: which of the processes that share a folder reads which texts, so that none is read twice.

A claim is a file of texts' keys beside a lock that the reading process holds. A process that ends,
however it ends, lets go of its lock, and others read what it has not.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sklearn_relish.states.shard import split_keys
from sklearn_relish.utils.files import check_no_links, open_regular


class Claims:
    """The claims on texts of one folder.

    Parameters
    ----------
    folder : Path
        Made when it is first needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def lock(self) -> Iterator[None]:
        """The folder to oneself, for looking at claims and making one.

        Raises
        ------
        OSError
            If the folder can't be written to, or knows no locks.
        """
        check_no_links(self.folder, n_parents=2)
        self.folder.mkdir(parents=True, exist_ok=True)
        with _file_lock(self.folder / "lock"):
            yield

    def taken(self) -> set[bytes]:
        """Keys that running processes have claimed; claims left behind are removed.

        Raises
        ------
        OSError
            If the folder is a link, or knows no locks.
        """
        keys: set[bytes] = set()
        check_no_links(self.folder, n_parents=2)
        for path in self.folder.glob("*.claim"):
            holder = path.with_suffix(".holder")
            if any(p.is_symlink() or (p.exists() and not p.is_file()) for p in (path, holder)):
                continue  # not made by this package: no process claims anything with it
            try:
                with _file_lock(holder).acquire(timeout=0):
                    _remove(path)
            except Timeout:
                with suppress(FileNotFoundError), open_regular(path) as file:
                    keys.update(split_keys(file.read()))
        return keys

    @contextmanager
    def claim(self, keys: list[bytes]) -> Iterator[None]:
        """Claim keys, under the lock, until the context is left."""
        path = self.folder / f"{uuid.uuid4().hex}.claim"
        with _file_lock(path.with_suffix(".holder")):
            try:
                path.write_bytes(b"".join(keys))
                yield
            finally:
                _remove(path)


def _file_lock(path: Path) -> FileLock:
    """A lock that the system lets go of when its process ends, for any user of the folder."""
    return FileLock(path, mode=0o666, fallback_to_soft=False)


def _remove(path: Path) -> None:
    for file in (path, path.with_suffix(".holder")):
        with suppress(OSError):
            file.unlink()

"""The process's temporary folder. It is made on first use and removed when the process ends.

A killed process leaves its folder behind. The next process that makes a folder removes it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from multiprocessing.util import Finalize
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from sklearn_relish.utils.locks import ForkSafeLock

PREFIX = "sklearn_relish-temporary-"
YOUNG_SECONDS = 60.0  # a folder this new may belong to a process that is about to lock it


class TemporaryFolder(NamedTuple):
    """A folder, the lock that its process holds as long as it runs, and the folder's bound."""

    path: Path
    holder: FileLock
    max_bytes: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the folder's files."""
        with os.scandir(self.path) as entries:
            return sum(entry.stat().st_size for entry in entries if entry.is_file())


_lock = ForkSafeLock()
_made: dict[int, TemporaryFolder] = {}  # by process: a fork must not use its parent's folder


def made_temporary_folder() -> TemporaryFolder | None:
    """The process's temporary folder, or None if it has not been made."""
    return _made.get(os.getpid())


def temporary_folder() -> TemporaryFolder:
    """The process's temporary folder, made on first use and readable only by its user.

    Its bound is half of the free space that its disk has when the folder is made.

    Raises
    ------
    OSError
        If it can't be made.
    """
    with _lock:
        if os.getpid() not in _made:
            _remove_left_behind()
            path = Path(tempfile.mkdtemp(prefix=PREFIX))
            # Unlike atexit, this runs at the end of multiprocessing's child processes too, and
            # never in a fork of the process that asks for it.
            Finalize(None, shutil.rmtree, args=(path, True), exitpriority=0)
            holder = FileLock(path / "holder", thread_local=False, fallback_to_soft=False)
            try:
                holder.acquire()
                n_bytes = shutil.disk_usage(path).free // 2
            except BaseException:  # the next call tries another folder
                shutil.rmtree(path, ignore_errors=True)
                raise
            _made[os.getpid()] = TemporaryFolder(path, holder, n_bytes)
        return _made[os.getpid()]


def remove_temporary_file(path: Path) -> None:
    """Remove a file of this process's temporary folder; files of other folders are kept."""
    folder = made_temporary_folder()
    if folder is not None and path.parent == folder.path:
        with suppress(OSError):  # gone already
            path.unlink()


def _remove_left_behind() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        holder = path / "holder"
        try:
            old = time.time() - path.stat().st_mtime > YOUNG_SECONDS
            if old and holder.is_file() and not path.is_symlink():
                with FileLock(holder, fallback_to_soft=False).acquire(timeout=0):
                    shutil.rmtree(path, ignore_errors=True)
        except (OSError, Timeout):  # another user's, or in use
            continue

"""Files: digests remembered between processes, and reading where others may write."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from platformdirs import user_cache_path

REMEMBERED_BYTES = 2**20  # smaller files are hashed faster than looked up
SETTLED_SECONDS = 2.0  # a file that changed more recently may change within its time stamp


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    That of a large file is remembered in the user's cache folder for as long as the file keeps
    its path and its stamp, so that a process which needs no weights reads none.

    Parameters
    ----------
    path : Path

    Raises
    ------
    OSError
        If the file can't be read.
    """
    stat = path.stat()
    if stat.st_size < REMEMBERED_BYTES:
        return _digest(path)
    identity = f"{path.absolute()}\0{file_signature(path)}"
    name = hashlib.sha256(identity.encode()).hexdigest()
    remembered = user_cache_path("sklearn_relish") / "digests" / name
    with suppress(OSError, UnicodeDecodeError):
        digest = remembered.read_text("ascii")
        if len(digest) == 64:
            return digest
    digest = _digest(path)
    if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_SECONDS:
        with suppress(OSError):  # a cache that can't be written only costs time
            remembered.parent.mkdir(parents=True, exist_ok=True)
            partial = remembered.with_suffix(f".{os.getpid()}")
            partial.write_text(digest, "ascii")
            partial.replace(remembered)
    return digest


def file_signature(path: Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced: inode, size, both times of change."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read it; no link is followed, and no pipe is waited for.

    Parameters
    ----------
    path : Path

    Raises
    ------
    OSError
        If it can't be opened, or is a link, a pipe, a folder or a device.
    """
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_CLOEXEC"):
        flags |= getattr(os, name, 0)
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it was replaced just now
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
    return open(descriptor, "rb")


def check_no_links(folder: Path, n_parents: int) -> None:
    """Refuse a folder that is a symbolic link, or one of whose nearest parents is.

    Parameters
    ----------
    folder : Path
    n_parents : int
        Parents that are looked at.

    Raises
    ------
    OSError
        If there is a link, which may point anywhere.
    """
    for path in (folder, *list(folder.parents)[:n_parents]):
        if path.is_symlink():
            raise OSError(errno.ELOOP, "a symbolic link inside a store is not followed", str(path))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Files: digests that are cached between processes, and safe reading of shared folders."""

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

MIN_CACHED_BYTES = 2**20  # digests of smaller files are not cached: hashing is fast enough
SETTLED_SECONDS = 2.0  # a file that changed later may change again with the same time stamp


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    The digest of a large file is cached in the user's cache folder until its path or signature
    changes, so a process that does not need the weights does not read them.

    Parameters
    ----------
    path : Path

    Raises
    ------
    OSError
        If the file can't be read.
    """
    status = path.stat()
    if status.st_size < MIN_CACHED_BYTES:
        return _digest(path)
    identity = f"{path.absolute()}\0{file_signature(path)}"
    name = hashlib.sha256(identity.encode()).hexdigest()
    cached = user_cache_path("sklearn_relish") / "digests" / name
    with suppress(OSError, UnicodeDecodeError):
        digest = cached.read_text("ascii")
        if len(digest) == 64:
            return digest
    digest = _digest(path)
    if time.time() - max(status.st_mtime, status.st_ctime) > SETTLED_SECONDS:
        with suppress(OSError):  # a cache that can't be written only costs time
            cached.parent.mkdir(parents=True, exist_ok=True)
            partial = cached.with_suffix(f".{os.getpid()}")
            partial.write_text(digest, "ascii")
            partial.replace(cached)
    return digest


def file_signature(path: Path) -> tuple[int, ...]:
    """Inode, size and both times of change: they differ after a file is written or replaced."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, without following links or waiting for pipes.

    Parameters
    ----------
    path : Path

    Raises
    ------
    OSError
        If it can't be opened, or is not a regular file.
    """
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_CLOEXEC"):
        flags |= getattr(os, name, 0)
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it was replaced since the check
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
    return open(descriptor, "rb")


def check_no_links(folder: Path, n_parents: int) -> None:
    """Refuse a folder if it or one of its nearest parents is a symbolic link.

    Parameters
    ----------
    folder : Path
    n_parents : int
        Number of parents that are checked.

    Raises
    ------
    OSError
        If there is a link: it may point outside the store.
    """
    for path in (folder, *list(folder.parents)[:n_parents]):
        if path.is_symlink():
            raise OSError(errno.ELOOP, "a symbolic link inside a store is not followed", str(path))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

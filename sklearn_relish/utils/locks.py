"""Locks for processes that serve: in turn between threads, and free again in a forked child."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary


class FairLock:
    """A lock that threads get in the order in which they asked for it.

    A thread that takes a `threading.Lock` again and again, batch after batch, can keep the others
    waiting for minutes. Here each waits for those before it alone. It is not reentrant.

    Examples
    --------
    >>> lock = FairLock()
    >>> with lock:
    ...     pass
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._held = False

    def __enter__(self) -> None:
        with self._guard:
            if not self._held:
                self._held = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            turn.acquire()
        except BaseException:  # interrupted while it waited
            with self._guard:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                    raise
            self._release()  # the turn had come just then
            raise

    def __exit__(self, *exception: object) -> None:
        self._release()

    def _release(self) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False


class ForkSafeLock:
    """A lock that is free in a forked child, whatever its parent's threads hold.

    Examples
    --------
    >>> lock = ForkSafeLock()
    >>> with lock:
    ...     pass
    """

    def __init__(self) -> None:
        self._renew()
        renew_in_forked_child(self, ForkSafeLock._renew)

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


_renewals: WeakKeyDictionary[Any, Callable[[Any], None]] = WeakKeyDictionary()


def renew_in_forked_child(owner: Any, renew: Callable[[Any], None]) -> None:
    """Have ``renew(owner)`` called in a forked child, as long as the owner lives.

    A thread that holds a lock while the process forks does not exist in the child, where the lock
    would stay taken for ever. `renew` makes new locks, and drops what the thread may have left half
    done.

    Parameters
    ----------
    owner : object
        It must be hashable and take weak references.
    renew : callable
    """
    _renewals[owner] = renew


def _renew_all() -> None:
    for owner, renew in list(_renewals.items()):
        renew(owner)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)

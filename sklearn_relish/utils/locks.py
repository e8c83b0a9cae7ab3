"""Locks for servers: fair between threads, and free in a forked child process."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary


class FairLock:
    """A lock that threads get in the order in which they requested it.

    A thread that acquires a `threading.Lock` in a loop, for batch after batch, can keep other
    threads waiting for minutes. Here a thread waits only for those that requested the lock before
    it. The lock is not reentrant.

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
        except BaseException:  # interrupted while waiting
            with self._guard:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                    raise
            self._release()  # the lock was passed to this thread at the same time
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
    """A lock that is free in a forked child, even if a thread of the parent holds it.

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
    """Call ``renew(owner)`` in every forked child, while the owner exists.

    A thread that holds a lock during a fork does not exist in the child, so the lock would never
    be released there. `renew` makes new locks, and discards the thread's unfinished work.

    Parameters
    ----------
    owner : object
        It must be hashable and support weak references.
    renew : callable
    """
    _renewals[owner] = renew


def _renew_all() -> None:
    for owner, renew in list(_renewals.items()):
        renew(owner)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)

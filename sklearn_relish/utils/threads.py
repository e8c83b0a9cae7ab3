"""How many threads the operations of one thread use."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from threadpoolctl import ThreadpoolController


def limit_threads(number: int) -> None:
    """Let the operations that the calling thread starts use at most `number` threads on the CPU.

    `torch.set_num_threads` would set the number for the process too, and threads that other code
    starts meanwhile would keep it. OpenMP and MKL have a number for each thread.
    """
    # A thread takes the number of the process when it first asks for its own, so ask before.
    torch.get_num_threads()
    _openmp().limit(limits=number, user_api="openmp")
    set_number = getattr(_torch_library(), "MKL_Set_Num_Threads_Local", None)
    if set_number is not None:
        set_number(number)


@cache
def _openmp() -> ThreadpoolController:
    """Controls the OpenMP libraries that are loaded. OpenMP's number belongs to a thread."""
    return ThreadpoolController()


@cache
def _torch_library() -> ctypes.CDLL | None:
    """The library of torch's CPU operations on Linux; on x86 it has MKL, or depends on it."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    return ctypes.CDLL(str(path)) if path.is_file() else None

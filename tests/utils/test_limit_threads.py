"""The number of threads of one thread: nothing else changes."""

import threading

import pytest
import torch

from sklearn_relish.utils import threads
from sklearn_relish.utils.threads import limit_threads


def in_new_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def mkl_threads():
    return threads._torch_library().MKL_Get_Max_Threads()


def test_the_calling_thread_alone_is_limited(four_threads):
    def limited():
        limit_threads(1)
        torch.ones(100_000).sum()  # an operation does not undo it
        return torch.get_num_threads(), in_new_thread(torch.get_num_threads)

    assert in_new_thread(limited) == (1, 4)
    assert torch.get_num_threads() == 4


@pytest.mark.skipif(
    not hasattr(threads._torch_library(), "MKL_Get_Max_Threads"), reason="torch without MKL"
)
def test_mkl_is_limited_too(four_threads):
    def limited():
        limit_threads(1)
        torch.ones(30, 30) @ torch.ones(30, 30)
        return mkl_threads(), in_new_thread(lambda: (torch.get_num_threads(), mkl_threads())[1])

    assert in_new_thread(limited) == (1, 4)

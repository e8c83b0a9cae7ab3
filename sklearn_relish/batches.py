"""Padded batches of token states on the device where the head runs.

What a batch costs beside the head's own work is kept small: on a CPU memory is used again, on a
CUDA device the states lie there as far as they fit, and shapes are few, so that a step can be
recorded once a shape and replayed.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sklearn_relish.states import TokenStates

RESIDENT_SHARE = 0.5  # of a CUDA device's free memory that may be taken by states
WARM_UPS = 2  # runs of a function before it is recorded


class BatchLoader:
    """Makes batches of some texts' states.

    Parameters
    ----------
    states : TokenStates
        On the CPU, or in files.
    device : torch.device
        Where the batches are wanted. On a CUDA device the states are copied there as a whole if
        they take no more than half of its free memory; else each batch is gathered in pinned
        memory, and copied, while the device is at work on the one before.
    dtype : torch.dtype
        Of the batches on a CPU; elsewhere they keep the dtype of the states.
    """

    def __init__(self, states: TokenStates, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.lengths = states.lengths
        self.states = states
        self._buffer = torch.empty(0, dtype=dtype)
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            # Memory that torch keeps for use again is free to it.
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            if states.n_bytes <= RESIDENT_SHARE * free:
                self.states = states.to(device)
            else:
                self._copies = torch.cuda.Stream(device)

    def load(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches, one by one.

        Parameters
        ----------
        batches : list of int64 Tensor of shape (B,)
            Which texts make each batch, on the CPU.

        Yields
        ------
        rows : int64 Tensor of shape (B,)
            The batch's texts, on the device.
        states : Tensor of shape (B, S, D)
            Padded with zeros. On a CPU the next batch overwrites them.
        mask : bool Tensor of shape (B, S)
            Which tokens are real.
        """
        # All at once: a copy from pageable memory may wait for the device.
        moved = torch.cat(batches).to(self.device).split([len(rows) for rows in batches])
        for rows, there in zip(batches, moved, strict=True):
            if self.device.type == "cuda":
                n_tokens = round_up(int(self.lengths[rows].max()))
                if self.states.device.type == "cuda":
                    states, mask = self.states.batch(there, n_tokens)
                else:
                    states, mask = self._sent(*self.states.batch(rows, n_tokens))
            else:
                states, mask = self.states.batch(rows, int(self.lengths[rows].max()))
                if self.device.type == "cpu":
                    states = self._in_buffer(states)
                else:
                    states, mask = states.to(self.device), mask.to(self.device)
            yield there, states, mask

    def _sent(self, *tensors: Tensor) -> list[Tensor]:
        """Tensors on the CUDA device, copied beside what it is doing; for its current stream."""
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._copies):
            # The allocator keeps pinned memory until it has been copied.
            sent = [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
        current.wait_stream(self._copies)
        for tensor in sent:
            tensor.record_stream(current)
        return sent

    def _in_buffer(self, states: Tensor) -> Tensor:
        """States in memory that is used for batch after batch: fresh memory costs more to get."""
        if states.dtype == self.dtype:
            return states
        if self._buffer.numel() < states.numel():
            self._buffer = torch.empty(states.numel(), dtype=self.dtype)
        return self._buffer[: states.numel()].view(states.shape).copy_(states)


def round_up(n_tokens: int) -> int:
    """Tokens that a text of so many is padded to, where shapes are to be few.

    Examples
    --------
    >>> [round_up(n) for n in (1, 8, 37, 64, 65, 130, 500)]
    [8, 8, 40, 64, 80, 160, 512]
    """
    step = max(8, 2 ** math.floor(math.log2(n_tokens)) // 4)
    return math.ceil(n_tokens / step) * step


class Recorded:
    """A function of CUDA tensors that is recorded for each of their shapes, then replayed.

    A small head's kernels take less time than their launches; a CUDA graph launches them all at
    once. A shape is recorded when it comes for the second time. The function must do the same
    however often it runs, must not wait for the device, and must keep its side effects in memory
    that stays where it is. Its result is overwritten by the next call. The device must be the
    current one; while one thread records, others may use it, but not wait for it.

    Parameters
    ----------
    function : callable
        From tensors to a tensor.
    device : torch.device
        Where the tensors lie.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        self.function = function
        self._graphs: dict[tuple[torch.Size, ...], _Graph | None] = {}
        self._buffers: dict[int, Tensor] = {}
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's result."""
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._graphs:
            self._graphs[shapes] = None
            return self.function(*inputs)
        recorded = self._graphs[shapes]
        if recorded is None:
            places = [self._place(i, tensor) for i, tensor in enumerate(inputs)]
            recorded = self._graphs[shapes] = self._record(places)
        for place, tensor in zip(recorded.inputs, inputs, strict=True):
            place.copy_(tensor)
        recorded.graph.replay()
        return recorded.result

    def _place(self, argument: int, tensor: Tensor) -> Tensor:
        """Memory for an argument, the same for all shapes that fit in, with the tensor's values."""
        buffer = self._buffers.get(argument)
        if buffer is None or buffer.numel() < tensor.numel():
            buffer = self._buffers[argument] = torch.empty_like(tensor).flatten()
        return buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)

    def _record(self, places: list[Tensor]) -> _Graph:
        graph = torch.cuda.CUDAGraph()
        with _recording:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    self.function(*places)
            torch.cuda.current_stream().wait_stream(self._stream)
            # Other threads may allocate meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                result = self.function(*places)
        return _Graph(graph, places, result)


class _Graph(NamedTuple):
    """What was recorded, where its inputs are put, and where its result lies."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    result: Tensor


_recording = threading.Lock()  # a process can record one graph at a time

"""Functions of CUDA tensors, recorded and replayed, so that their launches cost next to nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

WARM_UPS = 2  # runs of a function before it is recorded


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

"""Padded batches of token states on the device where the head runs.

What a batch costs beside the head's own work is kept small: on a CPU memory is used again, on a
CUDA device the states lie there as far as they fit, and shapes are few, so that each step's can be
recorded (`recording.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sklearn_relish.states.token_states import TokenStates

RESIDENT_SHARE = 0.5  # of a CUDA device's free memory that may be taken by states


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

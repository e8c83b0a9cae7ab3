"""How texts are batched for a head, in training and for predictions, on each kind of device.

To change how batches are made, change this file. The batches of the language model are decided in
`llm.batching`; attention weights and pooled states are computed for one text at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sklearn_relish.states.token_states import TokenStates

POOL_BATCHES = 16  # batches whose texts are sorted by length together, after a shuffle
STEP_TOKENS = 65_536  # padded tokens of a training batch; a larger one is split, to save memory
PREDICT_TOKENS = 16_384  # padded tokens of a batch for predictions


def shuffled_batches(lengths: Tensor, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """Random training batches of texts of similar length; each text is in one of them.

    The texts are shuffled and cut into pools of `POOL_BATCHES` batches. Each pool is sorted by
    length and cut into batches, and the batches of all pools are shuffled.
    """
    batches = []
    for pool in torch.randperm(len(lengths), generator=generator).split(POOL_BATCHES * batch_size):
        batches += pool[lengths[pool].argsort(stable=True)].split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def split_batch(batch: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """A training batch in parts of at most `STEP_TOKENS` padded tokens, or of a single text."""
    n_texts = max(1, STEP_TOKENS // int(lengths[batch].max()))
    return batch.split(n_texts)


def prediction_batches(lengths: Tensor) -> list[Tensor]:
    """Batches for predictions, from the shortest texts to the longest.

    Each has at most `PREDICT_TOKENS` padded tokens, or a single text.
    """
    order = lengths.argsort(stable=True)
    batches, start = [], 0
    while start < len(order):
        # Lengths only grow along `order`: halve the batch until its padded size fits.
        batch = order[start : start + PREDICT_TOKENS]
        while len(batch) > 1 and len(batch) * int(lengths[batch[-1]]) > PREDICT_TOKENS:
            batch = batch[: len(batch) // 2]
        batches.append(batch)
        start += len(batch)
    return batches


class BatchLoader:
    """Makes padded batches of token states on a device.

    Parameters
    ----------
    states : TokenStates
        On the CPU, or in files.
    device : torch.device
        Where the batches are wanted.
    dtype : torch.dtype
        Of the batches on a CPU. On other devices they keep the dtype of the states, so that less is
        copied to the device.
    """

    def __init__(self, states: TokenStates, device: torch.device, dtype: torch.dtype) -> None:
        self.states = states
        self.device = device
        self.dtype = dtype
        self._buffer = torch.empty(0, dtype=dtype)

    def load(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """A padded batch.

        Parameters
        ----------
        rows : int64 Tensor of shape (B,)
            The texts of the batch, on the CPU.

        Returns
        -------
        states : Tensor of shape (B, S, D)
            Padded with zeros. On a CPU the next batch overwrites them.
        mask : bool Tensor of shape (B, S)
            True on real tokens.
        """
        states, mask = self.states.batch(rows)
        if self.device.type == "cpu":
            return self._in_buffer(states), mask
        return states.to(self.device), mask.to(self.device)

    def _in_buffer(self, states: Tensor) -> Tensor:
        """States in the loader's dtype, in memory that is reused: new memory takes longer."""
        if states.dtype == self.dtype:
            return states
        if self._buffer.numel() < states.numel():
            self._buffer = torch.empty(states.numel(), dtype=self.dtype)
        return self._buffer[: states.numel()].view(states.shape).copy_(states)

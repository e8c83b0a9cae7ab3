"""How texts are batched for a head, in training and for predictions, on each kind of device.

To change how batches are made, change this file. The batches of the language model are decided in
`llm.batching`; attention weights and pooled states are computed for one text at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sklearn_relish.states.pairs import NO_MATCH
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training.windows import Windows

POOL_BATCHES = 16  # batches whose texts are sorted by length together, after a shuffle
STEP_TOKENS = 65_536  # padded tokens of a training batch; a larger one is split, to save memory
STEP_VALUES = 2**26  # the same in numbers, for large states
PREDICT_TOKENS = 16_384  # padded tokens of a batch for predictions
PREDICT_VALUES = 2**25  # the same in numbers, for large states


def shuffled_batches(lengths: Tensor, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """Random training batches of texts of similar length; each text is in one of them.

    The texts are shuffled and cut into pools of `POOL_BATCHES` batches. Each pool is sorted by
    length and cut into batches, and the batches of all pools are shuffled.
    """
    batches = []
    for pool in torch.randperm(len(lengths), generator=generator).split(POOL_BATCHES * batch_size):
        batches += pool[lengths[pool].argsort(stable=True)].split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def split_batch(batch: Tensor, states: TokenStates) -> tuple[Tensor, ...]:
    """A training batch in parts of at most `STEP_TOKENS` padded tokens, or of a single text."""
    n_tokens = min(STEP_TOKENS, STEP_VALUES // states.hidden_size)
    n_texts = max(1, n_tokens // int(states.lengths[batch].max()))
    return batch.split(n_texts)


def prediction_batches(lengths: Tensor, hidden_size: int) -> list[Tensor]:
    """Batches for predictions, from the shortest texts to the longest.

    Each has at most `PREDICT_TOKENS` padded tokens, or a single text.
    """
    n_tokens = max(1, min(PREDICT_TOKENS, PREDICT_VALUES // hidden_size))
    order = lengths.argsort(stable=True)
    batches, start = [], 0
    while start < len(order):
        # Lengths only grow along `order`: halve the batch until its padded size fits.
        batch = order[start : start + n_tokens]
        while len(batch) > 1 and len(batch) * int(lengths[batch[-1]]) > n_tokens:
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
    window_bytes : float, default=infinity
        Bytes of states that are held at once, see `Windows`. Infinity: no states are copied but
        those of a batch.
    """

    def __init__(
        self,
        states: TokenStates,
        device: torch.device,
        dtype: torch.dtype,
        window_bytes: float = math.inf,
    ) -> None:
        self.states = states
        self.device = device
        self.dtype = dtype
        self._windows = Windows(states, window_bytes)
        self._window = states  # what `load` can use: all states, or those of a window
        self._buffers = [torch.empty(0, dtype=dtype)] * 2

    def training_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Random batches of an epoch, see `shuffled_batches`; each text is in one of them.

        If there are several windows, the texts of each are shuffled. Texts that do not fill a batch
        are moved to the next window, so all batches but the last one are full.
        """
        windows = self._windows.shuffled(generator)
        rest = torch.empty(0, dtype=torch.int64)
        try:
            for number, window in enumerate(windows, 1):
                rows = torch.cat([rest, window])
                if number < len(windows):
                    rows = rows[torch.randperm(len(rows), generator=generator)]
                    n_rest = len(rows) % batch_size
                    rows, rest = rows.split([len(rows) - n_rest, n_rest])
                if len(rows):
                    self._load_window(rows, windows[number : number + 1])
                    lengths = self.states.lengths[rows]
                    for batch in shuffled_batches(lengths, batch_size, generator):
                        yield rows[batch]
        finally:
            self._release_window()

    def prediction_batches(self) -> Iterator[Tensor]:
        """The batches of `prediction_batches` for each window."""
        windows = self._windows.in_order()
        try:
            for number, rows in enumerate(windows, 1):
                self._load_window(rows, windows[number : number + 1])
                lengths = self.states.lengths[rows]
                for batch in prediction_batches(lengths, self.states.hidden_size):
                    yield rows[batch]
        finally:
            self._release_window()

    def load(self, rows: Tensor) -> tuple[Tensor, ...]:
        """A padded batch: what a head is called with.

        Parameters
        ----------
        rows : int64 Tensor of shape (B,)
            The texts of the batch, on the CPU. During an iteration over batches: a batch that it
            has just yielded, or a part of it.

        Returns
        -------
        states : Tensor of shape (B, S, D)
            Padded with zeros. On a CPU the next batch overwrites them.
        mask : bool Tensor of shape (B, S)
            True on real tokens.
        matches : int64 Tensor of shape (B, S)
            Only of pairs of texts, see `TokenStates`.
        others : Tensor of shape (B, S, D)
            Only of pairs that are read in both orders: the states of the same tokens in the other
            text. A token without a counterpart has its own state.
        """
        window = self._window
        states, mask = window.batch(rows)
        states = self._on_device(states, 0)
        batch = states, mask.to(self.device)
        if window.matches is None:
            return batch
        matches = self._numbers(window.matches, rows)
        if window.others is None or window.counterparts is None:
            return *batch, matches
        others = self._on_device(window.others.batch(rows)[0], 1)  # (B, T, D)
        positions = self._numbers(window.counterparts, rows)[:, :, None]  # (B, S, 1)
        found = others.gather(1, positions.clamp(min=0).expand_as(states))
        return *batch, matches, torch.where(positions == NO_MATCH, states, found)

    def _numbers(self, numbers: TokenStates, rows: Tensor) -> Tensor:
        """Matches or counterparts of a batch on the device, int64 (B, S)."""
        return numbers.batch(rows)[0][:, :, 0].long().to(self.device)

    def _load_window(self, rows: Tensor, following: list[Tensor]) -> None:
        self._window = self.states  # lets go of the last window
        self._window = self._windows.load(rows)
        for next_rows in following:
            self._windows.read_ahead(next_rows)

    def _release_window(self) -> None:
        self._window = self.states
        self._windows.release()

    def _on_device(self, states: Tensor, buffer: int) -> Tensor:
        """States on the device; on a CPU in the loader's dtype, in memory that is reused.

        New memory takes longer.
        """
        if self.device.type != "cpu":
            return states.to(self.device)
        if states.dtype == self.dtype:
            return states
        if self._buffers[buffer].numel() < states.numel():
            self._buffers[buffer] = torch.empty(states.numel(), dtype=self.dtype)
        return self._buffers[buffer][: states.numel()].view(states.shape).copy_(states)

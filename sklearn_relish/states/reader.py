"""What the store needs of a language model: a small interface that any reader of texts can have."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from sklearn_relish.states.token_states import TokenStates


class TokenStateReader(Protocol):
    """Computes the token states of texts.

    `sklearn_relish.FrozenLLM` is one. The store keeps states under `fingerprint` and `torch_dtype`,
    and calls `read` only for texts whose states it lacks.
    """

    @property
    def model(self) -> str:
        """Name or path of the model, which `StateStore.info` lists and `clear` takes."""
        ...

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that differ between models whose states differ."""
        ...

    @property
    def torch_dtype(self) -> torch.dtype:
        """Floating-point dtype of the states that `read` yields."""
        ...

    def state_sizes(self, layer: int) -> Collection[int]:
        """The sizes D that a token's state may have at a layer; states of other sizes are refused.

        Parameters
        ----------
        layer : int
            From 1 (the first layer's output) to the model's number of layers.
        """
        ...

    def read(
        self, texts: list[str], *, layers: Sequence[int], max_length: int, windows: bool = False
    ) -> Iterator[tuple[np.ndarray, list[TokenStates], np.ndarray]]:
        """Compute the states of texts, batch by batch and in any order.

        Parameters
        ----------
        texts : list of str
        layers : sequence of int
            Layers whose states are wanted; one pass computes all of them.
        max_length : int
            Number of tokens after which a text is cut, special tokens included.
        windows : bool, default=False
            If True, a longer text is read completely, in windows of `max_length` tokens.

        Yields
        ------
        rows : int64 ndarray of shape (B,)
            Positions in `texts` of the B texts of this batch. Each position is yielded once.
        states : list of TokenStates
            One for each of `layers`: the states of the B texts, in one CPU array of shape
            (n_tokens, D) in `torch_dtype`. All of them have the same lengths.
        full_lengths : int64 ndarray of shape (B,)
            Number of tokens of each text before it was cut.
        """
        ...

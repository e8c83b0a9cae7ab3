"""How texts are batched for the language model, on each kind of device.

The rules are here: how many tokens a batch has, which lengths share a batch, and how texts are
packed one after the other or padded to the longest. `forward.py` tests whether a model can read
packed texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sklearn_relish.llm.batch_invariance import ROW_STEP, BatchInvariant
from sklearn_relish.llm.tokenize import Piece, TextTokenizer
from sklearn_relish.states.token_states import TokenStates

# Tokens of a batch, padding included. On a CPU more is no faster, but for bfloat16 with AMX, where
# twice to four times as many are 10 to 20 % faster. The others are not measured yet. FrozenLLM
# halves its own budget when a batch does not fit into memory.
TOKEN_BUDGET = {"cpu": 1_024, "mps": 8_192, "cuda": 16_384}
AMX_FACTOR = 2
# Least length of a text in a padded batch, as a fraction of the longest. On a CPU there is no
# padding; the others are not measured yet.
MIN_LENGTH_RATIO = {"cpu": 1.0, "mps": 0.875, "cuda": 0.875}
# Up to so many padded tokens, a batch may have texts of any length. Not measured yet.
ANY_LENGTH_TOKENS = {"cpu": 0, "mps": 4_096, "cuda": 4_096}
CHUNK_TEXTS = 4_096  # texts that are sorted by length together, while the next are tokenized
GROUP_BUDGETS = 16  # token budgets of windows that are read before their texts are joined

Packing = Literal["joint", "separate"]  # whether short texts of one length share an attention call


def device_kind(device: torch.device) -> str:
    """The device's entry in the rules above; an unlisted kind of device has those of CUDA."""
    return device.type if device.type in TOKEN_BUDGET else "cuda"


def batch_size(lengths: np.ndarray, *, kind: str, token_budget: int, packed: bool) -> int:
    """How many of the next texts go into one batch, at least one.

    Parameters
    ----------
    lengths : int array
        Tokens of the texts that are left, the longest first.
    kind : {"cpu", "mps", "cuda"}
    token_budget : int
        Tokens that a batch of several texts may have, padding included.
    packed : bool
        Whether texts are packed, so that their lengths need not be similar.

    Examples
    --------
    >>> lengths = np.array([500, 400, 100, 100])
    >>> batch_size(lengths, kind="cpu", token_budget=1000, packed=True)
    3
    >>> batch_size(lengths, kind="cpu", token_budget=1000, packed=False)
    1
    """
    longest = int(lengths[0])
    if packed:
        fits = lengths[: max(1, token_budget)].cumsum() <= token_budget
    else:
        lengths = lengths[: max(1, token_budget // longest)]
        fits = lengths >= MIN_LENGTH_RATIO[kind] * longest
        fits[: ANY_LENGTH_TOKENS[kind] // longest] = True
    return max(1, int(fits.sum()))


@dataclass(frozen=True)
class Batch:
    """Inputs of a forward pass, and where the texts' tokens are in its outputs.

    Parameters
    ----------
    inputs : dict of str to Tensor
        Keyword arguments of the network; ``input_ids`` is of shape (B, S).
    lengths : int64 Tensor of shape (n_texts,)
    row_length : int
        Tokens of each row of the outputs that may belong to texts. The rest is padding.
    context : context manager
        Active during the pass.
    real : int64 Tensor, default=None
        Which of the B * `row_length` tokens belong to texts. None: all of them.
    """

    inputs: dict[str, Tensor]
    lengths: Tensor
    row_length: int
    context: AbstractContextManager[Any]
    real: Tensor | None = None

    def real_states(self, states: Tensor) -> Tensor:
        """States (n_tokens, D) of the texts' tokens, from the outputs (B, S, D) of a layer."""
        # Some models pad further, to a multiple of their attention window.
        states = states[:, : self.row_length].flatten(0, 1)  # (B * row_length, D)
        return states if self.real is None else states[self.real.to(states.device)]


def make_batch(
    tokens: list[np.ndarray], tokenizer: TextTokenizer, *, kind: str, packing: Packing | None
) -> Batch:
    """The batch of tokenized texts: packed, or stacked if they have one length, or padded.

    Parameters
    ----------
    tokens : list of int64 arrays
    tokenizer : TextTokenizer
        Knows the padding token.
    kind : {"cpu", "mps", "cuda"}
    packing : {"joint", "separate"} or None
        None: texts are not packed.
    """
    if packing is not None:
        return pack(tokens, packing, tokenizer.filler_id)
    lengths = torch.tensor([len(ids) for ids in tokens])
    longest = int(lengths.max())
    if int(lengths.min()) == longest:
        ids = torch.from_numpy(np.stack(tokens))  # (B, S)
        context = BatchInvariant() if kind == "cpu" else nullcontext()
        return Batch({"input_ids": ids}, lengths, longest, context)
    # Padding is on the right, where a causal model does not look back at it.
    mask = torch.arange(longest) < lengths[:, None]  # (B, S)
    ids = torch.full(mask.shape, tokenizer.padding_id)
    ids[mask] = torch.from_numpy(np.concatenate(tokens))
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    real = mask.flatten().nonzero()[:, 0]  # (n_tokens,)
    return Batch(inputs, lengths, longest, nullcontext(), real)


def pack(tokens: list[np.ndarray], packing: Packing, filler_id: int) -> Batch:
    """Texts one after the other in one row, filled up to a multiple of ROW_STEP tokens."""
    lengths = [len(ids) for ids in tokens]
    n_tokens = sum(lengths)
    all_tokens, all_lengths = list(tokens), list(lengths)
    n_filling = -n_tokens % ROW_STEP
    if n_filling:
        all_tokens.append(np.full(n_filling, filler_id))
        all_lengths.append(n_filling)
    inputs = {
        "input_ids": torch.from_numpy(np.concatenate(all_tokens))[None],  # (1, S)
        "position_ids": torch.cat([torch.arange(length) for length in all_lengths])[None],
    }
    context = BatchInvariant(all_lengths, joint=packing == "joint")
    return Batch(inputs, torch.tensor(lengths), n_tokens, context)


def group_pieces(pieces: list[Piece], n_tokens: int) -> Iterator[list[Piece]]:
    """Groups of pieces that are sorted by length together.

    All texts without windows are one group. Texts in windows are in groups of at least `n_tokens`
    tokens, because no state of a text is returned before all of its windows have been read.
    """
    single = [piece for piece in pieces if piece.n_pieces == 1]
    if single:
        yield single
    group: list[Piece] = []
    for piece in pieces:
        if piece.n_pieces > 1:
            group.append(piece)
            n_windows = sum(member.row == piece.row for member in group[-piece.n_pieces :])
            complete = n_windows == piece.n_pieces
            if complete and sum(len(member.ids) for member in group) >= n_tokens:
                yield group
                group = []
    if group:
        yield group


def join_windows(
    batches: Iterator[tuple[np.ndarray, list[TokenStates]]], pieces: list[Piece]
) -> Iterator[tuple[np.ndarray, list[TokenStates]]]:
    """States by text from states by piece; a text in windows once all of them have been read."""
    read: dict[int, dict[int, list[Tensor]]] = {}  # by text, window and layer
    for numbers, states in batches:
        if pieces[numbers[0]].n_pieces == 1:
            yield np.array([pieces[number].row for number in numbers]), states
            continue
        values = [list(layer_states) for layer_states in states]
        for place, number in enumerate(numbers):
            piece = pieces[number]
            windows = read.setdefault(piece.row, {})
            windows[number] = [
                layer_values[place][piece.begin : piece.end].clone()  # a view would hold the batch
                for layer_values in values
            ]
            if len(windows) == piece.n_pieces:
                layers = zip(*(windows[number] for number in sorted(windows)), strict=True)
                joined = [torch.cat(parts) for parts in layers]
                yield (
                    np.array([piece.row]),
                    [TokenStates.from_lengths(text, torch.tensor([len(text)])) for text in joined],
                )
                del read[piece.row]

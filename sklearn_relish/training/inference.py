"""What fitted heads compute from token states: predictions, stages, attention; pooled states too.

On a CPU heads compute in float64: a text's prediction depends on the other texts of its batch only
by rounding in that dtype. On other devices they compute in float32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from sklearn_relish.head.ensemble import RelishEnsemble
from sklearn_relish.head.head import RelishHead
from sklearn_relish.head.pooling import pool
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training.batching import BatchLoader
from sklearn_relish.training.windows import Windows
from sklearn_relish.utils.locks import ForkSafeLock

Head = TypeVar("Head", bound=RelishHead | RelishEnsemble)

SAMPLED_WEIGHTS = 8  # entries of each weight that are compared to notice a change


@torch.inference_mode()
def predict_states(
    head: RelishHead | RelishEnsemble, states: TokenStates, device: torch.device
) -> np.ndarray:
    """Predictions of a fitted head or ensemble for all texts: float64, (n_texts, n_predictions)."""
    head, loader = _prepared(head, states, device)
    vectors = states.vectors if isinstance(head, RelishEnsemble) else None
    return predict_batches(head.forward_zero_padded, loader, vectors).double().numpy()


@torch.inference_mode()
def staged_predict_states(
    head: RelishEnsemble, states: TokenStates, device: torch.device
) -> np.ndarray:
    """Predictions after each iteration: float64, (n_texts, n_iterations, n_predictions)."""
    head, loader = _prepared(head, states, device)
    stages = predict_batches(
        lambda *batch, **further: head.staged(*batch, **further).transpose(0, 1),
        loader,
        states.vectors,
    )
    return stages.double().numpy()


@torch.inference_mode()
def attention_weights(
    head: RelishEnsemble, states: TokenStates, device: torch.device
) -> list[np.ndarray]:
    """Weights of each text's tokens: float64, (n_estimators, n_iterations, n_heads, n_tokens)."""
    head, loader = _prepared(head, states, device)
    alone = torch.arange(len(states)).split(1)  # a batch for each text: no padding
    return [head.attention(*loader.load(row))[:, :, 0].double().cpu().numpy() for row in alone]


def predict_batches(
    predict: Callable[..., Tensor], loader: BatchLoader, vectors: TokenStates | None = None
) -> Tensor:
    """Predictions for all texts of a loader, on the CPU, in the order of the texts.

    `predict` gets a batch of the loader and, if `vectors` of all texts are given, its vectors.
    """
    batches, predictions = [], []
    for batch in loader.prediction_batches():
        batches.append(batch)
        further = {} if vectors is None else {"vectors": vectors.batch(batch)[0].to(loader.device)}
        predictions.append(predict(*loader.load(batch), **further))
    return torch.cat(predictions).cpu()[torch.cat(batches).argsort()]


def pool_states(
    states: TokenStates, pooling: str, state_norm: str | None, window_bytes: float = math.inf
) -> Tensor:
    """One vector for each text, pooled alone: float32, (n_texts, D).

    See `sklearn_relish.head.pooling.pool`. A vector does not depend on the other texts, nor on
    `window_bytes`, see `Windows`.

    Examples
    --------
    >>> import torch
    >>> states = TokenStates.from_lengths(torch.tensor([[1.0], [3.0]]), torch.tensor([2]))
    >>> pool_states(states, "mean", None), pool_states(states, "last", None)
    (tensor([[2.]]), tensor([[3.]]))
    """
    pooled = torch.empty(len(states), states.hidden_size, dtype=torch.float32)
    windows = Windows(replace(states, others=None), window_bytes)
    for rows in windows.in_order():
        for row, text in zip(rows.tolist(), windows.load(rows)[rows], strict=True):
            mask = torch.ones(1, len(text), dtype=torch.bool)
            pooled[row] = pool(text[None], mask, pooling, state_norm)[0]
    return pooled


def _prepared(head: Head, states: TokenStates, device: torch.device) -> tuple[Head, BatchLoader]:
    """A copy of the head on the device, and the loader of the states."""
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    return device_copy(head, device, dtype), BatchLoader(states, device, dtype)


class _Copy(NamedTuple):
    """A copy of a head on a device, and what shows whether the head has changed since."""

    head: Any  # of the class of the original
    made_for: tuple[Any, ...]
    views: list[Tensor]  # the sampled entries of the original's weights, which follow its changes
    sample: Tensor  # their values when the copy was made


class _Slot:
    """Holds the copy of a head. One thread makes it while the others wait for the lock."""

    def __init__(self) -> None:
        self.lock = ForkSafeLock()
        self.copy: _Copy | None = None


_slots: WeakKeyDictionary[nn.Module, _Slot] = WeakKeyDictionary()
_slots_lock = ForkSafeLock()


def device_copy(head: Head, device: torch.device, dtype: torch.dtype) -> Head:
    """A copy of a head on a device, kept as long as the head lives and its weights do not change.

    A service that predicts one text after another then copies the head only once.
    """
    # A change shows as another tensor or another version of it. But torch does not count the step
    # of a fused optimizer as a change: it moves all weights, so a sample of each shows it.
    weights = list(head.parameters())
    versions = [
        (weight.data_ptr(), None if weight.is_inference() else weight._version)
        for weight in weights
    ]
    made_for = device, head.state_norm, versions
    with _slots_lock:
        slot = _slots.setdefault(head, _Slot())
    with slot.lock:
        kept = slot.copy
        if kept is None or kept.made_for != made_for or not _is_unchanged(kept):
            views = [weight.detach()[..., :SAMPLED_WEIGHTS] for weight in weights]
            views = [view[(0,) * (view.ndim - 1)] for view in views]  # (SAMPLED_WEIGHTS or fewer,)
            sample = torch.cat(views)
            copied = _copy_in_one_tensor(head, device, dtype)
            kept = slot.copy = _Copy(copied, made_for, views, sample)
    return kept.head


def _is_unchanged(kept: _Copy) -> bool:
    return torch.equal(torch.cat(kept.views), kept.sample)


def _copy_in_one_tensor(head: Head, device: torch.device, dtype: torch.dtype) -> Head:
    """A copy of a head whose weights are views of one tensor.

    The system gets that memory back when the copy is deleted. Small tensors would stay with the
    allocator's arena of the thread that made them: a service with many threads that is refitted
    would grow by a copy for each thread.
    """
    weights = list(head.parameters())
    with torch.no_grad():
        # Each part begins at a multiple of 64 bytes, as torch's own tensors do.
        sizes = [math.ceil(weight.numel() / 16) * 16 for weight in weights]
        parts = torch.empty(sum(sizes), device=device, dtype=dtype).split(sizes)
        copies = {
            id(weight): nn.Parameter(part[: weight.numel()].view_as(weight).copy_(weight), False)
            for weight, part in zip(weights, parts, strict=True)
        }
    return copy.deepcopy(head, copies)

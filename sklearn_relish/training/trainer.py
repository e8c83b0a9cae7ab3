"""Training of a RELISH head on token states: loss, optimiser, schedule, early stopping.

It sees states and standardized targets; texts, units and scikit-learn are other rooms' business.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from tqdm.auto import tqdm

from sklearn_relish.head.head import RelishEnsemble, RelishHead
from sklearn_relish.head.losses import Loss
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training.batching import BatchLoader
from sklearn_relish.training.recording import Recorded
from sklearn_relish.utils.devices import computes_bfloat16, current_device
from sklearn_relish.utils.locks import ForkSafeLock

GRADIENT_NORM = 1.0  # gradients longer than this are scaled down to it
AUTO_EPOCHS, AUTO_STEPS = 10, 200  # a training has at least these many of both
POOL_BATCHES = 16  # batches whose rows are sorted by length together, after a shuffle
SAMPLED_WEIGHTS = 8  # entries of each weight by which a change of it is seen
STEP_TOKENS = 65_536  # padded tokens of a batch; one of more is taken in parts, to spare memory
PREDICT_TOKENS = 16_384  # padded tokens of a batch when the head only answers


@dataclass(frozen=True)
class Examples:
    """Texts' states, their standardized targets (n, n_outputs) and their weights (n,)."""

    states: TokenStates
    y: Tensor
    weight: Tensor

    @classmethod
    def of(cls, states: TokenStates, y: np.ndarray, weight: np.ndarray) -> Examples:
        """Examples in float32, whatever the arrays' dtype."""
        return cls(states, torch.from_numpy(y).float(), torch.from_numpy(weight).float())

    def __getitem__(self, rows: np.ndarray) -> Examples:
        chosen = torch.from_numpy(rows)
        return Examples(self.states[chosen], self.y[chosen], self.weight[chosen])

    def merged(self, text: np.ndarray) -> Examples:
        """One example for each text: the mean of its targets, the sum of its weights.

        `text` has a number from 0 for each example, the same for equal texts.
        """
        _, first = np.unique(text, return_index=True)
        index = torch.from_numpy(text)
        weight = torch.zeros(len(first)).index_add_(0, index, self.weight)
        y = torch.zeros(len(first), self.y.shape[1])
        y.index_add_(0, index, self.y * self.weight[:, None])
        return Examples(self.states[torch.from_numpy(first)], y / weight[:, None], weight)


class Training(NamedTuple):
    """What a training gave: its course, and which epoch's weights the head carries.

    `oof_predictions`, (n, n_outputs * n_predictions), are those of the validation examples, each of
    an epoch that was not chosen by that example; None without any.
    """

    history: list[dict[str, float]]
    best_epoch: int
    oof_predictions: np.ndarray | None


_init_lock = ForkSafeLock()  # initializers draw from the one global generator


def new_head(seed: int, **sizes: Any) -> RelishHead:
    """A head with fresh weights drawn from `seed`; the global random state is left as it was."""
    with _init_lock, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return RelishHead(**sizes)


def auto_epochs(n_rows: int, batch_size: int) -> int:
    """Epochs that suit a number of training rows: a small set takes more, to make enough steps.

    Examples
    --------
    >>> auto_epochs(6000, batch_size=32), auto_epochs(90, batch_size=32)
    (10, 67)
    """
    steps = max(1, math.ceil(n_rows / batch_size))
    return max(AUTO_EPOCHS, math.ceil(AUTO_STEPS / steps))


def train_head(
    head: RelishHead,
    train: Examples,
    validation: Examples | None,
    *,
    loss_fn: Loss,
    learning_rate: float,
    weight_decay: float,
    batch_size: int,
    max_epochs: int,
    n_iter_no_change: int | None,
    seed: int,
    device: torch.device,
    progress: bool,
    deep_supervision: bool = False,
    constant_rate: bool = False,
) -> Training:
    """Fit a head's weights in place, from where they are.

    AdamW under a one-cycle schedule [1]_, gradients clipped, batches of like length. Every
    iteration's answers may be asked to be right [2]_. With validation examples, the weights of the
    epoch with the lowest validation loss are restored, and training stops once `n_iter_no_change`
    epochs in a row, unless None, brought no lower one.

    Parameters
    ----------
    head : RelishHead
        Trained on `device`, left on the CPU.
    train, validation : Examples
        What is learned from, and what is held out; no validation, no early stopping.
    loss_fn : Loss
        The loss on standardized targets.
    learning_rate : float
        Peak of the schedule.
    weight_decay : float
        AdamW's.
    batch_size : int
        Texts of a step.
    max_epochs : int
        Passes over the training examples, the length of the schedule.
    n_iter_no_change : int or None
        Epochs without a lower validation loss after which training stops; None: none stops it.
    seed : int
        Decides the order of the texts.
    device : torch.device
        Where the steps run.
    progress : bool
        Whether a bar shows the epochs.
    deep_supervision : bool, default=False
        Whether the mean of the losses after each iteration is minimized, not the last one alone.
    constant_rate : bool, default=False
        Whether the learning rate stays where the schedule would have its peak.

    Returns
    -------
    Training
        Its `history` has an entry an epoch with the keys ``epoch``, ``learning_rate``,
        ``train_loss`` and, where something is held out, ``validation_loss`` and
        ``validation_r2``, all of the last iteration's answers.

    Raises
    ------
    FloatingPointError
        If the loss stops being finite.

    References
    ----------
    .. [1] Smith and Topin, "Super-Convergence", arXiv 1708.07120.
    .. [2] Lee et al., "Deeply-Supervised Nets", arXiv 1409.5185.
    """
    # torch takes neither NumPy's integers nor such as need more than 64 bits.
    max_epochs, batch_size = int(max_epochs), min(int(batch_size), len(train.states))
    generator = torch.Generator().manual_seed(seed)
    head.to(device).train()
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True
    )
    steps = max_epochs * math.ceil(len(train.states) / batch_size)
    if constant_rate:
        schedule = LambdaLR(optimizer, lambda step: 1.0)
    else:
        schedule = OneCycleLR(optimizer, max_lr=learning_rate, total_steps=max(steps, 2))
    on_cuda = device.type == "cuda"

    def losses_of(states: Tensor, mask: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimized, and the loss of the last answers, of each text, (B,)."""
        with mixed_precision(device):
            stages = (
                head.staged(states, mask)
                if deep_supervision
                else [head.raw_prediction(states, mask)]
            )
        losses = [loss_fn.losses(raw.float(), y).mean(dim=1) * weight for raw in stages]
        return torch.stack(losses).mean(dim=0), losses[-1]

    def gradients(states: Tensor, mask: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """Sum of a batch's losses; the gradients of their mean are left in the parameters."""
        minimized, losses = losses_of(states, mask, y, weight)
        head.zero_grad(set_to_none=not on_cuda)  # a recording needs them to stay where they are
        minimized.mean().backward()
        return losses.detach().sum()

    def add_gradients(states: Tensor, mask: Tensor, y: Tensor, weight: Tensor, n: int) -> Tensor:
        """The same for a part of a batch of `n` texts, added to what is there."""
        minimized, losses = losses_of(states, mask, y, weight)
        (minimized.sum() / n).backward()
        return losses.detach().sum()

    step = Recorded(gradients, device) if on_cuda else gradients
    loader = BatchLoader(train.states, device, torch.float32)
    held_out = None if validation is None else BatchLoader(validation.states, device, torch.float32)
    y, weight = train.y.to(device), train.weight.to(device)
    history: list[dict[str, float]] = []
    validated: list[Tensor] = []  # answers for the validation examples after each epoch
    best_loss, best_epoch, best_weights = math.inf, max_epochs, None
    patience = math.inf if n_iter_no_change is None else n_iter_no_change
    bar = tqdm(total=max_epochs, desc="Training head", unit="epoch", disable=not progress)
    with bar, current_device(device):
        for epoch in range(1, max_epochs + 1):
            total = torch.zeros((), device=device)
            batches = shuffled_batches(train.states.lengths, batch_size, generator)
            split = [_parts(batch, train.states.lengths) for batch in batches]
            loaded = loader.load([part for parts in split for part in parts])
            for batch, parts in zip(batches, split, strict=True):
                if len(parts) == 1:
                    rows, states, mask = next(loaded)
                    total += step(states, mask, y[rows], weight[rows])
                else:
                    head.zero_grad(set_to_none=not on_cuda)
                    for rows, states, mask in islice(loaded, len(parts)):
                        total += add_gradients(states, mask, y[rows], weight[rows], len(batch))
                nn.utils.clip_grad_norm_(head.parameters(), GRADIENT_NORM)
                optimizer.step()
                schedule.step()
            if not math.isfinite(total):
                raise FloatingPointError(
                    f"Training diverged in epoch {epoch}: the loss is not finite any more. Lower"
                    f" learning_rate={learning_rate}."
                )
            entry = {
                "epoch": epoch,
                "learning_rate": schedule.get_last_lr()[0],
                "train_loss": float(total) / float(train.weight.sum()),
            }
            if held_out is not None:
                with torch.inference_mode():
                    validated.append(_answers(head.raw_prediction, held_out))
                entry |= evaluate(validated[-1], validation, loss_fn)
                bar.set_postfix({"validation R²": f"{entry['validation_r2']:.3f}"})
                if entry["validation_loss"] < best_loss:
                    best_loss, best_epoch = entry["validation_loss"], epoch
                    best_weights = copy.deepcopy(head.state_dict())
            history.append(entry)
            bar.update()
            if validation is not None and epoch - best_epoch >= patience:
                break
    if best_weights is not None:
        head.load_state_dict(best_weights)
    head.zero_grad(set_to_none=True)
    head.to("cpu").eval()
    oof_predictions = _foretold(torch.stack(validated), validation, loss_fn) if validated else None
    return Training(history, best_epoch, oof_predictions)


def _foretold(validated: Tensor, examples: Examples, loss_fn: Loss) -> np.ndarray:
    """Responses for each half of the examples, of the epoch that is best on the other half.

    The lowest of many losses is lower than a fresh text's would be: it is of the luckiest epoch.
    """
    losses = torch.stack([loss_fn.losses(raw, examples.y).mean(dim=1) for raw in validated])
    losses = losses * examples.weight  # (n_epochs, n)
    half = torch.arange(validated.shape[1]) % 2 == 0
    raw = torch.empty_like(validated[0])
    for chosen, others in ((half, ~half), (~half, half)):
        raw[chosen] = validated[losses[:, others].sum(dim=1).argmin(), chosen]
    return loss_fn.inverse_link(raw).double().numpy()


def evaluate(raw: Tensor, examples: Examples, loss_fn: Loss) -> dict[str, float]:
    """Validation loss and R² of raw answers for the examples, both weighted."""
    weight = examples.weight[:, None]
    predicted = loss_fn.point_prediction(loss_fn.inverse_link(raw))
    mean = (weight * examples.y).sum(dim=0) / weight.sum()
    residual = (weight * (predicted - examples.y) ** 2).sum(dim=0)
    spread = (weight * (examples.y - mean) ** 2).sum(dim=0)
    r2 = torch.where(spread > 0, 1 - residual / spread, torch.nan).nanmean()
    loss = (weight * loss_fn.losses(raw, examples.y)).sum() / weight.sum() / examples.y.shape[1]
    return {"validation_loss": float(loss), "validation_r2": float(r2)}


@torch.inference_mode()
def predict_states(
    head: RelishHead | RelishEnsemble, states: TokenStates, device: torch.device
) -> np.ndarray:
    """Answers of a trained head, or of several, for all texts: float64, (n_texts, n_predictions).

    On a CPU the head computes in float64: a text's answer depends on its batch by no more than the
    rounding of that.
    """
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    with current_device(device):
        loader = BatchLoader(states, device, dtype)
        return _answers(_placed(head, device, dtype).raw_prediction, loader).double().numpy()


@torch.inference_mode()
def staged_predict_states(
    head: RelishEnsemble, states: TokenStates, device: torch.device
) -> np.ndarray:
    """The same after each iteration, (n_texts, n_iterations, n_predictions)."""
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    with current_device(device):
        placed = _placed(head, device, dtype)
        loader = BatchLoader(states, device, dtype)
        staged = _answers(lambda *batch: placed.staged(*batch).transpose(0, 1), loader)
        return staged.double().numpy()


@torch.inference_mode()
def attention_weights(
    head: RelishEnsemble, states: TokenStates, device: torch.device
) -> list[np.ndarray]:
    """For each text the weights by which its answer came to be.

    Each is (n_estimators, n_iterations, n_heads, n_tokens).
    """
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    with current_device(device):
        placed = _placed(head, device, dtype)
        loader = BatchLoader(states, device, dtype)
        return [
            placed.attention(batch, mask)[:, :, 0][..., mask[0]].double().cpu().numpy()
            for _, batch, mask in loader.load(list(torch.arange(len(states)).split(1)))
        ]


class _Placed(NamedTuple):
    """A copy of a head on a device, and by what a change of the head is seen."""

    head: RelishHead | RelishEnsemble
    made_for: tuple[Any, ...]
    some: Tensor


class _Slot:
    """Where the copy of a head is kept; the lock lets one thread make it while others wait."""

    def __init__(self) -> None:
        self.lock = ForkSafeLock()
        self.placed: _Placed | None = None


_slots: WeakKeyDictionary[nn.Module, _Slot] = WeakKeyDictionary()
_slots_lock = ForkSafeLock()


def _placed(
    head: RelishHead | RelishEnsemble, device: torch.device, dtype: torch.dtype
) -> RelishHead | RelishEnsemble:
    """A copy of a head on a device, kept as long as the head lives and its weights stay.

    A service that answers for one text after the other does not wait for it anew each time.
    """
    # Other tensors, or written to; but a fused optimizer's step is no write that torch counts: it
    # moves all weights, so that a few of each tell of it.
    weights = [
        (weight.data_ptr(), None if weight.is_inference() else weight._version)
        for weight in head.parameters()
    ]
    made_for = device, head.state_norm, weights
    with torch.no_grad():
        some = torch.cat([weight.flatten()[:SAMPLED_WEIGHTS] for weight in head.parameters()])
    with _slots_lock:
        slot = _slots.setdefault(head, _Slot())
    with slot.lock:
        known = slot.placed
        if known is None or known.made_for != made_for or not torch.equal(known.some, some):
            known = _Placed(_copied(head, device, dtype), made_for, some)
            slot.placed = known
    return known.head


def _copied(
    head: RelishHead | RelishEnsemble, device: torch.device, dtype: torch.dtype
) -> RelishHead | RelishEnsemble:
    """A copy of a head whose weights are views of one tensor.

    The system gets that memory back when the copy is deleted. Small tensors would stay with the
    allocator's arena of the thread that made them: a service with many threads that is refitted
    would grow by a copy for each thread.
    """
    weights = list(head.parameters())
    with torch.no_grad():
        vector = torch.empty(sum(map(torch.numel, weights)), device=device, dtype=dtype)
        parts = vector.split([weight.numel() for weight in weights])
        copies = {
            id(weight): nn.Parameter(part.view_as(weight).copy_(weight), requires_grad=False)
            for weight, part in zip(weights, parts, strict=True)
        }
    return copy.deepcopy(head, copies)


def _answers(answer: Callable[[Tensor, Tensor], Tensor], loader: BatchLoader) -> Tensor:
    """Answers for all texts of a loader, on the CPU, in the order of the texts."""
    order = loader.lengths.argsort(stable=True)
    batches = []
    start = 0
    while start < len(order):
        # Lengths only grow along `order`: halve the batch until its padded size fits.
        rows = order[start : start + PREDICT_TOKENS]
        while len(rows) > 1 and len(rows) * int(loader.lengths[rows[-1]]) > PREDICT_TOKENS:
            rows = rows[: len(rows) // 2]
        batches.append(rows)
        start += len(rows)
    answers = [answer(batch, mask) for _, batch, mask in loader.load(batches)]
    return torch.cat(answers).cpu()[order.argsort()]


def mixed_precision(device: torch.device) -> torch.autocast:
    """On a CUDA device with bfloat16: products in it, parameters in float32. Elsewhere nothing."""
    enabled = device.type == "cuda" and computes_bfloat16(device)
    # A cache of cast parameters would outlive the recording that it was made in.
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def _parts(batch: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
    """A batch, in so many parts that none has more padded tokens than a step can bear."""
    n_texts = max(1, STEP_TOKENS // int(lengths[batch].max()))
    return batch.split(n_texts)


def shuffled_batches(lengths: Tensor, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """All rows once, in random batches whose texts are of like length.

    The rows are shuffled and cut into pools of `POOL_BATCHES` batches; each pool is sorted by
    length and cut into batches, and the batches are shuffled.
    """
    batches = []
    for pool in torch.randperm(len(lengths), generator=generator).split(POOL_BATCHES * batch_size):
        batches += pool[lengths[pool].argsort(stable=True)].split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

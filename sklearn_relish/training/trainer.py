"""Training of a RELISH head on token states: loss, optimizer, schedule, early stopping.

It gets states and standardized targets, and knows neither texts nor the units of the target.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sklearn_relish.head.head import RelishHead
from sklearn_relish.head.losses import Loss
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training.batching import BatchLoader, split_batch
from sklearn_relish.training.inference import predict_batches
from sklearn_relish.training.windows import window_size
from sklearn_relish.utils.locks import ForkSafeLock
from sklearn_relish.utils.progress import ProgressBar

GRADIENT_NORM = 1.0  # longer gradients are scaled down to it
AUTO_EPOCHS, AUTO_STEPS = 10, 200  # a training has at least that many of both
AUTO_RATE, AUTO_RATE_SIZE = 2e-3, 576  # the learning rate for states of up to that size
CONSTANT_RATE = 0.25  # a constant learning rate, as a share of the peak of a schedule
AVERAGED_SHARE = 0.2  # of the steps of a training, over which weights are averaged


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

    def with_views(self, views: Sequence[TokenStates]) -> Examples:
        """These examples, and after them the same ones with other states."""
        states = TokenStates.concatenated([self.states, *views])
        n_views = 1 + len(views)
        return Examples(states, self.y.repeat(n_views, 1), self.weight.repeat(n_views))

    def merged(self, groups: np.ndarray) -> Examples:
        """One example for each group of equal texts: mean of the targets, sum of the weights.

        `groups` has a number from 0 for each example, the same for equal texts.
        """
        _, first = np.unique(groups, return_index=True)
        index = torch.from_numpy(groups)
        weight = torch.zeros_like(self.weight[: len(first)]).index_add_(0, index, self.weight)
        y = torch.zeros_like(self.y[: len(first)])
        y.index_add_(0, index, self.y * self.weight[:, None])
        return Examples(self.states[torch.from_numpy(first)], y / weight[:, None], weight)


class Training(NamedTuple):
    """The result of a training.

    Parameters
    ----------
    history : list of dict
        An entry for each epoch, see `train_head`.
    best_epoch : int
        The epoch whose averaged weights the head has, from 1.
    oof_predictions : ndarray of shape (n_validation, n_outputs * n_predictions) or None
        Predictions for the validation examples. The epoch of each prediction was chosen without
        that example. None without validation examples.
    """

    history: list[dict[str, float]]
    best_epoch: int
    oof_predictions: np.ndarray | None

    def with_mean_of_views(self, n_views: int) -> Training:
        """The training with predictions for rows, where those of `n_views` views were made."""
        if n_views == 1 or self.oof_predictions is None:
            return self
        of_views = self.oof_predictions.reshape(n_views, -1, self.oof_predictions.shape[1])
        return self._replace(oof_predictions=of_views.mean(axis=0))


class Stopped(Exception):  # noqa: N818, it is no error
    """A training was asked to stop."""


_init_lock = ForkSafeLock()  # initializers draw from the one global generator


def new_head(seed: int, **sizes: Any) -> RelishHead:
    """A head with new weights drawn from `seed`; the global random state is left as it was."""
    with _init_lock, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return RelishHead(**sizes).float()  # whatever torch's default dtype is


def auto_epochs(n_rows: int, batch_size: int) -> int:
    """Epochs for a number of training rows: a small set gets more, to have enough steps.

    Examples
    --------
    >>> auto_epochs(6000, batch_size=32), auto_epochs(90, batch_size=32)
    (10, 67)
    """
    steps = max(1, math.ceil(n_rows / batch_size))
    return max(AUTO_EPOCHS, math.ceil(AUTO_STEPS / steps))


def auto_learning_rate(input_size: int) -> float:
    """The learning rate for a size of the token states: wider states get a lower one.

    A step of AdamW changes each weight by about the learning rate. The projection of a state sums
    over its `input_size` numbers, so its output changes more, the wider the state is.

    Examples
    --------
    >>> auto_learning_rate(576), auto_learning_rate(4 * 576)
    (0.002, 0.001)
    """
    return AUTO_RATE * math.sqrt(min(1.0, AUTO_RATE_SIZE / input_size))


def train_head(
    head: RelishHead,
    train: Examples,
    validation: Examples | None,
    *,
    loss_fn: Loss,
    learning_rate: float | str,
    weight_decay: float,
    batch_size: int,
    max_epochs: int,
    n_iter_no_change: int | None,
    seed: int,
    device: torch.device,
    deep_supervision: bool = False,
    constant_rate: bool = False,
    max_memory: float = math.inf,
    bar: ProgressBar | None = None,
    stop: Event | None = None,
) -> Training:
    """Train a head in place, starting from its weights.

    AdamW with a one-cycle schedule [1]_, clipped gradients, and batches of texts of similar length.
    The result is an exponential moving average of the weights [3]_, over about as many steps as a
    fifth of the training. With validation examples, it is the average after the epoch with the
    lowest validation loss.

    Parameters
    ----------
    head : RelishHead
        Trained on `device`, left on the CPU.
    train : Examples
        The training examples.
    validation : Examples or None
        The held-out examples. None: no early stopping.
    loss_fn : Loss
        The loss on standardized targets.
    learning_rate : float or "auto"
        Peak of the schedule. ``"auto"`` is `auto_learning_rate` of the size of the states, and a
        quarter of it if the rate is constant.
    weight_decay : float
        Of AdamW.
    batch_size : int
        Texts of a training step.
    max_epochs : int
        Passes over the training examples, the length of the schedule.
    n_iter_no_change : int or None
        Training stops after that many epochs in a row without a lower validation loss. None: it
        does not stop early.
    seed : int
        Of the order of the texts.
    device : torch.device
        Where the head is trained.
    deep_supervision : bool, default=False
        Whether to minimize the mean of the losses after each iteration [2]_, or only the last one.
    constant_rate : bool, default=False
        Whether the learning rate stays at `learning_rate`.
    max_memory : float, default=infinity
        Bytes of states, training and held-out ones together, that may be held in memory. If there
        are more, each epoch reads them from their files in windows, in random order, and shuffles
        the texts of a window, see `Windows`.
    bar : ProgressBar, default=None
        Counts the epochs.
    stop : Event, default=None
        The training ends with `Stopped` at the next step after it is set.

    Returns
    -------
    Training
        Each entry of its `history` has the keys ``epoch``, ``learning_rate``, ``train_loss`` and,
        with validation examples, ``validation_loss`` and ``validation_r2``, all for the predictions
        of the last iteration. The training loss is that of the weights in each step, the validation
        that of the averaged weights.

    Raises
    ------
    FloatingPointError
        If the loss is no longer finite.
    Stopped
        If `stop` was set.

    References
    ----------
    .. [1] Smith and Topin, "Super-Convergence", arXiv 1708.07120.
    .. [2] Lee et al., "Deeply-Supervised Nets", arXiv 1409.5185.
    .. [3] Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM
           Journal on Control and Optimization 30, 1992.
    """
    (stage,) = _train(
        head,
        train,
        validation,
        loss_fn=loss_fn,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        batch_size=batch_size,
        max_epochs=max_epochs,
        n_iter_no_change=n_iter_no_change,
        seed=seed,
        device=device,
        deep_supervision=deep_supervision,
        constant_rate=constant_rate,
        max_memory=max_memory,
        bar=bar,
        stop=stop,
        iterations=[head.n_iterations],
    )
    if stage.weights is not None:
        head.load_state_dict(stage.weights)
    return stage.training


def train_stages(
    head: RelishHead,
    train: Examples,
    validation: Examples,
    *,
    iterations: Sequence[int],
    **options: Any,
) -> list[tuple[RelishHead, Training]]:
    """Train a head with deep supervision once, for several numbers of iterations.

    The prediction after each iteration is trained, so a head with fewer iterations is the same head
    without its last ones. Each number of iterations has an epoch of its own whose weights are kept.

    Parameters
    ----------
    head : RelishHead
        With the largest of the numbers of iterations. Its weights are changed.
    train, validation : Examples
    iterations : sequence of int
        Different numbers of iterations in increasing order.
    **options
        Arguments of `train_head`. `n_iter_no_change` refers to the head with all iterations.

    Returns
    -------
    list of (RelishHead, Training)
        For each of `iterations`. The losses of each `history` are those of that head.

    Raises
    ------
    FloatingPointError
        If the loss is no longer finite.
    """
    stages = _train(
        head, train, validation, deep_supervision=True, iterations=iterations, **options
    )
    return [
        (head.truncated(number, stage.weights), stage.training)
        for number, stage in zip(iterations, stages, strict=True)
    ]


class _Stage(NamedTuple):
    """The result for one number of iterations; weights are those of the complete head."""

    weights: dict[str, Tensor] | None
    training: Training


def _train(
    head: RelishHead,
    train: Examples,
    validation: Examples | None,
    *,
    loss_fn: Loss,
    learning_rate: float | str,
    weight_decay: float,
    batch_size: int,
    max_epochs: int,
    n_iter_no_change: int | None,
    seed: int,
    device: torch.device,
    deep_supervision: bool,
    iterations: Sequence[int],
    constant_rate: bool = False,
    max_memory: float = math.inf,
    bar: ProgressBar | None = None,
    stop: Event | None = None,
) -> list[_Stage]:
    """Train a head, and find the best epoch for each of `iterations`; see `train_stages`.

    The head is left with the averaged weights of the last epoch.
    """
    if isinstance(learning_rate, str):  # "auto"
        learning_rate = auto_learning_rate(head.sizes["input_size"])
        learning_rate *= CONSTANT_RATE if constant_rate else 1.0
    # torch accepts neither NumPy's integers nor integers of more than 64 bits.
    max_epochs, batch_size = int(max_epochs), min(int(batch_size), len(train.states))
    n_steps = max_epochs * math.ceil(len(train.states) / batch_size)
    generator = torch.Generator().manual_seed(seed)
    head.to(device).train()
    optimizer = AdamW(head.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True)
    schedule = _schedule(optimizer, learning_rate, n_steps, constant_rate)
    averaged = _MovingAverage(head, AVERAGED_SHARE * n_steps)
    n_bytes = train.states.n_bytes + (0 if validation is None else validation.states.n_bytes)
    window_bytes = window_size(n_bytes, max_memory)
    step = _Step(head, train, loss_fn, deep_supervision, device, window_bytes)
    if validation is not None:
        held_out = BatchLoader(validation.states, device, torch.float32, window_bytes)
    courses = [_Course(max_epochs) for _ in iterations]
    patience = math.inf if n_iter_no_change is None else n_iter_no_change
    for epoch in range(1, max_epochs + 1):
        total = torch.zeros(len(iterations), device=device)
        for batch in step.loader.training_batches(batch_size, generator):
            if stop is not None and stop.is_set():
                raise Stopped
            optimizer.zero_grad()
            for part in split_batch(batch, train.states):
                total += step.backward(part, len(batch), iterations)
            nn.utils.clip_grad_norm_(head.parameters(), GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            averaged.update(head)
        if not total.isfinite().all():
            raise FloatingPointError(
                f"Training diverged in epoch {epoch}: the loss is not finite any more. Lower"
                f" learning_rate={learning_rate}."
            )
        if validation is not None:
            with torch.inference_mode():
                validated = _predict_stages(averaged.head, held_out, iterations)
        for number, course in enumerate(courses):
            entry = {
                "epoch": epoch,
                "learning_rate": float(schedule.get_last_lr()[0]),
                "train_loss": float(total[number]) / float(train.weight.sum()),
            }
            if validation is not None:
                entry |= evaluate(validated[number], validation, loss_fn)
                course.validated.append(validated[number])
                course.update(epoch, entry["validation_loss"], averaged.head)
            course.history.append(entry)
        if bar is not None:
            r2 = entry.get("validation_r2")
            bar.update(figures=None if r2 is None else {"validation R²": f"{r2:.3f}"})
        if validation is not None and epoch - courses[-1].best_epoch >= patience:
            break
    head.zero_grad()
    head.load_state_dict(averaged.head.state_dict())
    head.to("cpu").eval()
    return [course.result(validation, loss_fn) for course in courses]


def _predict_stages(
    head: RelishHead, loader: BatchLoader, iterations: Sequence[int]
) -> Sequence[Tensor]:
    """Raw predictions of all texts after each of `iterations`."""
    if list(iterations) == [head.n_iterations]:
        return [predict_batches(head.forward_zero_padded, loader)]
    raw = predict_batches(lambda *batch: head.staged(*batch).transpose(0, 1), loader)
    return [raw[:, number - 1] for number in iterations]


def _schedule(
    optimizer: Optimizer, learning_rate: float, n_steps: int, constant_rate: bool
) -> LRScheduler:
    if constant_rate:
        return LambdaLR(optimizer, lambda step: 1.0)
    return OneCycleLR(optimizer, max_lr=learning_rate, total_steps=max(n_steps, 2))


class _MovingAverage:
    """The exponential moving average of a head's weights over about `n_steps` steps.

    At first it reaches back over a third of the steps so far, so that it leaves the initial weights
    behind. `head` has the average. torch's `AveragedModel` copies a counter to the device in each
    step, which makes the CPU wait.
    """

    def __init__(self, head: RelishHead, n_steps: float) -> None:
        self.head = copy.deepcopy(head)
        self._n_steps = max(n_steps, 1.0)
        self._n_updates = 0

    def update(self, head: RelishHead) -> None:
        decay = min(1 - 1 / self._n_steps, self._n_updates / (self._n_updates + 3))
        average = get_ema_multi_avg_fn(decay)
        average(list(self.head.parameters()), list(head.parameters()), self._n_updates)
        self._n_updates += 1


class _Step:
    """The forward and backward pass for a batch, or for a part of it."""

    def __init__(
        self,
        head: RelishHead,
        train: Examples,
        loss_fn: Loss,
        deep_supervision: bool,
        device: torch.device,
        window_bytes: float,
    ) -> None:
        self.head = head
        self.loss_fn = loss_fn
        self.deep_supervision = deep_supervision
        self.loader = BatchLoader(train.states, device, torch.float32, window_bytes)
        self.y, self.weight = train.y.to(device), train.weight.to(device)

    def backward(self, rows: Tensor, n_texts: int, iterations: Sequence[int]) -> Tensor:
        """Add the gradients of the rows' losses, divided by the batch's number of texts.

        The sum of the losses of the predictions after each of `iterations` is returned; without
        deep supervision there is the last one alone.
        """
        losses = self._losses(rows)
        (losses.mean(dim=0).sum() / n_texts).backward()
        losses = losses.detach()
        numbers = [number - 1 for number in iterations] if self.deep_supervision else [-1]
        return torch.stack([losses[number].sum() for number in numbers])

    def _losses(self, rows: Tensor) -> Tensor:
        """The losses of the rows, (n_iterations, B); without deep supervision (1, B)."""
        batch = self.loader.load(rows)
        rows = rows.to(self.y.device)
        y, weight = self.y[rows], self.weight[rows]
        if self.deep_supervision:
            raw = self.head.staged(*batch)  # (n_iterations, B, n_outputs * n_predictions)
        else:
            raw = self.head.forward_zero_padded(*batch)[None]
        return torch.stack([self.loss_fn.loss(stage, y).mean(dim=1) * weight for stage in raw])


class _Course:
    """The course of a training for one number of iterations, and its best epoch so far."""

    def __init__(self, max_epochs: int) -> None:
        self.history: list[dict[str, float]] = []
        self.validated: list[Tensor] = []  # raw predictions for the validation examples, by epoch
        self.best_epoch = max_epochs  # the last one, without validation
        self.weights: dict[str, Tensor] | None = None
        self._loss = math.inf

    def update(self, epoch: int, loss: float, head: RelishHead) -> None:
        """Keep the weights if this epoch has the lowest validation loss so far."""
        if loss < self._loss:
            self.best_epoch, self._loss = epoch, loss
            self.weights = copy.deepcopy(head.state_dict())

    def result(self, validation: Examples | None, loss_fn: Loss) -> _Stage:
        oof_predictions = None
        if validation is not None:
            oof_predictions = _oof_predictions(torch.stack(self.validated), validation, loss_fn)
        return _Stage(self.weights, Training(self.history, self.best_epoch, oof_predictions))


def _oof_predictions(validated: Tensor, examples: Examples, loss_fn: Loss) -> np.ndarray:
    """Predictions for each half of the examples, by the epoch that is best on the other half.

    The lowest of many validation losses is too optimistic: it is the loss of the luckiest epoch.
    """
    losses = torch.stack([loss_fn.loss(raw, examples.y).mean(dim=1) for raw in validated])
    losses = losses * examples.weight  # (n_epochs, n)
    half = torch.arange(validated.shape[1]) % 2 == 0
    raw = torch.empty_like(validated[0])
    for chosen, rest in ((half, ~half), (~half, half)):
        # A single example leaves no other half: the last epoch has the lowest learning rate.
        best = int(losses[:, rest].sum(dim=1).argmin()) if rest.any() else -1
        raw[chosen] = validated[best, chosen]
    return loss_fn.inverse_link(raw).double().numpy()


def evaluate(raw: Tensor, examples: Examples, loss_fn: Loss) -> dict[str, float]:
    """Validation loss and R² of raw predictions for the examples, both weighted."""
    weight = examples.weight[:, None]
    predicted = loss_fn.point_prediction(loss_fn.inverse_link(raw))
    mean = (weight * examples.y).sum(dim=0) / weight.sum()
    residual = (weight * (predicted - examples.y) ** 2).sum(dim=0)
    spread = (weight * (examples.y - mean) ** 2).sum(dim=0)
    r2 = torch.where(spread > 0, 1 - residual / spread, torch.nan).nanmean()
    loss = (weight * loss_fn.loss(raw, examples.y)).sum() / weight.sum() / examples.y.shape[1]
    return {"validation_loss": float(loss), "validation_r2": float(r2)}

"""Training: what a head learns, its history, early stopping, and its seeds."""

import numpy as np
import pytest
import torch
from tasks import CPU, task, train

from sklearn_relish.head.losses import HuberLoss, SquaredLoss
from sklearn_relish.training import batching, trainer
from sklearn_relish.training.inference import predict_states
from sklearn_relish.training.trainer import (
    Examples,
    _MovingAverage,
    _oof_predictions,
    auto_epochs,
    new_head,
)


def test_learns_a_target_that_pooling_does_not_show():
    head, _ = train(task(1500), max_epochs=20)
    fresh = task(300, seed=1)
    predicted = predict_states(head, fresh.states, CPU)[:, 0]
    assert np.corrcoef(predicted, fresh.y[:, 0])[0, 1] > 0.9


def test_deep_supervision_makes_every_iteration_predict():
    fresh = task(300, seed=1)

    def losses(**changes):
        head, training = train(task(800), fresh, max_epochs=12, **changes)
        states, mask = fresh.states.batch(torch.arange(300))
        stages = head.staged(states, mask).detach()
        assert len(stages) == 2
        last = training.history[training.best_epoch - 1]["validation_loss"]
        found = [float(HuberLoss().loss(raw, fresh.y).mean()) for raw in stages]
        assert found[-1] == pytest.approx(last, rel=1e-4)  # the history is of the last iteration
        return found

    first, last = losses(deep_supervision=True)
    alone_first, alone_last = losses()
    assert first < 0.5 * alone_first
    assert last < 1.25 * alone_last


def test_same_seed_same_weights_to_the_last_bit_and_the_global_state_untouched():
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002, it is the global state that must stay
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, second, other = (train(task(100), seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002


def test_history_and_best_epoch():
    examples, validation = task(64, noise=2.0), task(64, seed=1, noise=2.0)
    head, training = train(examples, validation, max_epochs=25, learning_rate=1e-2)
    assert [entry["epoch"] for entry in training.history] == list(
        range(1, len(training.history) + 1)
    )
    losses = [entry["validation_loss"] for entry in training.history]
    assert training.best_epoch == 1 + int(np.argmin(losses))
    assert training.best_epoch < len(losses)  # it overfits; otherwise the test shows nothing

    residual = torch.from_numpy(predict_states(head, validation.states, CPU)) - validation.y
    restored = torch.nn.functional.huber_loss(residual, torch.zeros_like(residual))
    assert float(restored) == pytest.approx(min(losses), rel=1e-5)
    r2 = training.history[training.best_epoch - 1]["validation_r2"]
    assert r2 == pytest.approx(
        1 - float(residual.square().sum() / (validation.y - validation.y.mean()).square().sum()),
        rel=1e-4,
    )


def test_stops_after_n_iter_no_change():
    _, training = train(
        task(64, noise=2.0), task(64, seed=1, noise=2.0), max_epochs=50, n_iter_no_change=3
    )
    assert len(training.history) == training.best_epoch + 3


def test_a_diverged_training_is_an_error():
    with pytest.raises(FloatingPointError, match=r"diverged in epoch \d+.*Lower learning_rate"):
        train(task(64), learning_rate=1e30, max_epochs=30)


def test_learning_rate_rises_and_falls():
    _, training = train(task(320), max_epochs=10, learning_rate=1e-3)
    rates = [entry["learning_rate"] for entry in training.history]
    assert rates[0] < max(rates) == pytest.approx(1e-3, rel=0.05)
    assert rates[-1] < 1e-5


@pytest.mark.parametrize(("input_size", "rate"), [(12, 2e-3), (2304, 1e-3)])
def test_the_automatic_learning_rate_is_lower_for_wide_states(input_size, rate):
    head = new_head(0, input_size=input_size, latent_size=8, n_heads=2)
    examples = task(320, size=input_size)
    _, training = train(examples, head=head, learning_rate="auto", max_epochs=10)
    assert max(entry["learning_rate"] for entry in training.history) == pytest.approx(rate, rel=0.1)
    _, training = train(examples, head=head, learning_rate="auto", max_epochs=2, constant_rate=True)
    assert [entry["learning_rate"] for entry in training.history] == pytest.approx([rate / 4] * 2)


def test_weight_decay_shrinks_the_weights():
    norms = [
        sum(
            float(p.detach().square().sum())
            for p in train(task(64), weight_decay=decay)[0].parameters()
        )
        for decay in (0.0, 30.0)
    ]
    assert norms[1] < 0.9 * norms[0]


def test_gradients_are_clipped(monkeypatch):
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def spy(parameters, *args, **kwargs):
        parameters = list(parameters)
        clip(parameters, *args, **kwargs)
        squares = [float(p.grad.square().sum()) for p in parameters if p.grad is not None]
        norms.append(sum(squares) ** 0.5)

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", spy)
    examples = task(64)
    train(
        Examples(examples.states, 1e6 * examples.y, examples.weight),
        loss_fn=SquaredLoss(),
    )
    assert max(norms) <= 1.0 + 1e-4


def test_validation_is_weighted():
    examples = task(64, noise=1.0)
    weight = torch.linspace(0, 2, 64)
    validation = Examples(examples.states, examples.y, weight)
    head, training = train(task(64), validation, loss_fn=SquaredLoss(), max_epochs=1)
    error = (torch.from_numpy(predict_states(head, examples.states, CPU)) - examples.y)[:, 0] ** 2
    expected = float((weight * error).sum() / weight.sum())
    assert training.history[0]["validation_loss"] == pytest.approx(expected, rel=1e-4)


def test_without_validation_the_last_epoch_is_kept():
    _, training = train(task(64))
    assert training.best_epoch == len(training.history) == 8
    assert set(training.history[0]) == {"epoch", "learning_rate", "train_loss"}


def averages(n_steps, values):
    """The averages after each step of a head all of whose weights have these values."""
    head = new_head(0, input_size=3, latent_size=2, n_heads=1, n_iterations=1)
    averaged = _MovingAverage(head, n_steps)
    for value in values:
        for weight in head.parameters():
            torch.nn.init.constant_(weight, value)
        averaged.update(head)
        (found,) = {weight.item() for weight in averaged.head.readout.weight[0]}
        yield found


def test_an_average_is_over_the_last_steps():
    assert list(averages(10, [2.0] * 20)) == pytest.approx([2.0] * 20)
    *_, last = averages(10, range(200))
    assert last == pytest.approx(199 - 9)
    assert list(averages(0.0, [1.0, 5.0, 2.0])) == [1.0, 5.0, 2.0]


def test_the_average_leaves_the_first_weights_behind():
    *_, last = averages(1000, [100.0] + [1.0] * 29)
    assert last == pytest.approx(1.0, abs=0.1)


def test_averages_are_over_a_fifth_of_the_steps_and_are_what_is_validated(monkeypatch):
    lengths = []

    class Average(_MovingAverage):
        def __init__(self, head, n_steps):
            lengths.append(n_steps)
            super().__init__(head, n_steps)

    monkeypatch.setattr(trainer, "_MovingAverage", Average)
    examples, validation = task(100), task(40, seed=1)
    head, averaged = train(examples, validation, max_epochs=5)
    assert lengths == [0.2 * 5 * 4]
    monkeypatch.setattr(trainer, "AVERAGED_SHARE", 0.0)
    _, latest = train(examples, validation, max_epochs=5)
    for name, same in (("train_loss", True), ("validation_loss", False)):
        pairs = zip(averaged.history, latest.history, strict=True)
        assert all((one[name] == other[name]) == same for one, other in list(pairs)[1:])
    assert lengths[1] == 0.0
    raw = predict_states(head, validation.states, CPU)
    loss = HuberLoss().loss(torch.from_numpy(raw), validation.y).mean()
    best = averaged.history[averaged.best_epoch - 1]["validation_loss"]
    assert float(loss) == pytest.approx(best, rel=1e-5)


def test_averaged_weights_are_better_where_targets_are_noisy(monkeypatch):
    clean = task(500, seed=1)
    errors = []
    for share in (trainer.AVERAGED_SHARE, 0.0):
        monkeypatch.setattr(trainer, "AVERAGED_SHARE", share)
        errors.append(0.0)
        for seed in range(3):
            head, _ = train(task(200, seed=5 + seed, noise=2.0), seed=seed, constant_rate=True)
            predicted = predict_states(head, clean.states, CPU)
            errors[-1] += float(((predicted - clean.y.numpy()) ** 2).mean())
    assert errors[0] < 0.95 * errors[1]


def test_examples_with_little_weight_have_little_influence():
    examples = task(200)
    wrong = examples.y.clone()
    wrong[100:] = -wrong[100:]
    trusted = Examples(examples.states, wrong, (torch.arange(200) < 100).float() * 2 + 1e-9)
    head, _ = train(trusted, max_epochs=40)
    predicted = predict_states(head, examples.states, CPU)
    assert np.corrcoef(predicted[100:, 0], examples.y[100:, 0])[0, 1] > 0.3


@pytest.mark.parametrize("loss_fn", [HuberLoss(), SquaredLoss()])
def test_the_train_loss_is_that_of_the_loss(loss_fn):
    examples = task(100)
    head, training = train(examples, loss_fn=loss_fn, max_epochs=1, learning_rate=1e-12)
    residual = (torch.from_numpy(predict_states(head, examples.states, CPU)) - examples.y).abs()
    huber = torch.where(residual < 1, 0.5 * residual**2, residual - 0.5)
    expected = huber if loss_fn == HuberLoss() else residual**2
    assert training.history[0]["train_loss"] == pytest.approx(float(expected.mean()), rel=1e-4)


def test_batches_may_be_larger_than_any_number_of_texts():
    examples = task(20)
    head, _ = train(examples, batch_size=10**18, max_epochs=2)
    same, _ = train(examples, batch_size=20, max_epochs=2)
    for ours, theirs in zip(head.parameters(), same.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert auto_epochs(20, batch_size=10**400) == 200


def test_a_batch_in_parts_is_trained_like_a_complete_one(monkeypatch):
    examples = task(64)
    complete, training = train(examples, max_epochs=2, deep_supervision=True)
    monkeypatch.setattr(batching, "STEP_TOKENS", 40)
    split, split_training = train(examples, max_epochs=2, deep_supervision=True)
    for ours, theirs in zip(split.parameters(), complete.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    loss, split_loss = (run.history[-1]["train_loss"] for run in (training, split_training))
    assert split_loss == pytest.approx(loss, rel=1e-4)


def test_out_of_fold_predictions_are_of_the_epoch_that_is_best_on_the_other_half():
    validated = torch.tensor([[0.0, 3.0, 9.0, 3.0], [5.0, 1.0, 0.0, 1.0]])[:, :, None]
    examples = Examples.of(task(4).states, np.zeros((4, 1)), np.array([1.0, 1.0, 0.0, 1.0]))
    found = _oof_predictions(validated, examples, HuberLoss())
    # Epoch 0 is best on rows 0 and 2, the latter without weight, and epoch 1 on rows 1 and 3.
    assert found[:, 0].tolist() == [5.0, 3.0, 0.0, 3.0]


def test_a_training_may_have_a_single_step():
    _, training = train(task(20), max_epochs=1)
    assert len(training.history) == 1
    assert np.isfinite(training.history[0]["learning_rate"])

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sklearn_relish.head.head import RelishEnsemble
from sklearn_relish.head.losses import Loss
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training import trainer as training
from sklearn_relish.training.trainer import (
    Examples,
    _placed,
    auto_epochs,
    new_head,
    predict_states,
    shuffled_batches,
    train_head,
)
from sklearn_relish.utils import locks

CPU = torch.device("cpu")


def task(n_texts, seed=0, size=12, noise=0.0):
    """Texts whose number is the first component of their loudest token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (n_texts,), generator=generator)
    values = torch.randn(int(lengths.sum()), size, generator=generator)
    states = TokenStates.from_lengths(values, lengths)
    y = np.array([float(text[text[:, 1].argmax(), 0]) for text in values.split(lengths.tolist())])
    y = y + noise * torch.randn(n_texts, generator=generator).numpy()
    return Examples.of(states, y[:, None], np.ones(n_texts))


def train(examples, validation=None, seed=0, head=None, **changes):
    head = head or new_head(
        seed, input_size=12, latent_size=32, n_heads=4, n_iterations=2, state_norm=None
    )
    settings = {
        "loss_fn": Loss("huber"),
        "learning_rate": 3e-3,
        "weight_decay": 0.01,
        "batch_size": 32,
        "max_epochs": 8,
        "n_iter_no_change": 8,
        "seed": seed,
        "device": CPU,
        "progress": False,
    }
    return head, train_head(head, examples, validation, **(settings | changes))


def test_learns_what_pooling_cannot():
    head, _ = train(task(1500), max_epochs=20)
    fresh = task(300, seed=1)
    predicted = predict_states(head, fresh.states, CPU)[:, 0]
    assert np.corrcoef(predicted, fresh.y[:, 0])[0, 1] > 0.9


def test_deep_supervision_asks_every_iteration_to_be_right():
    fresh = task(300, seed=1)

    def losses(**changes):
        head, training = train(task(800), fresh, max_epochs=12, **changes)
        states, mask = fresh.states.batch(torch.arange(300))
        stages = head.staged(states, mask).detach()
        assert len(stages) == 2
        last = training.history[training.best_epoch - 1]["validation_loss"]
        found = [float(Loss("huber").losses(raw, fresh.y).mean()) for raw in stages]
        assert found[-1] == pytest.approx(last, rel=1e-4)  # what is told is of the last answer
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
    assert training.best_epoch < len(losses)  # it overfits: otherwise this shows nothing

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
        loss_fn=Loss("squared_error"),
    )
    assert max(norms) <= 1.0 + 1e-4


def test_validation_is_weighted():
    examples = task(64, noise=1.0)
    weight = torch.linspace(0, 2, 64)
    validation = Examples(examples.states, examples.y, weight)
    head, training = train(task(64), validation, loss_fn=Loss("squared_error"), max_epochs=1)
    error = (torch.from_numpy(predict_states(head, examples.states, CPU)) - examples.y)[:, 0] ** 2
    expected = float((weight * error).sum() / weight.sum())
    assert training.history[0]["validation_loss"] == pytest.approx(expected, rel=1e-4)


def test_without_validation_the_last_epoch_counts():
    _, training = train(task(64))
    assert training.best_epoch == len(training.history) == 8
    assert set(training.history[0]) == {"epoch", "learning_rate", "train_loss"}


def test_weights_count():
    examples = task(200)
    wrong = examples.y.clone()
    wrong[100:] = -wrong[100:]
    trusted = Examples(examples.states, wrong, (torch.arange(200) < 100).float() * 2 + 1e-9)
    head, _ = train(trusted, max_epochs=40)
    predicted = predict_states(head, examples.states, CPU)
    assert np.corrcoef(predicted[100:, 0], examples.y[100:, 0])[0, 1] > 0.3


@pytest.mark.parametrize("loss", ["huber", "squared_error"])
def test_losses(loss):
    examples = task(100)
    head, training = train(examples, loss_fn=Loss(loss), max_epochs=1, learning_rate=1e-12)
    residual = (torch.from_numpy(predict_states(head, examples.states, CPU)) - examples.y).abs()
    huber = torch.where(residual < 1, 0.5 * residual**2, residual - 0.5)
    expected = huber if loss == "huber" else residual**2
    assert training.history[0]["train_loss"] == pytest.approx(float(expected.mean()), rel=1e-4)


def test_answers_keep_order_and_do_not_depend_on_company(monkeypatch):
    examples = task(50)
    head, _ = train(examples)
    together = predict_states(head, examples.states, CPU)
    monkeypatch.setattr("sklearn_relish.training.trainer.PREDICT_TOKENS", 16)
    for rows in ([7], [3, 3, 40], list(range(49, -1, -1))):
        some = predict_states(head, examples.states[torch.tensor(rows)], CPU)
        np.testing.assert_allclose(some, together[rows], rtol=1e-10, atol=1e-12)


def test_answers_follow_the_weights():
    examples = task(20)
    head, _ = train(examples)
    before = predict_states(head, examples.states, CPU)
    assert (predict_states(head, examples.states, CPU) == before).all()
    with torch.no_grad():
        head.readout.bias += 1
    np.testing.assert_allclose(predict_states(head, examples.states, CPU), before + 1, atol=1e-6)
    assert _placed(head, CPU, torch.float64) is _placed(head, CPU, torch.float64)
    head.readout = copy.deepcopy(head.readout)
    with torch.no_grad():
        head.readout.bias += 1
    np.testing.assert_allclose(predict_states(head, examples.states, CPU), before + 2, atol=1e-6)


def test_answers_follow_further_training():
    examples = task(20)
    head, _ = train(examples)
    before = predict_states(head, examples.states, CPU)
    train(examples, head=head, max_epochs=1)
    after = predict_states(head, examples.states, CPU)
    assert np.abs(after - before).max() > 1e-3
    assert (predict_states(copy.deepcopy(head), examples.states, CPU) == after).all()


def test_a_head_copied_in_inference_mode_answers():
    examples = task(20)
    head, _ = train(examples)
    with torch.inference_mode():
        copied = copy.deepcopy(head)
        answers = predict_states(copied, examples.states, CPU)
    assert (answers == predict_states(head, examples.states, CPU)).all()


def test_batches_hold_every_row_once_with_like_lengths_together():
    lengths = torch.randint(1, 100, (1000,), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    first, second = (shuffled_batches(lengths, 32, generator) for _ in range(2))
    assert torch.equal(torch.cat(first).sort().values, torch.arange(1000))
    assert [len(batch) for batch in first].count(32) == 31
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in first)
    assert padded / int(lengths.sum()) < 1.15
    assert [batch.tolist() for batch in first] != [batch.tolist() for batch in second]


def test_batches_may_be_larger_than_any_number_of_texts():
    examples = task(20)
    head, _ = train(examples, batch_size=10**18, max_epochs=2)
    same, _ = train(examples, batch_size=20, max_epochs=2)
    for ours, theirs in zip(head.parameters(), same.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert auto_epochs(20, batch_size=10**400) == 200


def test_threads_that_use_a_head_for_the_first_time_share_one_copy(monkeypatch):
    examples = task(5)
    head = new_head(0, input_size=12, latent_size=32, n_heads=4)
    copies, original = [], copy.deepcopy

    def counted(module, memo):
        copies.append(module)
        time.sleep(0.05)  # so that the others come meanwhile
        return original(module, memo)

    monkeypatch.setattr(training, "copy", SimpleNamespace(deepcopy=counted))
    barrier = threading.Barrier(20)

    def answer(_):
        barrier.wait()
        return predict_states(head, examples.states, CPU)

    with ThreadPoolExecutor(20) as pool:
        first, *others = pool.map(answer, range(20))
    assert len(copies) == 1
    assert all((other == first).all() for other in others)


def test_locks_that_were_taken_are_free_in_a_forked_child():
    """What `os.register_at_fork` calls in the child, called here."""
    examples = task(5)
    head = new_head(0, input_size=12, latent_size=32, n_heads=4)
    before = predict_states(head, examples.states, CPU)
    renewed = [training._init_lock, training._slots_lock, training._slots[head].lock]
    taken = [lock._lock for lock in renewed]
    for lock in taken:
        lock.acquire()
    locks._renew_all()
    assert all(lock.locked() for lock in taken)
    assert not any(lock._lock.locked() for lock in renewed)
    assert (predict_states(head, examples.states, CPU) == before).all()
    new_head(0, input_size=12, latent_size=32, n_heads=4)


def test_the_weights_of_a_copy_for_predictions_are_one_tensor():
    """Then the system gets its memory back when the next fit replaces it."""
    heads = [new_head(seed, input_size=8, latent_size=16, n_heads=2) for seed in (0, 1)]
    ensemble = RelishEnsemble(heads, linear_path=True)
    placed = _placed(ensemble, torch.device("cpu"), torch.float64)
    assert len({weight.untyped_storage().data_ptr() for weight in placed.parameters()}) == 1
    copied = dict(placed.named_parameters())
    for name, weight in ensemble.named_parameters(remove_duplicate=False):
        assert torch.equal(copied[name], weight.double()), name

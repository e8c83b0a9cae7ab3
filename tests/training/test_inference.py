"""Predictions of fitted heads, and the copies that they are made with."""

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import torch
from tasks import CPU, task, train

from sklearn_relish.head.ensemble import RelishEnsemble
from sklearn_relish.training import batching, inference, trainer
from sklearn_relish.training.inference import device_copy, predict_states
from sklearn_relish.training.trainer import new_head
from sklearn_relish.utils import locks


def test_predictions_keep_the_order_and_do_not_depend_on_the_batch(monkeypatch):
    examples = task(50)
    head, _ = train(examples)
    together = predict_states(head, examples.states, CPU)
    monkeypatch.setattr(batching, "PREDICT_TOKENS", 16)
    for rows in ([7], [3, 3, 40], list(range(49, -1, -1))):
        found = predict_states(head, examples.states[torch.tensor(rows)], CPU)
        np.testing.assert_allclose(found, together[rows], rtol=1e-10, atol=1e-12)


def test_predictions_follow_changes_of_the_weights():
    examples = task(20)
    head, _ = train(examples)
    before = predict_states(head, examples.states, CPU)
    assert (predict_states(head, examples.states, CPU) == before).all()
    with torch.no_grad():
        head.readout.bias += 1
    np.testing.assert_allclose(predict_states(head, examples.states, CPU), before + 1, atol=1e-6)
    assert device_copy(head, CPU, torch.float64) is device_copy(head, CPU, torch.float64)
    head.readout = copy.deepcopy(head.readout)
    with torch.no_grad():
        head.readout.bias += 1
    np.testing.assert_allclose(predict_states(head, examples.states, CPU), before + 2, atol=1e-6)


def test_predictions_follow_further_training():
    examples = task(20)
    head, _ = train(examples)
    before = predict_states(head, examples.states, CPU)
    train(examples, head=head, max_epochs=1)
    after = predict_states(head, examples.states, CPU)
    assert np.abs(after - before).max() > 1e-3
    assert (predict_states(copy.deepcopy(head), examples.states, CPU) == after).all()


def test_a_head_copied_in_inference_mode_predicts():
    examples = task(20)
    head, _ = train(examples)
    with torch.inference_mode():
        copied = copy.deepcopy(head)
        predictions = predict_states(copied, examples.states, CPU)
    assert (predictions == predict_states(head, examples.states, CPU)).all()


def test_threads_that_use_a_head_for_the_first_time_share_one_copy(monkeypatch):
    examples = task(5)
    head = new_head(0, input_size=12, latent_size=32, n_heads=4)
    copies, original = [], copy.deepcopy

    def counted(module, memo):
        copies.append(module)
        time.sleep(0.05)  # so that the other threads ask for it meanwhile
        return original(module, memo)

    monkeypatch.setattr(inference, "copy", SimpleNamespace(deepcopy=counted))
    barrier = threading.Barrier(20)

    def predict(_):
        barrier.wait()
        return predict_states(head, examples.states, CPU)

    with ThreadPoolExecutor(20) as pool:
        first, *rest = pool.map(predict, range(20))
    assert len(copies) == 1
    assert all((other == first).all() for other in rest)


def test_locks_that_were_taken_are_free_in_a_forked_child():
    """What `os.register_at_fork` calls in the child, called here."""
    examples = task(5)
    head = new_head(0, input_size=12, latent_size=32, n_heads=4)
    before = predict_states(head, examples.states, CPU)
    renewed = [trainer._init_lock, inference._slots_lock, inference._slots[head].lock]
    taken = [lock._lock for lock in renewed]
    for lock in taken:
        lock.acquire()
    locks._renew_all()
    assert all(lock.locked() for lock in taken)
    assert not any(lock._lock.locked() for lock in renewed)
    assert (predict_states(head, examples.states, CPU) == before).all()
    new_head(0, input_size=12, latent_size=32, n_heads=4)


def test_the_weights_of_a_copy_for_predictions_are_one_tensor():
    """Then the system gets the memory back when the next fit replaces the copy."""
    heads = [new_head(seed, input_size=8, latent_size=16, n_heads=2) for seed in (0, 1)]
    ensemble = RelishEnsemble(heads, linear_path=True)
    copied = device_copy(ensemble, torch.device("cpu"), torch.float64)
    assert len({weight.untyped_storage().data_ptr() for weight in copied.parameters()}) == 1
    copies = dict(copied.named_parameters())
    for name, weight in ensemble.named_parameters(remove_duplicate=False):
        assert torch.equal(copies[name], weight.double()), name

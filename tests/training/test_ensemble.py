"""Several heads and a linear path: what is held out, how they are weighed, what they answer."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from sklearn_relish.head.head import RelishEnsemble, RelishHead
from sklearn_relish.head.losses import Loss
from sklearn_relish.head.pooling import pool
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training.ensemble import fit_ensemble
from sklearn_relish.training.ridges import PENALTIES, fit_ridges, stack
from sklearn_relish.training.trainer import Examples, new_head, predict_states

SIZES = {"input_size": 6, "latent_size": 8, "n_heads": 2}
TRAINING = {
    "loss_fn": Loss("huber"),
    "learning_rate": 5e-3,
    "weight_decay": 0.01,
    "batch_size": 16,
    "max_epochs": 5,
    "n_iter_no_change": None,
    "device": torch.device("cpu"),
    "progress": False,
}
PRIOR = (0.5, 0.25, 0.25)


def linear_examples(n_texts, n_outputs=1, noise=0.1, seed=0):
    """Texts whose target is a linear function of their mean state, and some noise."""
    random = np.random.RandomState(seed)
    lengths = torch.from_numpy(random.randint(1, 9, n_texts))
    values = torch.from_numpy(random.randn(int(lengths.sum()), 6)).float()
    states = TokenStates.from_lengths(values, lengths)
    weights = np.random.RandomState(99).randn(6, n_outputs)
    y = pool(states, "mean", "rms").numpy() @ weights
    y = y + noise * random.randn(*y.shape)
    return Examples.of(states, (y - y.mean(0)) / y.std(0), np.ones(n_texts))


def fit(examples, held_out, **changes):
    settings = {"linear_path": True, "random": np.random.RandomState(0), **TRAINING}
    sizes = SIZES | changes.pop("sizes", {}) | {"n_outputs": examples.y.shape[1]}
    settings["make_head"] = lambda number, seed: new_head(seed, **sizes)
    text = changes.pop("text", np.arange(len(examples.states)))
    return fit_ensemble(examples, text, held_out, **settings | changes)[:2]


@pytest.mark.parametrize("n_outputs", [1, 2])
def test_a_linear_target_is_learned_by_the_linear_path(n_outputs):
    examples, fresh = linear_examples(300, n_outputs), linear_examples(300, n_outputs, seed=1)
    folds = np.array_split(np.random.RandomState(0).permutation(300), 3)
    ensemble, trainings = fit(examples, folds, max_epochs=1)
    assert len(ensemble.heads) == len(trainings) == 3
    answers = predict_states(ensemble, fresh.states, torch.device("cpu"))
    alone, _ = fit(examples, folds, max_epochs=1, linear_path=False)
    alone = predict_states(alone, fresh.states, torch.device("cpu"))
    for j in range(n_outputs):
        y = fresh.y[:, j].numpy()
        assert np.corrcoef(answers[:, j], y)[0, 1] > 0.95
        assert np.corrcoef(answers[:, j], y)[0, 1] > np.corrcoef(alone[:, j], y)[0, 1]


def test_the_answer_is_the_mean_of_the_heads_and_the_linear_path():
    torch.manual_seed(0)
    heads = [RelishHead(**SIZES) for _ in range(3)]
    states = torch.randn(4, 5, 6)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3], [2]])
    ensemble = RelishEnsemble(heads, linear_path=True)
    mean = sum(head(states, mask) for head in heads) / 3
    torch.testing.assert_close(ensemble(states, mask), mean)

    ensemble.head_weight.fill_(0.5)
    ensemble.linear.weight.copy_(torch.arange(12.0)[None])
    ensemble.linear.bias.fill_(2.0)
    texts = TokenStates.from_lengths(states[mask], mask.sum(1))
    pooled = torch.cat([pool(texts, "mean", "rms"), pool(texts, "last", "rms")], dim=1)
    expected = 0.5 * mean + pooled @ torch.arange(12.0)[:, None] + 2
    torch.testing.assert_close(ensemble(states, mask), expected)
    states[~mask] = torch.nan  # what stands in the padding has no influence
    torch.testing.assert_close(ensemble(states, mask), expected)


def test_a_ridge_foretells_each_row_without_it():
    examples = linear_examples(40, n_outputs=2, noise=1.0)
    X, y = pool(examples.states, "mean", "rms"), examples.y.double().numpy()
    (coef, intercept, told), _ = fit_ridges(examples.states, "rms", y, np.ones(40))
    Z = StandardScaler().fit_transform(X.double().numpy())
    ridge = RidgeCV(PENALTIES, alpha_per_target=True).fit(Z, y)
    np.testing.assert_allclose(X.double().numpy() @ coef.T + intercept, ridge.predict(Z))
    for row in (0, 17, 39):
        others = np.arange(40) != row
        for j in range(2):
            one = RidgeCV([ridge.alpha_[j]]).fit(Z[others], y[others, j])
            expected = one.predict(Z[[row]])[0] - y[others, j].mean()
            np.testing.assert_allclose(told[row, j], expected, atol=1e-6)


def test_a_weight_of_two_is_a_row_given_twice():
    random = np.random.RandomState(0)
    told, y = random.randn(3, 50), random.randn(50)
    weight = random.randint(1, 3, 50).astype(float)
    rows = np.repeat(np.arange(50), weight.astype(int))
    again = stack(told[:, rows], y[rows], np.ones(len(rows)), PRIOR)
    np.testing.assert_allclose(stack(told, y, weight, PRIOR), again)


def test_what_foretells_nothing_has_little_weight_and_not_none():
    random = np.random.RandomState(0)
    y = random.randn(2000)
    told = [random.randn(2000), y + 0.3 * random.randn(2000), random.randn(2000)]
    share = stack(told, y, np.ones(2000), PRIOR)
    assert share[1] > 0.85
    assert share[[0, 2]].max() < 0.1
    share = stack(random.randn(3, 2000) - y, y, np.ones(2000), PRIOR)  # all of them mislead
    assert (share >= 0).all()
    assert share.sum() < 0.1
    share = stack(np.zeros((3, 2000)), y, np.ones(2000), PRIOR)  # or say nothing
    assert (share == 0).all()


def test_what_is_shrunk_to_nothing_counts_for_what_it_tells():
    random = np.random.RandomState(0)
    y = random.randn(100)
    told = [0.6 * y + random.randn(100), 1e-6 * (y + random.randn(100)), np.zeros(100)]
    share = stack(told, y, np.ones(100), PRIOR)
    sizes = share[:2] * np.std(told[:2], axis=1)
    assert 0.5 < sizes[1] / sizes[0] < 2
    assert share[2] == 0


def test_few_held_out_rows_weigh_nothing():
    examples = linear_examples(40)
    ensemble, _ = fit(examples, [np.arange(5)], max_epochs=1)
    assert ensemble.linear is None
    ensemble, (training,) = fit(examples, [np.arange(0)], max_epochs=1)
    assert ensemble.linear is None
    assert "validation_loss" not in training.history[0]


def test_a_ridge_that_tells_little_is_not_taken_for_one_that_misleads():
    """A prediction that is little but the mean of the others is low where the target is high."""
    shares = []
    for seed in range(10):
        examples = linear_examples(60, noise=5.0, seed=seed)
        y = examples.y.double().numpy()
        ridges = fit_ridges(examples.states, "rms", y, np.ones(60))
        told = [ridge.oof_predictions[:, 0] for ridge in ridges]
        shares.append(stack(told, y[:, 0], np.ones(60), [0.5, 0.5]).sum())
    assert np.mean(shares) > 0.5


def test_equal_texts_are_one_to_the_ridges():
    """Otherwise a row would be foretold from its own copy."""
    examples = linear_examples(40, noise=30.0)  # nothing to learn
    twice = np.tile(np.arange(40), 2)
    folds = [np.flatnonzero(twice % 4 == k) for k in range(4)]
    ensemble, _ = fit(examples[twice], folds, text=twice)
    once, _ = fit(examples, [np.flatnonzero(np.arange(40) % 4 == k) for k in range(4)])
    assert ensemble.linear.weight.norm() < 2 * once.linear.weight.norm()
    merged = examples[twice].merged(twice)
    torch.testing.assert_close(merged.y, examples.y)
    assert (merged.weight == 2).all()
    torch.testing.assert_close(list(merged.states), list(examples.states))

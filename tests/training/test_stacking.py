"""Heads and ridges: what is held out, how they are weighted, what they predict."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler

from sklearn_relish.head.ensemble import RelishEnsemble
from sklearn_relish.head.head import RelishHead
from sklearn_relish.head.losses import HuberLoss
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training import stacking
from sklearn_relish.training.inference import pool_states, predict_states
from sklearn_relish.training.stacking import (
    PENALTIES,
    combine,
    fit_ensemble,
    fit_linear_path,
    fit_ridges,
    stack,
    with_ridges,
)
from sklearn_relish.training.trainer import Examples, Training, new_head

SIZES = {"input_size": 6, "latent_size": 8, "n_heads": 2}
TRAINING = {
    "loss_fn": HuberLoss(),
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
    """Texts whose target is a linear function of their mean state, plus noise."""
    random = np.random.RandomState(seed)
    lengths = torch.from_numpy(random.randint(1, 9, n_texts))
    values = torch.from_numpy(random.randn(int(lengths.sum()), 6)).float()
    states = TokenStates.from_lengths(values, lengths)
    weights = np.random.RandomState(99).randn(6, n_outputs)
    y = pool_states(states, "mean", "rms").numpy() @ weights
    y = y + noise * random.randn(*y.shape)
    return Examples.of(states, (y - y.mean(0)) / y.std(0), np.ones(n_texts))


def fit(examples, held_out, **changes):
    settings = {"linear_path": True, "random": np.random.RandomState(0), **TRAINING}
    sizes = SIZES | changes.pop("sizes", {}) | {"n_outputs": examples.y.shape[1]}
    settings["make_head"] = lambda number, seed: new_head(seed, **sizes)
    groups = changes.pop("groups", np.arange(len(examples.states)))
    return fit_ensemble(examples, groups, held_out, **settings | changes)[:2]


@pytest.mark.parametrize("n_outputs", [1, 2])
def test_a_linear_target_is_learned_by_the_linear_path(n_outputs):
    examples, fresh = linear_examples(300, n_outputs), linear_examples(300, n_outputs, seed=1)
    folds = np.array_split(np.random.RandomState(0).permutation(300), 3)
    ensemble, trainings = fit(examples, folds, max_epochs=1)
    assert len(ensemble.heads) == len(trainings) == 3
    predictions = predict_states(ensemble, fresh.states, torch.device("cpu"))
    alone, _ = fit(examples, folds, max_epochs=1, linear_path=False)
    alone = predict_states(alone, fresh.states, torch.device("cpu"))
    for j in range(n_outputs):
        y = fresh.y[:, j].numpy()
        assert np.corrcoef(predictions[:, j], y)[0, 1] > 0.95
        assert np.corrcoef(predictions[:, j], y)[0, 1] > np.corrcoef(alone[:, j], y)[0, 1]


def test_predictions_have_the_mean_of_a_skewed_target():
    """Huber's loss alone predicts less, towards the median."""
    examples, fresh = linear_examples(2000), linear_examples(2000, seed=1)
    for some, seed in ((examples, 0), (fresh, 1)):
        noise = np.random.RandomState(seed).gamma(0.5, 2.0, size=some.y.shape)  # its mean is 1
        some.y[:] = 0.5 * some.y + torch.from_numpy(noise - 1.0)
    folds = np.array_split(np.random.RandomState(0).permutation(2000), 3)
    for linear_path, lowest, highest in ((False, -0.5, -0.15), (True, -0.05, 0.05)):
        ensemble, _ = fit(examples, folds, linear_path=linear_path)
        predictions = predict_states(ensemble, fresh.states, torch.device("cpu"))
        assert lowest < predictions.mean() - fresh.y.numpy().mean() < highest


def test_a_prediction_is_the_weighted_mean_of_the_heads_plus_the_linear_path():
    torch.manual_seed(0)
    heads = [RelishHead(**SIZES) for _ in range(3)]
    states = torch.randn(4, 5, 6)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3], [2]])
    ensemble = RelishEnsemble(heads, linear_path=True)
    mean = sum(head(states, mask) for head in heads) / 3
    torch.testing.assert_close(ensemble(states, mask), mean)

    ensemble.head_weight.fill_(0.5)
    ensemble.linear.weight.copy_(torch.arange(18.0)[None])
    ensemble.linear.bias.fill_(2.0)
    texts = TokenStates.from_lengths(states[mask], mask.sum(1))
    pooled = torch.cat([pool_states(texts, name, "rms") for name in ("mean", "last", "std")], dim=1)
    expected = 0.5 * mean + pooled @ torch.arange(18.0)[:, None] + 2
    torch.testing.assert_close(ensemble(states, mask), expected)
    states[~mask] = 0
    torch.testing.assert_close(ensemble.staged(states, mask)[-1], expected)
    states[~mask] = torch.nan  # the padding has no influence
    torch.testing.assert_close(ensemble(states, mask), expected)


def test_a_ridge_predicts_each_row_without_it():
    examples = linear_examples(40, n_outputs=2, noise=1.0)
    X, y = pool_states(examples.states, "mean", "rms"), examples.y.double().numpy()
    coef, intercept, predicted, means = fit_ridges(examples.states, "rms", y, np.ones(40))["mean"]
    Z = StandardScaler().fit_transform(X.double().numpy())
    ridge = RidgeCV(PENALTIES, alpha_per_target=True).fit(Z, y)
    np.testing.assert_allclose(X.double().numpy() @ coef.T + intercept, ridge.predict(Z))
    for row in (0, 17, 39):
        rest = np.arange(40) != row
        for j in range(2):
            one = RidgeCV([ridge.alpha_[j]]).fit(Z[rest], y[rest, j])
            np.testing.assert_allclose(means[row, j], y[rest, j].mean(), atol=1e-12)
            expected = one.predict(Z[[row]])[0] - y[rest, j].mean()
            np.testing.assert_allclose(predicted[row, j], expected, atol=1e-6)


def test_a_weight_of_two_is_the_same_as_a_row_given_twice():
    random = np.random.RandomState(0)
    predictions, y = random.randn(50, 3), random.randn(50)
    weight = random.randint(1, 3, 50).astype(float)
    rows = np.repeat(np.arange(50), weight.astype(int))
    again = stack(predictions[rows], y[rows], np.ones(len(rows)), PRIOR)
    np.testing.assert_allclose(stack(predictions, y, weight, PRIOR), again)


def test_predictions_of_no_use_have_little_weight():
    random = np.random.RandomState(0)
    y, equal = random.randn(2000), np.ones(2000)
    useful = y + 0.3 * random.randn(2000)
    predictions = np.column_stack([random.randn(2000), useful, random.randn(2000)])
    weights = stack(predictions, y, equal, PRIOR)
    assert weights[1] > 0.85
    assert weights[[0, 2]].max() < 0.1
    misleading = random.randn(2000, 3) - y[:, None]
    weights = stack(misleading, y, equal, PRIOR)
    assert (weights >= 0).all()
    assert weights.sum() < 0.1
    weights = stack(np.zeros((2000, 3)), y, equal, PRIOR)
    assert (weights == 0).all()


def test_predictions_that_are_shrunk_are_weighted_by_their_correlation():
    random = np.random.RandomState(0)
    y = random.randn(100)
    first, shrunk = 0.6 * y + random.randn(100), 1e-6 * (y + random.randn(100))
    predictions = np.column_stack([first, shrunk, np.zeros(100)])
    weights = stack(predictions, y, np.ones(100), PRIOR)
    sizes = weights[:2] * np.std(predictions[:, :2], axis=0)
    assert 0.5 < sizes[1] / sizes[0] < 2
    assert weights[2] == 0


def test_no_weight_is_negative_though_all_predictions_mislead():
    y = np.random.RandomState(0).randn(20)
    weights = stack(np.column_stack([-y] * 3), y, np.ones(20), PRIOR)
    assert (weights >= 0).all()
    assert weights.sum() > 0


def test_out_of_fold_predictions_are_the_mean_of_the_heads_that_did_not_see_the_row():
    examples = linear_examples(40)
    held_out = [np.arange(20), np.arange(10, 30)]
    groups, random = np.arange(40), np.random.RandomState(0)
    settings = TRAINING | {"linear_path": False, "random": random, "max_epochs": 1}
    settings["make_head"] = lambda number, seed: new_head(seed, **SIZES)
    _, trainings, found, _ = fit_ensemble(examples, groups, held_out, **settings)
    first, second = (training.oof_predictions for training in trainings)
    np.testing.assert_array_equal(found[:10], first[:10])
    np.testing.assert_array_equal(found[10:20], (first[10:] + second[:10]) / 2)
    np.testing.assert_array_equal(found[20:30], second[10:])
    assert np.isnan(found[30:]).all()


def test_there_is_no_linear_path_with_few_held_out_rows():
    examples = linear_examples(40)
    with pytest.warns(UserWarning, match=r"linear_path=True has no effect.*, and there are 5\."):
        ensemble, _ = fit(examples, [np.arange(5)], max_epochs=1)
    assert ensemble.linear is None
    ensemble, (training,) = fit(examples, [np.arange(0)], max_epochs=1, linear_path="auto")
    assert ensemble.linear is None
    assert "validation_loss" not in training.history[0]


def test_a_ridge_that_predicts_little_more_than_the_mean_keeps_its_weight():
    """The mean of the other rows' targets is low where the row's own target is high."""
    sums = []
    for seed in range(10):
        examples = linear_examples(60, noise=5.0, seed=seed)
        y = examples.y.double().numpy()
        ridges = fit_ridges(examples.states, "rms", y, np.ones(60))
        predictions = np.column_stack([r.oof_predictions[:, 0] for r in ridges.values()])
        sums.append(stack(predictions, y[:, 0], np.ones(60), [1 / 3] * 3).sum())
    assert np.mean(sums) > 0.5


def test_the_ridges_take_equal_texts_as_one():
    """Otherwise a row would be predicted from its own copy."""
    examples = linear_examples(40, noise=30.0)  # nothing to learn
    twice = np.tile(np.arange(40), 2)
    folds = [np.flatnonzero(twice % 4 == k) for k in range(4)]
    ensemble, _ = fit(examples[twice], folds, groups=twice)
    once, _ = fit(examples, [np.flatnonzero(np.arange(40) % 4 == k) for k in range(4)])
    assert ensemble.linear.weight.norm() < 2 * once.linear.weight.norm()
    merged = examples[twice].merged(twice)
    torch.testing.assert_close(merged.y, examples.y)
    assert (merged.weight == 2).all()
    torch.testing.assert_close(list(merged.states), list(examples.states))


def test_rounding_errors_have_no_weight():
    """The out-of-fold predictions of a ridge on constant features follow the mean of the rest."""
    y, random = np.random.RandomState(0).randn(80), np.random.RandomState(1)
    predictions = np.column_stack([y + random.randn(80), -1e-16 * y, 1e-16 * random.randn(80)])
    weights = stack(predictions, y, np.ones(80), PRIOR)
    assert 0 < weights[0] < 2
    assert weights[1:].tolist() == [0.0, 0.0]


def test_a_constant_target_leaves_the_weight_to_the_heads():
    predictions = 1e-3 * np.random.RandomState(0).randn(20, 3)
    assert stack(predictions, np.zeros(20), np.ones(20), PRIOR).tolist() == [1.0, 0.0, 0.0]
    examples = linear_examples(40, n_outputs=2)
    examples.y[:, 1] = 0
    ensemble, _ = fit(examples, [np.arange(20), np.arange(20, 40)])
    assert ensemble.head_weight[1] == 1
    assert not ensemble.linear.weight[1].any()


def test_each_row_of_a_text_has_the_prediction_of_the_head_that_did_not_see_it():
    """With a splitter, the rows of a text can be in different folds."""
    examples, groups = linear_examples(60), np.repeat(np.arange(60), 2)
    examples, even, odd = examples[groups], np.arange(0, 120, 2), np.arange(1, 120, 2)
    folds = [(odd, even), (even, odd[:50])]
    heads = [new_head(seed, **SIZES) for seed in (0, 1)]
    predictions = [
        np.random.RandomState(k).randn(len(rows), 1) for k, (_, rows) in enumerate(folds)
    ]
    trainings = [Training([], 1, found) for found in predictions]
    random, loss_fn = np.random.RandomState(0), HuberLoss()
    settings = {"linear_path": True, "loss_fn": loss_fn, "random": random}
    ridges = fit_linear_path(examples, groups, folds, ["rms"], **settings)["rms"]
    found = combine(examples, groups, folds, heads, trainings, ridges, loss_fn=loss_fn)
    oof = found.oof_predictions[:, 0]
    assert np.isfinite(oof[even]).all()
    assert np.isfinite(oof[odd]).tolist() == [True] * 50 + [False] * 10
    # The ridges predict the same for both rows of a text.
    means = [examples.y[train].numpy().mean() for train, _ in folds]
    first, second = (p[:50, 0] - mean for p, mean in zip(predictions, means, strict=True))
    expected = found.ensemble.head_weight.item() * (second - first)
    np.testing.assert_allclose(oof[odd[:50]] - oof[even[:50]], expected, rtol=1e-5, atol=1e-6)


def test_large_weights_do_not_multiply_the_mean_of_the_texts_of_the_ridges(monkeypatch):
    """They are those of predictions near the mean of a sample, which differs from that of all."""
    monkeypatch.setattr(stacking, "MAX_RIDGE_TEXTS", 30)
    monkeypatch.setattr(stacking, "stack", lambda *_: np.array([0.0, 50.0, 0.0, 0.0]))
    examples = linear_examples(200, noise=1e3)
    ensemble, _ = fit(examples, [np.arange(100), np.arange(100, 200)], max_epochs=1)
    predictions = predict_states(ensemble, examples.states, device=torch.device("cpu"))
    assert abs(predictions.mean()) < 1


@pytest.fixture(scope="module")
def fold_with_ridges():
    """240 texts, a fold whose held-out rows are the last 40, and the ridges."""
    examples, groups = linear_examples(240), np.arange(240)
    fold = (np.arange(200), np.arange(200, 240))
    ridges = fit_linear_path(
        examples,
        groups,
        [fold],
        ["rms"],
        linear_path=True,
        loss_fn=HuberLoss(),
        random=np.random.RandomState(0),
    )
    return examples, groups, fold, ridges["rms"]


def test_a_head_is_scored_with_the_ridges(fold_with_ridges):
    examples, groups, fold, ridges = fold_with_ridges
    y, noise = examples.y[fold[1]].numpy(), np.random.RandomState(1).randn(40, 1)
    assert r2_score(y, noise) < 0
    of_noise = r2_score(y, with_ridges(examples, groups, fold, noise, ridges))
    assert r2_score(y, with_ridges(examples, groups, fold, y, ridges)) > of_noise > 0.5


def test_only_texts_of_the_ridges_are_scored_with_them(fold_with_ridges):
    examples, groups, fold, ridges = fold_with_ridges
    noise = np.random.RandomState(1).randn(40, 1)

    def known(n_texts):
        fits = {
            name: fit._replace(oof_predictions=fit.oof_predictions[:n_texts])
            for name, fit in ridges.of_views[0].items()
        }
        some = ridges._replace(texts=ridges.texts[:n_texts], of_views=[fits])
        return with_ridges(examples, groups, fold, noise, some)

    assert np.isfinite(known(225)[:, 0]).tolist() == [True] * 25 + [False] * 15
    np.testing.assert_array_equal(known(200), noise)

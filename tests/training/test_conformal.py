"""Conformal intervals have the coverage that was asked for, whatever the noise."""

import numpy as np
import pytest

from sklearn_relish.head.losses import GammaLoss, HuberLoss, PoissonLoss, QuantileLoss
from sklearn_relish.training.conformal import Conformal


def noisy(loss_fn, n, seed):
    """Out-of-fold predictions, and targets with noise around them."""
    random = np.random.RandomState(seed)
    truth = 1 + random.exponential(size=(n, 2))
    y = truth * (1 + 0.3 * random.standard_t(4, size=(n, 2)))
    ends = [truth * (1 + step) for step in (-0.1, 0.0, 0.2)]
    oof_predictions = np.stack(ends, axis=2).reshape(n, 6) if loss_fn.quantiles else truth
    return oof_predictions, np.abs(y)


@pytest.mark.parametrize(
    "loss_fn",
    [
        HuberLoss(),
        PoissonLoss(),
        GammaLoss(),
        QuantileLoss((0.1, 0.5, 0.9)),
    ],
    ids=lambda loss_fn: loss_fn.name,
)
@pytest.mark.parametrize("coverage", [0.5, 0.9])
def test_intervals_have_the_coverage_asked_for(loss_fn, coverage):
    conformal = Conformal.of(loss_fn, *noisy(loss_fn, 4000, seed=0), np.ones(4000))
    oof_predictions, y = noisy(loss_fn, 4000, seed=1)
    interval = conformal.interval(oof_predictions, coverage)
    inside = (interval[:, :, 0] <= y) & (y <= interval[:, :, 1])
    assert inside.mean(axis=0) == pytest.approx(coverage, abs=0.025)
    assert (interval[:, :, 0] <= interval[:, :, 1]).all()
    if loss_fn.log_link:
        assert (interval >= 0).all()


def test_a_weight_of_two_is_the_same_as_a_row_given_twice():
    loss_fn = HuberLoss()
    oof_predictions, y = noisy(loss_fn, 100, seed=0)
    weight = np.random.RandomState(0).randint(1, 3, 100)
    rows = np.repeat(np.arange(100), weight)
    twice = Conformal.of(loss_fn, oof_predictions[rows], y[rows], np.ones(len(rows)))
    once = Conformal.of(loss_fn, oof_predictions, y, weight.astype(float))
    np.testing.assert_allclose(
        once.interval(oof_predictions, 0.5), twice.interval(oof_predictions, 0.5), atol=0.05
    )


def test_rounded_sums_of_weights_do_not_refuse_a_coverage():
    """Weights with a mean of 1 can sum to a little less than the number of rows."""
    oof_predictions, y = noisy(HuberLoss(), 4, seed=0)
    weight = np.array([1.0, 1.0, 1.0, 1.0 - 4e-16])
    assert weight.sum() < 4
    conformal = Conformal.of(HuberLoss(), oof_predictions, y, weight)
    assert np.isfinite(conformal.interval(oof_predictions, 0.8)).all()


def test_a_coverage_with_too_few_rows_is_refused():
    loss_fn = HuberLoss()
    conformal = Conformal.of(loss_fn, *noisy(loss_fn, 19, seed=0), np.ones(19))
    conformal.interval(np.zeros((1, 2)), 0.95)  # 19 is just enough
    with pytest.raises(
        ValueError, match=r"coverage=0\.96 needs 24 held-out rows, and there were 19"
    ):
        conformal.interval(np.zeros((1, 2)), 0.96)


def constant(loss_fn, predictions, y, n=20, weight=1.0):
    """Held-out rows that are all alike."""
    shape = (n, 1)
    rows = np.tile(predictions, shape), np.full(shape, y), np.full(n, weight)
    return Conformal.of(loss_fn, *rows)


@pytest.mark.parametrize(
    ("loss_fn", "held_out", "y", "predictions", "interval"),
    [
        (HuberLoss(), [4.0], 6.0, [9.0], [7.0, 11.0]),
        (PoissonLoss(), [4.0], 8.0, [9.0], [3.0, 15.0]),  # errors grow with the square root
        (GammaLoss(), [4.0], 6.0, [8.0], [4.0, 12.0]),  # errors grow with the prediction
        (GammaLoss(), [4.0], 12.0, [1.0], [0.0, 3.0]),  # not below 0
        (QuantileLoss((0.1, 0.9)), [4.0, 6.0], 7.0, [1.0, 5.0], [0.0, 6.0]),
        (QuantileLoss((0.1, 0.9)), [0.0, 10.0], 5.0, [0.0, 2.0], [1.0, 1.0]),  # ends never cross
    ],
)
def test_the_interval_of_rows_that_are_all_alike(loss_fn, held_out, y, predictions, interval):
    found = constant(loss_fn, held_out, y).interval(np.array([predictions]), 0.9)
    np.testing.assert_allclose(found, [[interval]], atol=1e-12)


def test_only_the_ratios_of_weights_have_an_influence():
    with pytest.raises(ValueError, match="needs 24 held-out rows"):
        constant(HuberLoss(), [0.0], 1.0, weight=7.0).interval(np.zeros((1, 1)), 0.96)

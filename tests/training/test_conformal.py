"""Conformal intervals hold what they say, whatever the noise."""

import numpy as np
import pytest

from sklearn_relish.head.losses import Loss
from sklearn_relish.training.conformal import Conformal


def noisy(loss_fn, n, seed):
    """What was oof_predictions, and targets around it."""
    random = np.random.RandomState(seed)
    truth = 1 + random.exponential(size=(n, 2))
    y = truth * (1 + 0.3 * random.standard_t(4, size=(n, 2)))
    ends = [truth * (1 + step) for step in (-0.1, 0.0, 0.2)]
    oof_predictions = np.stack(ends, axis=2).reshape(n, 6) if loss_fn.quantiles else truth
    return oof_predictions, np.abs(y)


@pytest.mark.parametrize(
    "loss_fn",
    [
        Loss("huber"),
        Loss("poisson"),
        Loss("gamma"),
        Loss("quantile", (0.1, 0.5, 0.9)),
    ],
    ids=lambda loss_fn: loss_fn.name,
)
@pytest.mark.parametrize("coverage", [0.5, 0.9])
def test_coverage_is_what_it_says(loss_fn, coverage):
    conformal = Conformal.of(loss_fn, *noisy(loss_fn, 4000, seed=0), np.ones(4000))
    oof_predictions, y = noisy(loss_fn, 4000, seed=1)
    interval = conformal.interval(oof_predictions, coverage)
    inside = (interval[:, :, 0] <= y) & (y <= interval[:, :, 1])
    assert inside.mean(axis=0) == pytest.approx(coverage, abs=0.025)
    assert (interval[:, :, 0] <= interval[:, :, 1]).all()
    if loss_fn.log_link:
        assert (interval >= 0).all()


def test_a_weight_of_two_is_a_row_given_twice():
    loss_fn = Loss("huber")
    oof_predictions, y = noisy(loss_fn, 100, seed=0)
    weight = np.random.RandomState(0).randint(1, 3, 100)
    rows = np.repeat(np.arange(100), weight)
    twice = Conformal.of(loss_fn, oof_predictions[rows], y[rows], np.ones(len(rows)))
    once = Conformal.of(loss_fn, oof_predictions, y, weight.astype(float))
    np.testing.assert_allclose(
        once.interval(oof_predictions, 0.5), twice.interval(oof_predictions, 0.5), atol=0.05
    )


def test_too_few_rows_for_a_coverage():
    loss_fn = Loss("huber")
    conformal = Conformal.of(loss_fn, *noisy(loss_fn, 19, seed=0), np.ones(19))
    conformal.interval(np.zeros((1, 2)), 0.95)  # 19 is just enough
    with pytest.raises(
        ValueError, match=r"coverage=0\.96 needs 24 held-out rows, and there were 19"
    ):
        conformal.interval(np.zeros((1, 2)), 0.96)

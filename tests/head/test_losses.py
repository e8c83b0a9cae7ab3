"""The losses, compared with those of scikit-learn, and what each of them has to define."""

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_gamma_deviance, mean_pinball_loss, mean_poisson_deviance

from sklearn_relish.head.losses import LOSSES, GammaLoss, PoissonLoss, QuantileLoss, make_loss

RAW = torch.from_numpy(np.random.RandomState(0).randn(50, 2))
Y = torch.from_numpy(np.random.RandomState(1).exponential(size=(50, 2)))


def make_each(name):
    return make_loss(name, (0.1, 0.5, 0.9) if name == "quantile" else ())


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_defines_what_training_and_intervals_need(name):
    loss_fn = make_each(name)
    assert loss_fn.name == name
    assert loss_fn == make_each(name)
    raw = torch.from_numpy(np.random.RandomState(2).randn(50, 2 * loss_fn.n_predictions))
    raw.requires_grad_()
    loss = loss_fn.loss(raw, Y)
    assert loss.shape == Y.shape
    loss.sum().backward()
    assert raw.grad.isfinite().all()
    predictions = loss_fn.inverse_link(raw.detach())
    assert predictions.shape == raw.shape
    point = loss_fn.point_prediction(predictions)
    assert point.shape == Y.shape
    np.testing.assert_array_equal(loss_fn.point_prediction(predictions.numpy()), point.numpy())
    scale = loss_fn.interval_scale(point.numpy())
    assert scale.shape == Y.shape
    assert (scale > 0).all()
    loss_fn.check_targets(Y.numpy())


@pytest.mark.parametrize(
    ("loss_fn", "y", "message"),
    [
        (PoissonLoss(), [0.0, -1.0, 2.0, -3.0], "'poisson' is for targets of 0 or more: .* rows 1"),
        (GammaLoss(), [[1.0, 1.0], [1.0, 0.0]], "'gamma' is for targets above 0: y is not in row"),
    ],
)
def test_targets_outside_the_valid_range_are_refused_by_their_row(loss_fn, y, message):
    with pytest.raises(ValueError, match=message):
        loss_fn.check_targets(np.array(y))


@pytest.mark.parametrize(
    ("name", "quantiles", "message"),
    [
        ("mse", (), "loss must be one of 'huber', .*'gamma', got 'mse'"),
        ("huber", (0.5,), "'huber' takes no quantiles"),
        ("quantile", (), "above 0 and below 1, in rising order"),
        ("quantile", (0.5, 0.5), "in rising order, got"),
        ("quantile", (0.5, 1.0), "below 1"),
        ("quantile", (0.0, 0.5), "above 0"),
    ],
)
def test_an_unknown_loss_and_wrong_quantiles_are_refused(name, quantiles, message):
    with pytest.raises(ValueError, match=message):
        make_loss(name, quantiles)


@pytest.mark.parametrize(
    ("loss_fn", "deviance"),
    [(PoissonLoss(), mean_poisson_deviance), (GammaLoss(), mean_gamma_deviance)],
)
def test_log_link_losses_are_half_the_deviances_up_to_a_constant(loss_fn, deviance):
    other = RAW + 0.3
    ours = loss_fn.loss(RAW, Y).mean() - loss_fn.loss(other, Y).mean()
    theirs = [
        deviance(Y.numpy().ravel(), loss_fn.inverse_link(raw).numpy().ravel()) / 2
        for raw in (RAW, other)
    ]
    assert float(ours) == pytest.approx(theirs[0] - theirs[1])


def test_the_quantile_loss_is_the_mean_of_the_pinball_losses():
    loss_fn = QuantileLoss((0.1, 0.5, 0.9))
    raw = torch.from_numpy(np.random.RandomState(2).randn(50, 6))
    predictions = loss_fn.inverse_link(raw).view(50, 2, 3)
    expected = np.mean(
        [
            mean_pinball_loss(Y.numpy(), predictions[:, :, k].numpy(), alpha=quantile)
            for k, quantile in enumerate(loss_fn.quantiles)
        ]
    )
    assert float(loss_fn.loss(raw, Y).mean()) == pytest.approx(expected)


def test_quantiles_never_cross():
    loss_fn = QuantileLoss(tuple(np.linspace(0.1, 0.9, 9)))
    raw = 100 * torch.from_numpy(np.random.RandomState(3).randn(1000, 18))
    predictions = loss_fn.inverse_link(raw).view(1000, 2, 9)
    assert (predictions.diff(dim=2) >= 0).all()
    point = loss_fn.point_prediction(predictions.flatten(1))
    torch.testing.assert_close(point, predictions[:, :, 4])


def test_the_point_prediction_of_two_equally_near_quantiles_is_their_mean():
    point = QuantileLoss((0.05, 0.3, 0.7)).point_prediction(np.array([[1.0, 2.0, 5.0]]))
    assert point.tolist() == [[3.5]]


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "quantile"])
def test_the_minimum_for_a_constant_prediction(name):
    loss_fn = make_loss(name)
    y = Y[:, :1]
    raw = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([raw], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss_fn.loss(raw.expand(50, 1), y).mean()
        value.backward()
        return value

    optimizer.step(closure)
    found = float(loss_fn.inverse_link(raw.detach()))
    low, high = float(y.sort(dim=0)[0][24]), float(y.sort(dim=0)[0][25])
    if name == "absolute_error":
        assert low - 0.1 <= found <= high + 0.1
    elif name == "huber":
        assert high < found < float(y.mean())  # between the median and the mean
    else:
        assert found == pytest.approx(float(y.mean()), rel=1e-4)

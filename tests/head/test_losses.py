"""Losses and what raw answers mean under them, beside scikit-learn's own."""

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_gamma_deviance, mean_pinball_loss, mean_poisson_deviance

from sklearn_relish.head.losses import LOSSES, Loss

RAW = torch.from_numpy(np.random.RandomState(0).randn(50, 2))
Y = torch.from_numpy(np.random.RandomState(1).exponential(size=(50, 2)))


@pytest.mark.parametrize(
    ("loss", "deviance"), [("poisson", mean_poisson_deviance), ("gamma", mean_gamma_deviance)]
)
def test_log_link_losses_are_half_the_deviances_up_to_a_constant(loss, deviance):
    loss_fn = Loss(loss)
    other = RAW + 0.3
    ours = loss_fn.losses(RAW, Y).mean() - loss_fn.losses(other, Y).mean()
    theirs = [
        deviance(Y.numpy().ravel(), loss_fn.inverse_link(raw).numpy().ravel()) / 2
        for raw in (RAW, other)
    ]
    assert float(ours) == pytest.approx(theirs[0] - theirs[1])


def test_the_quantile_loss_is_the_pinball_loss_of_each():
    loss_fn = Loss("quantile", (0.1, 0.5, 0.9))
    raw = torch.from_numpy(np.random.RandomState(2).randn(50, 6))
    responses = loss_fn.inverse_link(raw).view(50, 2, 3)
    expected = np.mean(
        [
            mean_pinball_loss(Y.numpy(), responses[:, :, k].numpy(), alpha=quantile)
            for k, quantile in enumerate(loss_fn.quantiles)
        ]
    )
    assert float(loss_fn.losses(raw, Y).mean()) == pytest.approx(expected)


def test_quantiles_never_cross():
    loss_fn = Loss("quantile", tuple(np.linspace(0.1, 0.9, 9)))
    raw = 100 * torch.from_numpy(np.random.RandomState(3).randn(1000, 18))
    responses = loss_fn.inverse_link(raw).view(1000, 2, 9)
    assert (responses.diff(dim=2) >= 0).all()
    torch.testing.assert_close(loss_fn.point_prediction(responses.flatten(1)), responses[:, :, 4])


@pytest.mark.parametrize("loss", sorted(LOSSES - {"quantile"}))
def test_the_best_constant_is_what_the_loss_asks_for(loss):
    loss_fn = Loss(loss)
    y = Y[:, :1]
    raw = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([raw], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss_fn.losses(raw.expand(50, 1), y).mean()
        value.backward()
        return value

    optimizer.step(closure)
    found = float(loss_fn.inverse_link(raw.detach()))
    low, high = float(y.sort(dim=0)[0][24]), float(y.sort(dim=0)[0][25])
    if loss == "absolute_error":
        assert low - 0.1 <= found <= high + 0.1
    elif loss == "huber":
        assert high < found < float(y.mean())  # between the median and the mean
    else:
        assert found == pytest.approx(float(y.mean()), rel=1e-4)

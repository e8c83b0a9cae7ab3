import pytest
import torch

from sklearn_relish.training.recording import Recorded


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_function_is_the_function():
    weight = torch.randn(4, 4, device="cuda", requires_grad=True)

    def gradient(x):
        if weight.grad is not None:
            weight.grad.zero_()
        (x @ weight).square().sum().backward()
        return (x @ weight).detach().square().sum()

    recorded = Recorded(gradient, torch.device("cuda"))
    for n in (3, 5, 3, 3, 5):
        x = torch.randn(n, 4, device="cuda")
        expected, grad = gradient(x).clone(), weight.grad.clone()
        torch.testing.assert_close(recorded(x), expected)
        torch.testing.assert_close(weight.grad, grad)

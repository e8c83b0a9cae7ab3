"""Poolings of padded batches, and of texts alone."""

import pytest
import torch
from torch.nn.functional import rms_norm

from sklearn_relish.head.ensemble import RelishEnsemble
from sklearn_relish.head.head import RMS_EPSILON, RelishHead, rms_scale
from sklearn_relish.head.pooling import POOLINGS, pool
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training.inference import pool_states

SIZE = 24


def ragged(dtype, n_texts=40):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 12, (n_texts,), generator=generator)
    values = 3 * torch.randn(int(lengths.sum()), SIZE, generator=generator)
    return TokenStates.from_lengths(values.to(dtype), lengths)


@pytest.mark.parametrize("state_norm", ["rms", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_poolings_of_the_normalized_states(dtype, state_norm):
    states = ragged(dtype)
    mean, last, std = (
        pool_states(states, pooling, state_norm) for pooling in ("mean", "last", "std")
    )
    for row, text in enumerate(states):
        text = text.float()
        if state_norm == "rms":
            text = rms_norm(text, (SIZE,), eps=RMS_EPSILON)
        torch.testing.assert_close(mean[row], text.mean(dim=0))
        torch.testing.assert_close(last[row], text[-1])
        torch.testing.assert_close(std[row], text.std(dim=0, correction=0))


@pytest.mark.parametrize("state_norm", ["rms", None])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_padded_batch_is_pooled_like_each_text_alone(pooling, state_norm):
    states = ragged(torch.float64)
    pooled = pool(*states.batch(torch.arange(40)), pooling, state_norm)
    assert pooled.dtype == torch.float64
    for row, text in enumerate(states):
        alone = pool(text[None], torch.ones(1, len(text), dtype=torch.bool), pooling, state_norm)
        torch.testing.assert_close(pooled[row], alone[0], rtol=1e-13, atol=1e-13)


def test_states_in_bfloat16_are_pooled_in_float32():
    states, mask = ragged(torch.bfloat16).batch(torch.arange(40))
    assert pool(states, mask, "mean", "rms").dtype == torch.float32


def test_the_scale_of_a_state_is_that_of_rms_norm():
    states = torch.randn(3, 5, SIZE, generator=torch.Generator().manual_seed(0))
    scaled = states * rms_scale(states)[:, :, None]
    torch.testing.assert_close(scaled, rms_norm(states, (SIZE,), eps=RMS_EPSILON))


def test_a_new_pooling_does_not_change_the_linear_path(monkeypatch):
    monkeypatch.setitem(POOLINGS, "max", lambda states, mask, state_norm: states.amax(dim=1))
    states, mask = ragged(torch.float32).batch(torch.arange(40))
    assert torch.equal(pool(states, mask, "max", None), states.amax(dim=1))
    ensemble = RelishEnsemble([RelishHead(SIZE, latent_size=8, n_heads=2)], linear_path=True)
    assert ensemble.linear.in_features == 3 * SIZE
    assert ensemble(states, mask).shape == (40, 1)

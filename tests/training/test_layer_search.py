"""The choice of a layer."""

import numpy as np
import pytest
import torch

from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training.layer_search import SHARES, choose_layer, sample_texts
from sklearn_relish.training.trainer import Examples


def layers(n_texts, noises, n_outputs=1, seed=0):
    """States of one token at several layers: the target with noise, and features of noise only."""
    random = np.random.RandomState(seed)
    y = random.randn(n_texts, n_outputs)
    states = {}
    for layer, noise in noises.items():
        values = np.hstack([y + noise * random.randn(*y.shape), random.randn(n_texts, 3)])
        lengths = torch.ones(n_texts, dtype=torch.int64)
        states[layer] = TokenStates.from_lengths(torch.from_numpy(values).float(), lengths)
    return states, y


def choose(states, y, weight):
    examples = {layer: Examples.of(at_layer, y, weight) for layer, at_layer in states.items()}
    return choose_layer(examples, None)


@pytest.mark.parametrize("n_outputs", [1, 2])
def test_the_layer_with_the_best_ridges_is_taken(n_outputs):
    states, y = layers(400, {5: 1.0, 3: 2.0, 7: 0.3}, n_outputs)
    layer, scores = choose(states, y, np.ones(400))
    assert layer == 7
    assert list(scores) == [3, 5, 7]
    assert scores[3] < scores[5] < scores[7] < 1


def test_the_first_is_taken_unless_another_is_clearly_better():
    chosen = []
    for seed in range(20):
        states, y = layers(60, {5: 1.0, 3: 1.0}, seed=seed)
        chosen.append(choose(states, y, np.ones(60))[0])
    assert chosen.count(5) >= 14


def test_a_row_without_weight_has_no_influence():
    states, y = layers(200, {5: 1.0, 3: 0.3})
    weight = np.r_[np.ones(150), np.full(50, 1e-9)]
    spoilt = y.copy()
    spoilt[150:] = 100 * np.random.RandomState(0).randn(50, 1)
    assert choose(states, spoilt, weight)[0] == 3


def test_a_constant_target_takes_the_first():
    states, y = layers(50, {5: 1.0, 3: 0.3})
    layer, scores = choose(states, np.zeros_like(y), np.ones(50))
    assert layer == 5
    assert set(scores.values()) == {0.0}


def test_a_sample_costs_a_seventh_more_of_reading_at_most():
    for n_layers in (12, 18, 24, 30, 32, 48):
        layers = [round(fraction * n_layers) for fraction in SHARES]
        for n_texts in (25, 100, 3_000, 100_000):
            sample = sample_texts(n_texts, np.random.RandomState(0))
            assert 10 <= len(np.unique(sample)) == len(sample) <= 1_000
            assert len(sample) * (max(layers) - min(layers)) / min(layers) <= n_texts / 7
    assert len(sample_texts(24, np.random.RandomState(0))) == 0

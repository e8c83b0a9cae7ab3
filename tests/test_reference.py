"""Results of ten configurations stay what they were, within what other CPUs and versions change.

``python tests/test_reference.py`` writes the reference file again, after a change that is meant to
change results.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_model

from sklearn_relish import RelishRegressor, StateStore

FILE = Path(__file__).with_name("reference.json")
WORDS = ("red", "old", "slow", "kind", "dark", "tall", "warm", "rare", "loud", "calm", "soft")
CONFIGURATIONS = {
    "huber": {},
    "squared error, layer auto": {"loss": "squared_error", "layer": "auto"},
    "absolute error": {"loss": "absolute_error", "n_iter_no_change": 2},
    "poisson": {"loss": "poisson"},
    "gamma": {"loss": "gamma"},
    "quantiles": {"loss": "quantile", "quantile": [0.1, 0.5, 0.9]},
    "two outputs": {"share_weights": True, "deep_supervision": False, "state_norm": None},
    "warm start": {"warm_start": True},
    "partial fit": {"n_estimators": 2},
    "windows": {"long_text": "window", "max_length": 16},
    "8 bits": {"memory": StateStore(bits=8)},
}


def texts(n_texts, max_words, seed):
    random = np.random.RandomState(seed)
    return [" ".join(random.choice(WORDS, random.randint(1, max_words))) for _ in range(n_texts)]


def results(name):
    """Predictions, intervals, attention and history of a configuration, a few numbers of each."""
    X, new = texts(60, 8, seed=0), texts(5, 16, seed=1)
    y = np.array([len(text) + 5.0 * text.count("red") for text in X])
    y = np.column_stack([y, -y[::-1]]) if name == "two outputs" else y
    sizes = {"latent_size": 16, "n_heads": 2}
    training = {"learning_rate": 5e-4, "max_epochs": 3, "random_state": 0}
    regressor = RelishRegressor(
        tiny_model(),
        device="cpu",
        dtype="float32",
        **sizes,
        **training,
        **CONFIGURATIONS[name],
    )
    fit = regressor.partial_fit if name == "partial fit" else regressor.fit
    fit(X, y, sample_weight=np.linspace(1, 2, len(X)))
    if name in ("warm start", "partial fit"):
        fit(X, y)
    found = {
        "predictions": regressor.predict(new),
        "stages": np.stack(list(regressor.staged_predict(new[:2]))),
        "attention": regressor.attention(new[:1])[0].weights.mean(axis=(0, 2)),
        "train loss": [epoch["train_loss"] for epoch in regressor.history_],
    }
    if regressor._conformal is not None:
        found["interval"] = regressor.predict_interval(new[:2], coverage=0.8)
    return {key: np.asarray(value).ravel().tolist() for key, value in found.items()}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_results_are_those_of_the_reference_file(name):
    reference = json.loads(FILE.read_text(encoding="utf-8"))[name]
    found = results(name)
    assert found.keys() == reference.keys()
    for key, values in reference.items():
        size = np.abs(values).max()
        np.testing.assert_allclose(found[key], values, atol=2e-3 * size, rtol=0, err_msg=key)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    rounded = {
        name: {
            key: [float(f"{value:.5g}") for value in values]
            for key, values in results(name).items()
        }
        for name in CONFIGURATIONS
    }
    FILE.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")

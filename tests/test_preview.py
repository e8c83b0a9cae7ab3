"""The preview of a fit: what is counted is what the fit reads, and nothing changes."""

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_model

from sklearn_relish import FrozenLLM, RelishRegressor, StateStore
from sklearn_relish.preview import _duration
from sklearn_relish.states.store import open_store

TEXTS = [f"film {'x' * (i % 40)}" for i in range(100)]  # 40 different ones, more than once
MANY = [f"film {i} {'x' * (i % 40)}" for i in range(100)]  # more than the sample
SMALL = {"latent_size": 16, "n_heads": 2, "n_estimators": 2, "max_epochs": 2, "random_state": 0}


@pytest.mark.filterwarnings("ignore:.*were cut")
@pytest.mark.parametrize("texts", [TEXTS, MANY])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_length": 20},
        {"max_length": 20, "long_text": "window"},
        {"memory": StateStore(bits=8)},
        {"memory": StateStore(bits=4), "loss": "poisson", "early_stopping": False},
        {"layer": 1, "loss": "quantile", "quantile": [0.1, 0.9]},
    ],
)
def test_the_preview_counts_what_the_fit_reads(texts, changes):
    regressor = RelishRegressor(tiny_model(), **SMALL | changes)
    misses = open_store(regressor.memory).misses
    preview = regressor.preview(texts)
    assert open_store(regressor.memory).misses == misses
    assert not [name for name in vars(regressor) if name.endswith("_")]
    regressor.fit(texts, np.arange(100.0))
    distinct = list(dict.fromkeys(texts))
    states = regressor._states(distinct, regressor.layer_)
    assert preview.texts == texts
    assert preview.layer == regressor.layer_
    assert preview.n_distinct == len(distinct)
    assert preview.n_tokens == states.lengths.sum()
    assert preview.n_bytes == states.n_bytes
    full = np.array([len(text) for text in distinct])  # a token is a byte
    assert preview.longest == full.max()
    cut = regressor.long_text == "truncate"
    assert preview.n_cut == (np.count_nonzero(full > regressor.max_length) if cut else 0)
    assert 0 < preview.read_seconds < 1_000
    assert 0 <= preview.train_seconds < 1_000


def test_the_summary_and_the_prompt():
    frame = pd.DataFrame({"title": ["Alien", "Solaris"], "year": [1979, 1972]})
    regressor = RelishRegressor(FrozenLLM(tiny_model()), prompt="{title} ({year})", layer="auto")
    preview = regressor.preview(frame)
    assert preview.texts == ["Alien (1979)", "Solaris (1972)"]
    summary = str(preview)
    assert summary.startswith("2 rows, 2 different texts, read up to layer 2\n")
    assert "0 texts (0.0%) are cut" in summary
    assert summary.endswith("The first text:\nAlien (1979)")


def test_a_preview_checks_parameters_and_input():
    with pytest.raises(ValueError, match="'max_epochs' parameter"):
        RelishRegressor(tiny_model(), max_epochs=0).preview(TEXTS)
    with pytest.raises(ValueError, match="X has no rows"):
        RelishRegressor(tiny_model()).preview([])


def test_a_fitted_regressor_is_not_changed_by_a_preview():
    regressor = RelishRegressor(tiny_model(), **SMALL).fit(TEXTS, np.arange(100.0))
    predicted = regressor.predict(TEXTS)
    regressor.preview(pd.DataFrame({"other": ["a", "b"], "columns": ["c", "d"]}))
    np.testing.assert_array_equal(regressor.predict(TEXTS), predicted)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(3.4, "3 s"), (99.4, "99 s"), (150, "2 min"), (7_200, "2.0 h")]
)
def test_durations_are_rounded(seconds, shown):
    assert _duration(seconds) == shown

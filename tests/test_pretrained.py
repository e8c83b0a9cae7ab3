"""A fitted regressor in a folder: what it holds, what opens, what is refused."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny_model

from sklearn_relish import FrozenLLM, RelishRegressor
from sklearn_relish import pretrained as room

SMALL = {"latent_size": 16, "n_heads": 2, "max_epochs": 2, "n_estimators": 2, "random_state": 0}
FRAME = pd.DataFrame({"title": [f"film {i}" for i in range(40)], "year": range(1980, 2020)})
Y = np.arange(40.0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "quantile", "quantile": np.array([0.2, 0.5, 0.8]), "layer": "auto"},
        {"loss": "poisson", "share_weights": True, "early_stopping": False},
        {"prompt": "{title} of {year}", "n_iterations": np.int64(2), "long_text": "window"},
    ],
)
def test_what_is_opened_is_what_was_saved(tmp_path, changes):
    regressor = RelishRegressor(tiny_model(), **SMALL | changes).fit(FRAME, Y)
    regressor.save_pretrained(tmp_path / "kept")
    opened = RelishRegressor.from_pretrained(tmp_path / "kept")
    np.testing.assert_array_equal(opened.predict(FRAME), regressor.predict(FRAME))
    if regressor.early_stopping:
        intervals = [some.predict_interval(FRAME, 0.6) for some in (opened, regressor)]
        np.testing.assert_array_equal(*intervals)
    for name in ("layer_", "layer_scores_", "history_", "best_epoch_", "validation_score_"):
        assert getattr(opened, name) == getattr(regressor, name)
    assert list(opened.feature_names_in_) == ["title", "year"]
    with pytest.raises(ValueError, match="feature names"):
        opened.predict(FRAME.rename(columns={"year": "when"}))
    opened.set_params(warm_start=True).fit(FRAME, Y)  # and it goes on


def test_several_targets_and_a_shared_model(tmp_path):
    llm = FrozenLLM(
        tiny_model(), dtype=torch.float32, model_kwargs={"attn_implementation": "eager"}
    )
    texts = FRAME["title"].tolist()
    regressor = RelishRegressor(llm, **SMALL).fit(texts, np.stack([Y, -Y], axis=1))
    regressor.save_pretrained(tmp_path)
    opened = RelishRegressor.from_pretrained(str(tmp_path), memory=tmp_path / "states")
    assert (opened.dtype, opened.memory) == ("float32", tmp_path / "states")
    assert opened.model_kwargs == {"attn_implementation": "eager"}
    np.testing.assert_array_equal(opened.predict(texts), regressor.predict(texts))
    opened = RelishRegressor.from_pretrained(tmp_path, model=llm)
    np.testing.assert_array_equal(opened.predict(texts), regressor.predict(texts))


def test_the_card_has_the_figures_and_no_pickle_is_there(tmp_path):
    regressor = RelishRegressor(tiny_model(), **SMALL).fit(FRAME, Y)
    regressor.save_pretrained(tmp_path, metrics={"Pearson r on a test set": 0.75})
    card = (tmp_path / "README.md").read_text()
    assert "| Pearson r on a test set | 0.75 |" in card
    assert f"{regressor.validation_score_:.4g}" in card
    assert "2 RELISH heads" in card
    assert {path.name for path in tmp_path.iterdir()} == {room.CONFIG, room.WEIGHTS, room.CARD}


def test_a_secret_is_not_written(tmp_path):
    regressor = RelishRegressor(tiny_model(), model_kwargs={"token": "hf_secret"}, **SMALL)
    regressor.fit(FRAME, Y).save_pretrained(tmp_path)
    assert all(b"hf_secret" not in path.read_bytes() for path in tmp_path.iterdir())


def rewritten(folder, **changes):
    """The folder with other parts of its configuration."""
    config = json.loads((folder / "config.json").read_text())
    for part, values in changes.items():
        config[part] |= values
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "kwargs",
    [
        {"trust_remote_code": True},
        {"use_safetensors": False},
        {"attn_implementation": "someone/kernel", "allow_all_kernels": True},
        {"attn_implementation": "someone/kernel"},
    ],
)
def test_a_file_may_not_ask_to_run_foreign_code(tmp_path, kwargs):
    RelishRegressor(tiny_model(), **SMALL).fit(FRAME, Y).save_pretrained(tmp_path)
    rewritten(tmp_path, parameters={"model_kwargs": kwargs})
    with pytest.raises(ValueError, match=r"asks for .*, which may run foreign code.*model_kwargs="):
        RelishRegressor.from_pretrained(tmp_path)
    opened = RelishRegressor.from_pretrained(tmp_path, model_kwargs=kwargs)
    assert opened.model_kwargs == kwargs


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("fitted", "model", "evil/repo"),
        ("fitted", "predict", "x"),
        ("parameters", "memory", "/etc"),
        ("parameters", "device", "meta"),
    ],
)
def test_a_file_sets_nothing_but_what_was_learned(saved, part, name, value):
    rewritten(saved, **{part: {name: value}})
    with pytest.raises(ValueError, match=rf"has an unknown field {part}\.{name}:"):
        RelishRegressor.from_pretrained(saved)


def test_the_language_model_is_opened_at_the_revision_that_was_read(tmp_path):
    RelishRegressor(tiny_model(), **SMALL).fit(FRAME, Y).save_pretrained(tmp_path)
    rewritten(tmp_path, fitted={"_llm_revision": "abc123"}, parameters={"model": "some/llm"})
    assert RelishRegressor.from_pretrained(tmp_path).model_kwargs == {"revision": "abc123"}
    assert RelishRegressor.from_pretrained(tmp_path, model="other").model_kwargs is None


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    regressor = RelishRegressor(tiny_model(), **SMALL).fit(FRAME, Y)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileExistsError, match="not a RelishRegressor's, and would be lost"):
        regressor.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    regressor.save_pretrained(tmp_path / "new")
    regressor.save_pretrained(tmp_path / "new")


def test_what_is_no_regressor_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        RelishRegressor.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"tried the folder .*no/such-regressor and the Hugging Face"):
        RelishRegressor.from_pretrained("no/such-regressor")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="not the configuration of a RelishRegressor"):
        RelishRegressor.from_pretrained(tmp_path)

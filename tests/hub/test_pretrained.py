"""A fitted regressor in a folder: what it holds, what opens, what is refused."""

import copy
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from sklearn.base import clone
from sklearn.exceptions import InconsistentVersionWarning
from tiny import tiny_model

from sklearn_relish import FrozenLLM, LLMEncoder, RelishRegressor
from sklearn_relish.hub import checks, pretrained
from sklearn_relish.utils import versions

SMALL = {"latent_size": 16, "n_heads": 2, "max_epochs": 2, "n_estimators": 2, "random_state": 0}
FRAME = pd.DataFrame({"title": [f"film {i}" for i in range(40)], "year": range(1980, 2020)})
Y = np.arange(40.0)
FILES = {checks.CONFIG, checks.WEIGHTS, pretrained.CARD}


@pytest.fixture(scope="module")
def three():
    """Fitted regressors whose configurations and weights all differ."""
    return [
        RelishRegressor(
            tiny_model(), n_iterations=2, **SMALL | {"random_state": seed, "max_epochs": seed}
        ).fit(FRAME, Y * seed)
        for seed in (1, 2, 3)
    ]


@pytest.fixture
def saved(three, tmp_path):
    """A folder with the first of the three."""
    three[0].save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def content(regressor):
    """What comes from the configuration, and what from the weights."""
    weights = {
        name: array.tobytes() for name, array in regressor.head_.__getstate__()["weights"].items()
    }
    return regressor.max_epochs, regressor.history_, regressor._y_scale.tolist(), weights


def which(folder, regressors):
    """The number of the regressor that a folder opens as."""
    opened = content(RelishRegressor.from_pretrained(folder))
    return [content(regressor) for regressor in regressors].index(opened)


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
    for name in (
        "layer_", "layer_scores_", "history_", "best_epoch_", "validation_score_",
        "ensemble_summary_",
    ):  # fmt: skip
        assert getattr(opened, name) == getattr(regressor, name)
    assert list(opened.feature_names_in_) == ["title", "year"]
    with pytest.raises(ValueError, match="feature names"):
        opened.predict(FRAME.rename(columns={"year": "when"}))
    opened.set_params(warm_start=True).fit(FRAME, Y)  # and it goes on


def test_another_prompt_is_neither_saved_nor_used(tmp_path):
    regressor = RelishRegressor(tiny_model(), **SMALL).fit(FRAME, Y)
    regressor.save_pretrained(tmp_path)
    opened = RelishRegressor.from_pretrained(tmp_path, prompt="{title}")
    with pytest.raises(ValueError, match=r"fitted with prompt=None, but now it has prompt='{title"):
        opened.predict(FRAME)
    regressor.set_params(prompt="{title}")
    with pytest.raises(ValueError, match=r"fitted with prompt=None, but now it has prompt='{title"):
        regressor.save_pretrained(tmp_path)


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
    assert {path.name for path in tmp_path.iterdir()} == FILES


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


def test_a_language_model_that_is_missing_here_can_be_passed(three, saved):
    rewritten(saved, parameters={"model": "/elsewhere/llm.gguf"})
    opened = RelishRegressor.from_pretrained(saved)  # its attributes can be read without the model
    with pytest.raises(OSError, match=r"'/elsewhere/llm\.gguf'.*from_pretrained\(\.\.\., model="):
        opened.predict(FRAME)
    opened = RelishRegressor.from_pretrained(saved, model=tiny_model())
    np.testing.assert_array_equal(opened.predict(FRAME), three[0].predict(FRAME))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    regressor = RelishRegressor(tiny_model(), **SMALL).fit(FRAME, Y)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileExistsError, match="would be overwritten"):
        regressor.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    regressor.save_pretrained(tmp_path / "new")
    regressor.save_pretrained(tmp_path / "new")
    (tmp_path / "films.csv").touch()
    with pytest.raises(NotADirectoryError, match=r"films\.csv is not a folder: choose another"):
        regressor.save_pretrained(tmp_path / "films.csv")


def test_what_is_no_regressor_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no config\.json"):
        RelishRegressor.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"tried the folder .*no/such-regressor and the Hugging Face"):
        RelishRegressor.from_pretrained("no/such-regressor")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="not the configuration of a RelishRegressor"):
        RelishRegressor.from_pretrained(tmp_path)


class Killed(BaseException):
    """What a killed process looks like: nothing more is done to its files."""


class Killer:
    """Raises at the given operation on files of a folder, and at all later ones."""

    def __init__(self):
        self.folder, self.left = None, 0
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if self.folder is None or event not in ("open", "os.rename", "os.remove", "os.mkdir"):
            return
        if not isinstance(arguments[0], int) and self.folder in os.fsdecode(arguments[0]):
            self.left -= 1
            if self.left < 0:
                raise Killed

    def kills(self, save, folder, operation):
        """Whether a save was killed at that operation, or had ended before."""
        self.folder, self.left = os.fspath(folder), operation
        try:
            save(folder)
        except Killed:
            return True
        finally:
            self.folder = None
        return False


@pytest.fixture(scope="module")
def killer():
    return Killer()


def test_a_save_that_is_killed_anywhere_leaves_the_old_or_the_new_regressor(
    three, saved, tmp_path, killer
):
    found, states = set(), set()
    for first in range(100):
        folder = tmp_path / f"killed-{first}"
        shutil.copytree(saved, folder)
        if not killer.kills(three[1].save_pretrained, folder, first):
            break
        kept = which(folder, three)
        found.add(kept)
        assert kept in (0, 1)
        state = (kept, *sorted(set(os.listdir(folder)) - {pretrained.LOCK}))
        if state in states:
            continue
        states.add(state)
        for second in range(100):
            again = tmp_path / f"killed-{first}-{second}"
            shutil.copytree(folder, again)
            if not killer.kills(three[2].save_pretrained, again, second):
                break
            assert which(again, three) in (kept, 2)
        three[2].save_pretrained(again)
        assert which(again, three) == 2
        assert {path.name for path in again.iterdir()} == FILES
    assert found == {0, 1}
    assert first > 8  # operations, which were all tried
    assert len(states) > 3
    assert which(folder, three) == 1
    assert {path.name for path in folder.iterdir()} == FILES


def test_the_first_save_that_is_killed_leaves_nothing_or_the_regressor(three, tmp_path, killer):
    for operation in range(100):
        folder = tmp_path / f"killed-{operation}"
        if not killer.kills(three[0].save_pretrained, folder, operation):
            break
        if folder.exists() and (folder / checks.CONFIG).exists():
            assert which(folder, three[:1]) == 0
        else:
            with pytest.raises(OSError, match=r"there is no config\.json|No regressor"):
                RelishRegressor.from_pretrained(folder)


def save_in_turn(sources, folder, n_saves, start):
    """Save regressors over each other, in a process of its own."""
    regressors = [RelishRegressor.from_pretrained(source) for source in sources]
    start.wait(200)
    for number in range(n_saves):
        regressors[number % len(regressors)].save_pretrained(folder)


def test_while_processes_save_a_reader_gets_one_of_the_regressors(three, saved, tmp_path):
    sources = [tmp_path / f"source-{number}" for number in range(3)]
    for regressor, source in zip(three, sources, strict=True):
        regressor.save_pretrained(source)
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(3)
    savers = [
        context.Process(target=save_in_turn, args=(sources[i:] + sources[:i], saved, 15, start))
        for i in (0, 1)
    ]
    for saver in savers:
        saver.start()
    try:
        start.wait(200)
        found = {which(saved, three)}
        while any(saver.is_alive() for saver in savers):
            found.add(which(saved, three))  # an error if it is none of them
    finally:
        for saver in savers:
            saver.join(0 if sys.exc_info()[0] else 200)
            saver.kill()
    assert [saver.exitcode for saver in savers] == [0, 0]
    assert found <= {0, 1, 2}
    assert {path.name for path in saved.iterdir()} == FILES


def test_a_save_replaces_links_and_does_not_follow_them(three, saved, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(saved, elsewhere)
    before = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
    for name in FILES:
        (saved / name).unlink()
        (saved / name).symlink_to(elsewhere / name)
    (saved / pretrained.PARTIAL).symlink_to(elsewhere / checks.CONFIG)
    assert which(saved, three) == 0  # as the cache of the Hub has them
    three[1].save_pretrained(saved)
    assert which(saved, three) == 1
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == before
    assert not any(path.is_symlink() for path in saved.iterdir())


def test_other_versions_are_named_in_a_warning(three, tmp_path, monkeypatch):
    with monkeypatch.context() as then:
        then.setattr(versions, "__version__", "0.0.7")
        then.setattr(torch, "__version__", "2.9.0+cu128")
        three[0].save_pretrained(tmp_path)
        pickled = pickle.dumps(three[0])
        encoder = pickle.dumps(LLMEncoder(tiny_model()))
    now = torch.__version__.partition("+")[0]
    message = rf"sklearn-relish 0\.0\.7 \(now 0\.1\.0\), torch 2\.9\.0 \(now {now}\)\."
    for opening in (
        lambda: RelishRegressor.from_pretrained(tmp_path),
        lambda: pickle.loads(pickled),
    ):
        with pytest.warns(InconsistentVersionWarning, match=f"RelishRegressor .* {message}"):
            opened = opening()
        assert content(opened) == content(three[0])
    with pytest.warns(InconsistentVersionWarning, match=f"LLMEncoder .* {message}"):
        pickle.loads(encoder)


def test_a_torch_for_another_device_is_the_same_version(three, saved, monkeypatch):
    pickled = pickle.dumps(three[0])
    monkeypatch.setattr(torch, "__version__", torch.__version__.partition("+")[0] + "+cu999")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pickle.loads(pickled)
        RelishRegressor.from_pretrained(saved)


class Subclass(RelishRegressor):
    def __init__(self, model="some/model", *, added=1, max_epochs=1):
        super().__init__(model, max_epochs=max_epochs, latent_size=16, n_heads=2, n_estimators=1)
        self.added = added


def test_copies_and_pickles_of_the_same_version_are_silent(three, tmp_path):
    subclass = Subclass(tiny_model(), added=[1, 2]).fit(FRAME, Y)
    subclass.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for regressor in (three[0], subclass):
            before = set(vars(regressor))
            for made in (copy.deepcopy, copy.copy, lambda some: pickle.loads(pickle.dumps(some))):
                assert content(made(regressor)) == content(regressor)
                assert set(vars(made(regressor))) == before
        opened = Subclass.from_pretrained(tmp_path)
        assert (opened.added, content(opened)) == ([1, 2], content(subclass))
        clone(three[0])
        unfitted = pickle.loads(pickle.dumps(RelishRegressor(max_epochs=7)))
    assert unfitted.max_epochs == 7
    with pytest.raises(ValueError, match=r"no field parameters\.batch_size.*subclass"):
        RelishRegressor.from_pretrained(tmp_path)


def test_what_can_not_work_is_refused(three, saved, monkeypatch):
    state = three[0].__getstate__()
    del state["long_text"]
    with pytest.raises(ValueError, match="RelishRegressor has no parameter 'long_text': it was"):
        RelishRegressor().__setstate__(state)
    del state[versions.STAMP]
    with pytest.raises(ValueError, match="RelishRegressor has no valid format number, but"):
        RelishRegressor().__setstate__(state)
    with monkeypatch.context() as then:
        for module in (versions, sys.modules["sklearn_relish.head.ensemble"]):
            then.setattr(module, "FORMAT", 2)
        pickled = [pickle.dumps(some) for some in (three[0], three[0].head_, RelishRegressor())]
    for some in pickled:
        with pytest.raises(ValueError, match=r"has format 2.*opens format 1: install"):
            pickle.loads(some)
    rewritten(saved, sklearn_relish={"format": 2, "versions": {"sklearn-relish": "9.1"}})
    with pytest.raises(ValueError, match=r"format 2 and was saved by sklearn-relish 9\.1, but"):
        RelishRegressor.from_pretrained(saved)
    three[1].save_pretrained(saved)  # it is a regressor's, and may be replaced
    assert which(saved, three) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("parameters.n_iterations", 0),
        ("parameters.loss", "cubic"),
        ("parameters.n_heads", [8]),
        ("fitted.layer_", 0),
        ("fitted.layer_", True),
        ("fitted.layer_scores_", {"zero": 1.0}),
        ("fitted.n_outputs_", 10**300),
        ("fitted.n_outputs_", 2),
        ("fitted.history_", [1]),
        ("fitted.best_epoch_", [1]),
        ("fitted.ensemble_summary_", [{"part": "head 1", "weight": "all"}]),
        ("fitted.ensemble_summary_", [{"weight": 1.0}]),
        ("fitted.validation_score_", "high"),
        ("fitted._column_names", ["title"]),
        ("fitted._column_names", [1, 2]),
        ("fitted._column_kinds", ["text", "purple"]),
        ("fitted._column_kinds", None),
        ("fitted._y_shape", [3]),
        ("fitted._llm_fingerprint", None),
        ("fitted.head.n_heads", 3_000),
        ("fitted.head.n_heads", 1),
        ("fitted.head.linear_path", "yes"),
        ("fitted.head.n_vectors", -1),
        ("fitted.head.n_vectors", 10**9),
        ("fitted.head.n_vectors", 3),
        ("fitted.head.loss_fn.name", "cubic"),
        ("fitted.head.loss_fn.quantiles", [0.5]),
        ("fitted.head.sizes.n_iterations", 10_000_000),
        ("fitted.head.sizes.n_iterations", 1_000),
        ("fitted.head.sizes.n_iterations", 1),
        ("fitted.head.sizes.n_iterations", 3),
        ("fitted.head.sizes.n_heads", 3_000),
        ("fitted.head.sizes.n_heads", 0),
        ("fitted.head.sizes.latent_size", 2**60),
        ("fitted.head.sizes.input_size", 33),
        ("fitted.head.sizes.n_outputs", 2),
        ("fitted.head.sizes.state_norm", "max"),
        ("weights_sha256", "../../../etc/passwd"),
        ("sklearn_relish.versions", {"torch": 2}),
    ],
)
def test_a_crafted_configuration_is_refused_by_the_name_of_the_field(saved, field, value):
    config = json.loads((saved / checks.CONFIG).read_text())
    *within, last = field.split(".")
    part = config
    for name in within:
        part = part[name]
    part[last] = value
    (saved / checks.CONFIG).write_text(json.dumps(config))
    # The number of heads is first compared with what each of them has.
    alias = {"fitted.head.n_heads": r"fitted\.(head\.n_heads|best_epoch_)"}
    alias["fitted.n_outputs_"] = r"fitted\.(n_outputs_|_y_shape)"
    named = alias.get(field, field.replace(".", r"\."))
    with pytest.raises(
        ValueError, match=rf"{named} .*(must|does not agree|asks for)|does not fit config"
    ):
        RelishRegressor.from_pretrained(saved)


def test_iterations_that_share_weights_are_bounded(tmp_path):
    regressor = RelishRegressor(tiny_model(), share_weights=True, **SMALL).fit(FRAME, Y)
    regressor.save_pretrained(tmp_path)
    sizes = regressor.head_.heads[0].sizes | {"n_iterations": 10_000_000}
    head = json.loads((tmp_path / checks.CONFIG).read_text())["fitted"]["head"]
    rewritten(tmp_path, fitted={"head": head | {"sizes": sizes}})
    with pytest.raises(ValueError, match=r"fitted\.head\.sizes\.n_iterations must be"):
        RelishRegressor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[" * 100_000, '{"a": NaN}', '{"a": 1e999}', "[]", "null", "1" * 5_000, "\ud800"],
    ids=["empty", "deep", "NaN", "infinite", "list", "null", "long", "surrogate"],
)
def test_a_configuration_that_is_none_is_refused(saved, text):
    (saved / checks.CONFIG).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"config\.json is not (valid JSON|the configuration)"):
        RelishRegressor.from_pretrained(saved)


def test_a_huge_configuration_is_not_read(saved):
    with (saved / checks.CONFIG).open("r+b") as file:
        file.truncate(2**30)  # sparse
    with pytest.raises(ValueError, match=r"has more than 16,777,216 bytes"):
        RelishRegressor.from_pretrained(saved)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", [checks.CONFIG, checks.WEIGHTS])
def test_a_pipe_is_not_waited_for(three, saved, name):
    (saved / name).unlink()
    os.mkfifo(saved / name)
    with pytest.raises(ValueError, match="is not a regular file"):
        RelishRegressor.from_pretrained(saved)
    if name == checks.CONFIG:
        with pytest.raises(FileExistsError, match="would be overwritten"):
            three[0].save_pretrained(saved)


def with_weights(folder, **changes):
    """The folder with other tensors, and their digest; None leaves one out."""
    arrays = load_file(folder / checks.WEIGHTS) | changes
    save_file({k: v for k, v in arrays.items() if v is not None}, folder / checks.WEIGHTS)
    return with_digest(folder)


def with_digest(folder):
    config = json.loads((folder / checks.CONFIG).read_text())
    config["weights_sha256"] = hashlib.sha256((folder / checks.WEIGHTS).read_bytes()).hexdigest()
    (folder / checks.CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_y_scale": np.array([np.nan])}, "'_y_scale' does not hold numbers of 0 or more"),
        ({"_y_scale": np.array([-1.0])}, "'_y_scale' does not hold numbers of 0 or more"),
        ({"_y_mean": np.array([np.inf])}, "'_y_mean' does not hold finite numbers"),
        ({"_y_mean": np.zeros(2)}, r"'_y_mean' should be F64 of shape \[1\], but is F64 .*\[2\]"),
        ({"_y_mean": np.zeros(1, "f4")}, "'_y_mean' should be F64 .* is F32"),
        ({"_y_mean": None}, "'_y_mean' should be F64 .* is none"),
        ({"more": np.zeros(1)}, "'more' should be none, but is F64"),
        (
            {"head.head_weight": np.full(1, np.nan, "f4")},
            "'head.head_weight' does not hold finite numbers",
        ),
        ({"head.head_weight": np.zeros(1, "i4")}, "'head.head_weight' should be F32 .* is I32"),
        ({"conformal.scores": None}, r"'conformal\.scores' should be F64 .* is none"),
        ({"conformal.weight": np.zeros((2, 2))}, r"'conformal\.scores' should be"),
        ({"conformal.weight": np.array(1.0)}, r"'conformal\.scores' should be"),
        ({"head.heads.0.projection.weight": None}, r"input_size does not agree with the shape"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(saved, changes, message):
    with pytest.raises(ValueError, match=message):
        RelishRegressor.from_pretrained(with_weights(saved, **changes))


def test_truncated_and_altered_weights_are_refused(saved):
    weights = (saved / checks.WEIGHTS).read_bytes()
    for content in (b"", weights[:5], weights[:500], weights[:-1], weights[:-1] + b"x"):
        (saved / checks.WEIGHTS).write_bytes(content)
        with pytest.raises(ValueError, match="is truncated, altered or from another regressor"):
            RelishRegressor.from_pretrained(saved)
    for content in (b"", weights[:500], weights[:-1], b"\xff" * 100, weights + b"more"):
        (saved / checks.WEIGHTS).write_bytes(content)
        with pytest.raises(ValueError, match="is not a valid safetensors file"):
            RelishRegressor.from_pretrained(with_digest(saved))
    (saved / checks.WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no model\.safetensors"):
        RelishRegressor.from_pretrained(saved)


def test_what_would_not_open_is_not_saved(three, saved):
    regressor = copy.deepcopy(three[1])
    regressor.head_.head_weight[0] = np.nan
    with pytest.raises(ValueError, match=r"'head\.head_weight' does not hold finite numbers"):
        regressor.save_pretrained(saved)
    regressor = copy.deepcopy(three[1]).set_params(n_iterations=0)
    with pytest.raises(ValueError, match=r"parameters\.n_iterations must be"):
        regressor.save_pretrained(saved)
    assert which(saved, three) == 0


def leaves(value, path=()):
    """The paths of all values within a JSON document, inner ones with them."""
    children = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    return [path, *(leaf for key, some in children for leaf in leaves(some, (*path, key)))]


def replaced(value, path, new):
    if not path:
        return new
    changed = copy.copy(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], new)
    return changed


NUMBERS = st.integers() | st.sampled_from([0, 1, 2, 3, 4, 8, 10**7, 2**63, 10**400, -1])
SCALARS = st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=20)
WORDS = st.sampled_from(["rms", "auto", "poisson", "quantile", "window", "float16", "{title}"])
JSON = st.recursive(
    SCALARS | WORDS,
    lambda some: (
        st.lists(some, max_size=4) | st.dictionaries(st.text(max_size=9), some, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    """Folders of several kinds of regressors, their configurations and their predictions."""
    found = []
    for number, changes in enumerate(
        [
            {"share_weights": True, "layer": "auto"},
            {"loss": "quantile", "quantile": [0.2, 0.5, 0.8]},
            {"loss": "gamma", "early_stopping": False},
        ]
    ):
        folder = tmp_path_factory.mktemp(f"victim-{number}")
        regressor = RelishRegressor(tiny_model(), **SMALL | changes).fit(FRAME, Y + 1)
        regressor.save_pretrained(folder)
        config = json.loads((folder / checks.CONFIG).read_text())
        found.append((folder, config, regressor.predict(FRAME[:3])))
    return found


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_configuration_with_any_other_value_opens_or_is_refused(victims, data):
    folder, config, expected = data.draw(st.sampled_from(victims))
    path = data.draw(st.sampled_from(leaves(config)))
    changed = replaced(config, path, data.draw(JSON))
    (folder / checks.CONFIG).write_text(json.dumps(changed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of versions, and of another model
        try:
            opened = RelishRegressor.from_pretrained(folder, model=tiny_model())
            predictions = opened.predict(FRAME[:3])
        except (ValueError, OSError, TypeError):  # and nothing else
            return
    assert predictions.shape[0] == 3
    assert np.isfinite(predictions).all()
    matters = {"layer_", "head", "prompt", "max_length", "long_text", "dtype", "_column_names"}
    if matters.isdisjoint(map(str, path)) and len(path) > 1:
        np.testing.assert_array_equal(predictions.ravel(), expected.ravel())

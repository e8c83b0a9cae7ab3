"""Bars and log records: one bar for a fit, with the time left, which records do not break."""

import logging
import pickle
import re
import sys
from datetime import UTC, datetime, timedelta
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from tiny import tiny_model

from sklearn_relish import FrozenLLM, LLMEncoder, RelishRegressor, RelishRegressorCV
from sklearn_relish.training import estimate
from sklearn_relish.utils import progress
from sklearn_relish.utils.progress import FitProgress, ProgressBar, log, place_in_search

TEXTS = [f"{word} film {i}" for i in range(20) for word in ("dull", "fine", "splendid")]
Y = np.tile([1.0, 3.0, 5.0], 20)
SMALL = {"latent_size": 16, "n_heads": 2, "random_state": 0}


@pytest.fixture(scope="module")
def llm():
    return FrozenLLM(tiny_model(), device="cpu", dtype="float32")


@pytest.fixture
def at_once(monkeypatch):
    """Bars appear at once, and each change is shown."""
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0.0)
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.0)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still: its time is `now`."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def lines(shown):
    """What was shown in the line of the bar, one after another."""
    return [line.rstrip() for line in shown.replace("\n", "\r").split("\r") if line.strip()]


@pytest.mark.usefixtures("at_once")
def test_the_time_left_is_that_of_all_parts(clock):
    asked = []

    def training_seconds(mean_length):
        asked.append(mean_length)
        return 30.0

    with FitProgress(True, training_seconds) as fit:
        with ProgressBar(4, "Reading", "text", shown=False, cost=100) as bar:
            assert fit._bar.n == 0  # nothing is known
            clock.now = 10.0
            bar.update(cost=25, n_tokens=5)
            assert asked == [5.0]  # 0.2 tokens for each of 25 characters
            assert fit._bar.n == 0  # the rate is not known
            assert fit._bar.desc == "Reading, text 1 of 4"
            clock.now = 15.0
            bar.update(cost=25, n_tokens=5)
            assert fit._bar.n == pytest.approx(15 / (15 + 10 + 30))
            clock.now = 20.0
            bar.update(2, cost=50, n_tokens=10)
            assert fit._bar.n == pytest.approx(20 / (20 + 30))
        with ProgressBar(10, "Training 2 heads", "epoch", shown=False) as bar:
            clock.now = 24.0
            bar.update(4)
            assert fit._bar.n == pytest.approx(24 / (24 + 6))
    assert asked == [5.0]
    assert fit._bar.n == 1


@pytest.mark.usefixtures("clock")
def test_the_trainings_are_not_timed_before_the_bar_appears():
    def never(mean_length):
        raise AssertionError

    with (
        FitProgress(True, never) as fit,
        ProgressBar(4, "Reading", "text", shown=False, cost=100) as bar,
    ):
        bar.update(cost=25, n_tokens=5)
        assert fit._bar.n == 0


@pytest.mark.usefixtures("at_once", "one_thread")
def test_one_bar_shows_head_by_head(llm, capfd):
    RelishRegressor(llm, **SMALL, n_estimators=2, max_epochs=2, verbose=1).fit(TEXTS, Y)
    shown = capfd.readouterr().err
    assert shown.count("\n") == 1
    shown_parts = [line.partition(": ")[0] for line in lines(shown)]
    assert [line for line in dict.fromkeys(shown_parts) if not line.startswith("Reading")] == [
        "Fit",
        "Fitting the ridge models",
        "Training head 1 of 2, epoch 0 of 4",
        "Training head 1 of 2, epoch 1 of 4",
        "Training head 1 of 2, epoch 2 of 4",
        "Training head 2 of 2, epoch 3 of 4",
        "Training head 2 of 2, epoch 4 of 4",
    ]
    assert "Reading, text 60 of 60" in shown_parts
    assert "validation R²=" in shown
    assert "R²" not in lines(shown)[-1]  # a figure of the last part
    assert lines(shown)[-1].startswith("Fit: 100%")


@pytest.mark.usefixtures("at_once", "four_threads")
def test_heads_at_the_same_time_are_counted_together(llm, capfd):
    regressor = RelishRegressor(llm, **SMALL, n_estimators=3, max_epochs=20, verbose=1)
    regressor.set_params(learning_rate=0.01, n_iter_no_change=1).fit(TEXTS, Y)
    assert regressor.n_epochs_ < 60  # some stopped early
    shown = capfd.readouterr().err
    assert "Training 3 heads, epoch 60 of 60: " in shown
    assert "Training head" not in shown


@pytest.mark.usefixtures("at_once")
def test_a_fit_on_kept_states_reads_nothing_and_partial_fit_has_a_bar(llm, capfd):
    regressor = RelishRegressor(llm, **SMALL, n_estimators=1, max_epochs=1).fit(TEXTS, Y)
    regressor.set_params(verbose=1).partial_fit(TEXTS, Y)
    shown = capfd.readouterr().err
    assert "Reading" not in shown
    assert shown.endswith("\n")
    assert "Training head 1 of 1, epoch 1 of 1: " in shown


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("fails", [True, False])
def test_a_trial_of_the_trainings_does_not_change_the_fit(llm, capfd, monkeypatch, fails):
    trials, original = [], estimate.train_candidates

    def trial(*arguments, **options):
        trials.append(1)
        if fails:
            raise FloatingPointError
        return original(*arguments, **options)

    monkeypatch.setattr(estimate, "train_candidates", trial)
    monkeypatch.setattr("sklearn_relish.states.reading.PIECE_TEXTS", 8)
    fit = RelishRegressor(llm, **SMALL, n_estimators=1, max_epochs=1, verbose=1).fit(TEXTS, Y)
    assert "Fit: 100%" in capfd.readouterr().err
    assert trials
    silent = RelishRegressor(llm, **SMALL, n_estimators=1, max_epochs=1).fit(TEXTS, Y)
    np.testing.assert_array_equal(fit.predict(TEXTS), silent.predict(TEXTS))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("is_pipeline", [False, True])
def test_the_bars_of_a_grid_search_say_which_fit_it_is(llm, capfd, is_pipeline):
    searched = RelishRegressor(llm, **SMALL, n_estimators=1, max_epochs=1, verbose=1)
    grid = {"n_iterations": [1, 3]}
    if is_pipeline:
        searched = make_pipeline(FunctionTransformer(), searched)
        grid = {"relishregressor__n_iterations": [1, 3]}
    GridSearchCV(searched, grid, cv=2).fit(TEXTS, Y)
    *fits, refit, _ = capfd.readouterr().err.split("\n")
    assert len(fits) == 4
    for number, fit in enumerate(fits):
        during, end = lines(fit)[-2:]
        place = f"Fit {number + 1} of 4"
        left = "" if number == 0 else r", search \d\d:\d\d left"
        assert re.match(f"{place}{left}: Training head 1 of 1, epoch 1 of 1: ", during)
        assert end.startswith(place)
        values = "latent_size=16, max_epochs=1, n_estimators=1, n_heads=2, n_iterations="
        assert f" ({values}{[1, 1, 3, 3][number]}): 100%" in end
    assert lines(refit)[-1].startswith("Fit: 100%")


def test_the_time_left_of_a_search(monkeypatch):
    began = datetime(2026, 1, 1, tzinfo=UTC)
    clock = SimpleNamespace(now=lambda zone: (began + timedelta(seconds=70)).astimezone(zone))
    monkeypatch.setattr(progress, "datetime", clock)
    search = SimpleNamespace(max_subtasks=45, init_time=began)
    fit = SimpleNamespace(parent=search, task_id=7, source_task_name=progress.SEARCH_TASK)
    step = SimpleNamespace(parent=fit, source_task_name="fit-final")  # of a pipeline
    assert place_in_search(step) == "Fit 8 of 45, search 06:20 left"
    alone = SimpleNamespace(parent=None, source_task_name=None)
    assert place_in_search(alone) == place_in_search(None) == ""


@pytest.mark.usefixtures("at_once")
def test_loading_the_model_is_not_part_of_the_rate_of_reading(clock):
    with (
        FitProgress(True, lambda length: 0.0) as fit,
        ProgressBar(100, "Reading", "text", shown=False) as bar,
    ):
        clock.now = 90.0  # the model was loaded
        bar.update(n_tokens=5)
        assert fit._bar.n == 0
        clock.now = 91.0
        bar.update()
        assert fit._bar.n == pytest.approx(91 / (91 + 98))


@pytest.mark.usefixtures("at_once")
def test_the_bar_does_not_end_before_the_fit(clock):
    with FitProgress(True, lambda length: 0.0) as fit:
        with ProgressBar(1, "Training head 1 of 1", "epoch", shown=False) as bar:
            clock.now = 1.0
            bar.update()
        assert fit._bar.n < 1


@pytest.mark.usefixtures("at_once")
def test_records_and_bars_that_are_disabled(llm, monkeypatch, caplog, capfd):
    caplog.set_level(logging.INFO, "sklearn_relish")
    monkeypatch.setattr(progress, "tqdm", partial(progress.tqdm, disable=True))  # TQDM_DISABLE=1
    RelishRegressor(llm, **SMALL, n_estimators=1, max_epochs=1, verbose=1).fit(TEXTS, Y)
    assert capfd.readouterr().err == ""
    assert messages(caplog, logging.INFO)


@pytest.mark.usefixtures("at_once")
def test_an_error_leaves_no_bar_behind(llm, capfd):
    regressor = RelishRegressor(llm, **SMALL, n_estimators=1, max_epochs=1, verbose=1)
    with pytest.raises(FloatingPointError):
        regressor.set_params(learning_rate=1e30).fit(TEXTS, Y)
    assert "100%" not in capfd.readouterr().err.rpartition("\r")[2]
    with ProgressBar(2, "Reading", "text", shown=False) as bar:
        bar.update()
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("at_once")
def test_a_served_prediction_shows_no_bar(llm, capfd):
    regressor = RelishRegressor(tiny_model(), **SMALL, n_estimators=1, max_epochs=1, verbose=1)
    served = pickle.loads(pickle.dumps(regressor.fit(TEXTS, Y)))
    capfd.readouterr()
    served.predict(["fresh"])
    served.predict(TEXTS[:9])
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("at_once")
def test_reading_in_several_steps_has_a_bar(llm, capfd, monkeypatch):
    monkeypatch.setattr("sklearn_relish.states.store.BLOCK_TEXTS", 30)
    LLMEncoder(llm, verbose=1).fit(TEXTS).transform([f"{text}!" for text in TEXTS])
    assert "Reading: 100%" in capfd.readouterr().err


def messages(caplog, level):
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("sklearn_relish.") and record.levelno == level
    ]


def test_records_say_what_is_read_and_trained(caplog):
    caplog.set_level(logging.DEBUG, "sklearn_relish")
    regressor = RelishRegressor(tiny_model(), **SMALL, n_estimators=2, max_epochs=3).fit(TEXTS, Y)
    n_tokens = sum(map(len, TEXTS))
    read, *trained, stacked = messages(caplog, logging.INFO)
    assert read.startswith(f"Read 60 texts, {n_tokens} tokens, up to layer 2 in ")
    for number, message in enumerate(sorted(trained)):
        assert message.startswith(f"Trained head {number + 1} of 2 on 48 rows for 3 epochs in ")
        best = regressor.best_epoch_[number]
        entry = regressor.history_[3 * number + best - 1]
        loss, r2 = entry["validation_loss"], entry["validation_r2"]
        assert f"kept epoch {best}: loss {loss:.4f} and R² {r2:.4f} on 12 held-out" in message
    assert len(trained) == 2
    assert stacked.startswith("Contributions to the predictions: head 1 0.")
    assert stacked.count(", ") == 4
    caplog.clear()
    regressor.predict(TEXTS)
    assert messages(caplog, logging.INFO) == []
    (found,) = messages(caplog, logging.DEBUG)
    assert found.startswith("Read 0 texts, 0 tokens, up to layer 2 in ")
    assert found.endswith("the states of 60 texts were kept")
    assert {record.name for record in caplog.records} == {"sklearn_relish.states.store"}


def test_records_of_a_search_and_of_the_layer(llm, caplog):
    caplog.set_level(logging.INFO, "sklearn_relish")
    grid = {"n_iterations": [1, 2], "latent_size": [8, 16], "cv": 2}
    search = RelishRegressorCV(llm, layer="auto", max_epochs=2, **SMALL | grid).fit(TEXTS, Y)
    found = messages(caplog, logging.INFO)
    assert sum(message.startswith("Fold 1 of 2, {'latent_size'") for message in found) == 4
    assert "Fold 1 of 2: kept 1 of 2 trainings" in found
    assert f"Chose {search.best_params_!r}, mean score {search.best_score_:.4f}" in found
    assert any(message.startswith(f"Chose layer {search.layer_} by R²") for message in found)


def test_nothing_is_logged_unless_it_is_asked_for(llm, capfd):
    RelishRegressor(llm, **SMALL, n_estimators=1, max_epochs=1).fit(TEXTS, Y)
    assert capfd.readouterr() == ("", "")
    handlers = logging.getLogger("sklearn_relish").handlers
    assert any(isinstance(handler, logging.NullHandler) for handler in handlers)


@pytest.mark.usefixtures("at_once")
def test_records_do_not_break_a_bar(capfd):
    logger = logging.Logger("separate")
    logger.addHandler(logging.StreamHandler(sys.stderr))
    with (
        FitProgress(True, lambda length: 0.0),
        ProgressBar(2, "Training head 1 of 1", "epoch", shown=False) as bar,
    ):
        bar.update()
        log(logger, logging.INFO, "a record of %s", "the fit")
        bar.update()
    first, second, _ = capfd.readouterr().err.split("\n")
    assert first.rpartition("\r")[2] == "a record of the fit"
    assert lines(second)[0].startswith("Training head 1 of 1, epoch 1 of 2: ")  # it is drawn again
    assert lines(second)[-1].startswith("Fit: 100%")


def test_records_do_not_show_a_bar_that_has_not_appeared(capfd):
    logger = logging.Logger("separate")
    logger.addHandler(logging.StreamHandler(sys.stderr))
    with FitProgress(True, lambda length: 0.0):
        log(logger, logging.INFO, "a record")
    assert capfd.readouterr().err == "a record\n"

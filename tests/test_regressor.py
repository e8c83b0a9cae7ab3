import os
import pickle
import random
import subprocess
import sys
import threading
import warnings
from types import SimpleNamespace

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import config_context
from sklearn.base import clone
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from tiny import SIZE, tiny_model

from sklearn_relish import (
    FrozenLLM,
    LLMEncoder,
    RefinementDisplay,
    RelishRegressor,
    StateStore,
)
from sklearn_relish.training.splits import held_out_rows

WORDS = ["awful", "poor", "fair", "good", "superb"]


def reviews(n, seed=0):
    """Texts and their number: how good, plus how often it is said, and a trace of noise.

    There are 15 texts; the noise makes distinct pairs of the rows.
    """
    random = np.random.default_rng(seed)
    grades, repeats = random.integers(0, 5, n), random.integers(1, 4, n)
    texts = [" ".join([WORDS[g]] * k) for g, k in zip(grades, repeats, strict=True)]
    return texts, 100.0 + 20 * grades + repeats + random.normal(0, 0.01, n)


@pytest.fixture(scope="module")
def llm():
    return FrozenLLM(tiny_model(), device="cpu", dtype="float32")


def make(llm, **parameters):
    settings = {"latent_size": 32, "n_heads": 4, "learning_rate": 3e-3, "random_state": 0}
    settings |= {"n_estimators": 1, "validation_fraction": 0.1}
    return RelishRegressor(llm, **(settings | parameters))


def test_strings_to_numbers_in_the_units_of_y(llm):
    texts, y = reviews(400)
    regressor = make(llm, max_epochs=20).fit(texts, y)
    fresh, truth = reviews(100, seed=1)
    assert regressor.score(fresh, truth) > 0.9
    assert regressor.predict(fresh).mean() == pytest.approx(truth.mean(), rel=0.1)
    assert (regressor.n_features_in_, regressor.n_outputs_, regressor.layer_) == (1, 1, 2)
    assert regressor.n_epochs_ == len(regressor.history_) == 20
    assert 1 <= regressor.best_epoch_[0] <= 20
    assert regressor.layer_scores_ is None
    assert not hasattr(regressor, "feature_names_in_")


def test_same_random_state_same_predictions_to_the_last_bit(llm):
    texts, y = reviews(60)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = (
        make(llm, max_epochs=3, random_state=seed).fit(texts, y).predict(texts)
        for seed in (0, 0, 1)
    )
    assert (first == second).all()
    assert (first != other).any()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_prediction_does_not_depend_on_company_or_order(llm, monkeypatch):
    texts, y = reviews(60)
    fresh = [f"{text} and so on {i}" for i, text in enumerate(texts)]
    regressor = make(llm, max_epochs=3).fit(texts, y)
    together = regressor.predict(fresh)
    monkeypatch.setattr("sklearn_relish.states.contents._cached", {})  # so that they are read anew
    np.testing.assert_array_equal(regressor.predict(fresh[::-1]), together[::-1])
    monkeypatch.setattr("sklearn_relish.states.contents._cached", {})
    alone = [regressor.predict([text])[0] for text in fresh]
    np.testing.assert_array_equal(alone, together)


def test_several_targets(llm):
    texts, y = reviews(300)
    Y = np.column_stack([y, -1000 * y, np.full(len(y), 7.25)])
    with pytest.warns(UserWarning, match=r"y is constant in columns \[2\]"):
        regressor = make(llm, max_epochs=20).fit(texts, Y)
    predicted = regressor.predict(texts)
    assert predicted.shape == Y.shape
    assert np.corrcoef(predicted[:, 0], predicted[:, 1])[0, 1] < -0.9
    assert (predicted[:, 2] == 7.25).all()
    assert make(llm, max_epochs=1).fit(texts, y[:, None]).predict(texts).shape == (len(y), 1)


@pytest.mark.parametrize("n_rows", [1, 5])
def test_constant_target_predicts_the_constant_with_a_warning(llm, n_rows):
    with pytest.warns(UserWarning, match="y is constant: the prediction will be that constant"):
        regressor = make(llm, max_epochs=1).fit(["a", "b", "c", "d", "e"][:n_rows], [0.1] * n_rows)
    assert regressor.predict(["a", "z"]).tolist() == [0.1, 0.1]


def test_weight_zero_is_as_good_as_absent(llm):
    texts, y = reviews(80)
    weight = np.r_[np.ones(60), np.zeros(20)]
    weighted = make(llm, max_epochs=3).fit(texts, y, sample_weight=weight)
    absent = make(llm, max_epochs=3).fit(texts[:60], y[:60])
    assert (weighted.predict(texts) == absent.predict(texts)).all()


def test_columns_are_rendered_and_named_as_in_fit(llm):
    texts, y = reviews(60)
    frame = pd.DataFrame({"review": texts, "stars": y // 20})
    regressor = make(llm, max_epochs=3).fit(frame, y)
    assert regressor.feature_names_in_.tolist() == ["review", "stars"]
    expected = regressor.predict(frame)
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        assert (regressor.predict(frame.to_numpy()) == expected).all()
    for wrong in (frame[["stars", "review"]], frame.assign(more=1), frame[["review"]]):
        with pytest.raises(ValueError, match="feature names should match"):
            regressor.predict(wrong)
        with pytest.raises(ValueError, match="pass these columns in this order"):
            regressor.predict(wrong.to_dict("list"))
    lines = [
        f"review: {text}\nstars: {int(stars)}" for text, stars in frame.itertuples(index=False)
    ]
    assert (make(llm, max_epochs=3).fit(lines, y).predict(lines) == expected).all()
    asked = make(llm, max_epochs=3, prompt="{review} ({stars})").fit(frame, y)
    assert asked.predict(frame).shape == (60,)


OFFLINE = {"model": "no/such", "model_kwargs": {"local_files_only": True}}


def refuse_to_read(*_, **__):
    pytest.fail("the model was asked to read")


@pytest.mark.parametrize(
    ("X", "y", "changes", "error", "message"),
    [
        ("one text", [1.0], {}, ValueError, "X is a single str"),
        ([], [], {}, ValueError, "no rows"),
        (["a", None], [1, 2], {}, ValueError, "missing texts in row 1"),
        ([b"a", b"b"], [1, 2], {}, TypeError, "bytes in rows 0, 1"),
        (np.arange(3.0), [1, 2, 3], {}, ValueError, "holds no text"),
        (["a", "b"], [1, 2, 3], {}, ValueError, "inconsistent numbers of samples"),
        (["a", "b"], None, {}, ValueError, "requires y to be passed"),
        (["a", "b"], [1, np.nan], {}, ValueError, "y contains NaN or infinity in row 1"),
        (["a", "b", "c"], [np.inf, 1, -np.inf], {}, ValueError, "infinity in rows 0, 2"),
        (["a", "b"], 3.0, {}, ValueError, "must hold a number for each row"),
        (
            ["a", "b"],
            np.array(["2020", "2021"], "M8[Y]"),
            {},
            ValueError,
            "must hold a number for each row",
        ),
        (["a", "b"], [1e200, 1.1e200], {}, ValueError, "spans more than float64 can square"),
        (["a", "b"], [1e-200, 1.1e-200], {}, ValueError, "spans more than float64 can square"),
        (list("abcdefghi"), np.arange(9), {"validation_fraction": 0.99}, ValueError, "leaves none"),
        (["a", "b"], [1, 2], {"device": "gpu"}, ValueError, "device='gpu' is not available"),
        (["a", "b"], ["x", "y"], {}, ValueError, "y holds no number in rows 0, 1"),
        (["a", "b"], [1, 2], {"loss": "hubris"}, ValueError, "'loss' parameter .* must be"),
        (["a", "b"], [1, 2], {"n_iterations": 0}, ValueError, "'n_iterations' parameter"),
        (["a", "b"], [1, 2], {"n_heads": 5}, ValueError, "latent_size=32 is not a multiple"),
        (["a", "b"], [1, 2], {"layer": 4}, ValueError, "which has 3 layers"),
        (["a", "b"], [1, 2], {"layer": 1.5}, ValueError, "'layer' parameter"),
        (["a", "b"], [1, 2], {"dtype": "int8"}, ValueError, "dtype"),
        (["a", "b"], [1, 2], {"prompt": "{review}"}, ValueError, "which is no column"),
        (["a", "b"], [1, 2], OFFLINE, OSError, "No model 'no/such' was found"),
    ],
)
def test_bad_input_is_refused_before_any_work(monkeypatch, X, y, changes, error, message):
    monkeypatch.setattr(FrozenLLM, "read", refuse_to_read)
    parameters = {"model": str(tiny_model()), **changes}
    with pytest.raises(error, match=message):
        make(parameters.pop("model"), **parameters).fit(X, y)


def test_unknown_options_and_options_of_a_given_model(llm):
    with pytest.raises(TypeError, match="n_iteration"):
        RelishRegressor(n_iteration=3)
    with pytest.raises(ValueError, match="Invalid parameter 'depth'"):
        RelishRegressor().set_params(depth=3)
    with pytest.raises(ValueError, match="pass them to FrozenLLM instead"):
        make(llm, dtype="bfloat16").fit(["a", "b"], [1, 2])


def test_predict_checks_its_input(llm):
    texts, y = reviews(40)
    regressor = make(llm, max_epochs=1).fit(texts, y)
    with pytest.raises(ValueError, match="missing texts in row 0"):
        regressor.predict([None, "a"])
    with pytest.raises(ValueError, match="X has 2 features, but RelishRegressor is expecting 1"):
        regressor.predict([["a", "b"]])


@pytest.mark.parametrize("dump", ["pickle", "joblib"])
def test_pickle_holds_no_llm(tmp_path, dump):
    texts, y = reviews(40)
    regressor = make(str(tiny_model()), max_epochs=1, latent_size=256, n_heads=8).fit(texts, y)
    path = tmp_path / "model"
    (
        joblib.dump(regressor, path)
        if dump == "joblib"
        else path.write_bytes(pickle.dumps(regressor))
    )
    head = sum(parameter.numel() for parameter in regressor.head_.parameters())
    assert 4 * head < path.stat().st_size < 4 * head + 50_000
    opened = joblib.load(path) if dump == "joblib" else pickle.loads(path.read_bytes())
    assert (opened.predict(texts) == regressor.predict(texts)).all()
    assert all(parameter.device.type == "cpu" for parameter in regressor.head_.parameters())


def test_a_model_is_loaded_once_however_many_estimators_name_it(monkeypatch):
    loads = []
    original = FrozenLLM._from_pretrained
    monkeypatch.setattr(
        FrozenLLM,
        "_from_pretrained",
        lambda self, auto, **kw: (loads.append(auto.__name__), original(self, auto, **kw))[1],
    )
    texts, y = reviews(30)
    for regressor in (make(str(tiny_model())), clone(make(tiny_model(), n_iterations=1))):
        regressor.set_params(max_epochs=1, dtype="float32").fit(texts, y).predict(texts)
    make_pipeline(LLMEncoder(str(tiny_model()), dtype="float32"), RidgeCV()).fit(texts, y)
    # The layers up to the one that is read are loaded with a changed class of the model.
    assert sorted(loads) == ["AutoConfig", "AutoTokenizer", "LlamaModel"]


def test_a_search_reads_each_text_once(monkeypatch):
    tokens = []
    original = FrozenLLM._read_batch
    monkeypatch.setattr(
        FrozenLLM,
        "_read_batch",
        lambda self, batch, layer: (tokens.extend(batch), original(self, batch, layer))[1],
    )
    texts, y = reviews(60)
    texts = [f"{text} {i}" for i, text in enumerate(texts)]
    search = GridSearchCV(
        make(str(tiny_model()), max_epochs=1),
        {"n_iterations": [1, 2], "latent_size": [16, 32]},
        cv=3,
    ).fit(texts, y)
    assert set(search.best_params_) == {"n_iterations", "latent_size"}
    cross_val_score(search.best_estimator_, texts, y, cv=4)
    assert len(tokens) == len(texts)


def test_silent_by_default_and_bars_when_asked(llm, capfd, monkeypatch):
    texts, y = reviews(30)
    monkeypatch.setattr("sklearn_relish.utils.progress.DELAY_SECONDS", 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(llm, max_epochs=2).fit(texts, y).predict(["fresh"])
    assert capfd.readouterr() == ("", "")
    make(llm, max_epochs=2, verbose=1, max_length=100).fit(texts, y)
    assert "Fit: 100%" in capfd.readouterr().err


def test_short_work_shows_no_bar(llm, capfd, monkeypatch):
    monkeypatch.setattr("sklearn_relish.utils.progress.DELAY_SECONDS", 1000.0)
    texts, y = reviews(30)
    regressor = pickle.loads(pickle.dumps(make(llm, max_epochs=2, verbose=1).fit(texts, y)))
    regressor.predict(["fresh"])
    assert capfd.readouterr().err == ""


def test_worker_processes_show_no_bars(llm, capfd, monkeypatch, tmp_path):
    monkeypatch.setattr("sklearn_relish.utils.progress.DELAY_SECONDS", 0.0)
    monkeypatch.setattr("multiprocessing.current_process", lambda: SimpleNamespace(name="Worker-1"))
    texts, y = reviews(30)
    make(llm, max_epochs=2, verbose=1, memory=tmp_path).fit(texts, y)
    assert capfd.readouterr().err == ""


def test_several_estimators_hold_out_different_rows_and_are_averaged(llm):
    texts, y = reviews(50)
    regressor = make(llm, max_epochs=2, n_estimators=3, validation_fraction=0.3).fit(texts, y)
    assert len(regressor.head_.heads) == len(regressor.best_epoch_) == 3
    assert [epoch["estimator"] for epoch in regressor.history_] == [0, 0, 1, 1, 2, 2]
    text = np.repeat(np.arange(50), 2)  # each text twice
    held_out = held_out_rows(text, 0.3, 3, np.random.RandomState(0))
    assert len(np.unique(text[np.concatenate(held_out)])) == 45
    many = held_out_rows(text, 0.3, 5, np.random.RandomState(0))
    for rows in [*held_out, *many]:
        assert len(rows) == 2 * len(np.unique(text[rows])) == 30
    assert regressor.head_.linear is not None
    assert make(llm, max_epochs=1, linear_path=False).fit(texts, y).head_.linear is None


def test_auto_estimators_are_more_of_a_small_set(llm):
    for n_rows, n_estimators in ((40, 5), (1_001, 3)):
        texts, y = reviews(n_rows)
        regressor = make(llm, max_epochs=1, n_estimators="auto").fit(texts, y)
        assert len(regressor.head_.heads) == n_estimators


@pytest.mark.parametrize("best", [1, 3])
def test_auto_takes_the_layer_that_tells_most(best, monkeypatch):
    """Of the three layers all but one are made to tell nothing."""
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    states_at, start_pass, tokens = llm._forward_pass.states_at, llm._read_batch, []

    def counted(batch, layers):
        tokens.append(sum(map(len, batch)))
        return start_pass(batch, layers)

    def one_tells(layers, **inputs):
        found = zip(layers, states_at(layers, **inputs), strict=True)
        return [some if layer == best else torch.ones_like(some) for layer, some in found]

    monkeypatch.setattr(llm._forward_pass, "states_at", one_tells)
    monkeypatch.setattr(llm, "_read_batch", counted)
    monkeypatch.setattr("sklearn_relish.regressor.SHARES", (2 / 3, 1 / 3, 1.0))
    texts, y = reviews(100)
    texts = [f"{text} {i}" for i, text in enumerate(texts)]
    regressor = make(llm, layer="auto", max_epochs=1).fit(texts, y)
    assert regressor.layer_ == best
    assert set(regressor.layer_scores_) == {1, 2, 3}
    assert max(regressor.layer_scores_, key=regressor.layer_scores_.get) == best
    # Beside one reading of all rows nothing is read: the sample's states of the winner are kept.
    assert sum(tokens) == sum(map(len, texts))
    assert clone(regressor).layer == "auto"
    regressor.predict(texts[:3])


@pytest.mark.parametrize("n_rows", [1, 2, 3, 12, 30])
def test_the_defaults_fit_the_smallest_sets(llm, n_rows):
    texts, y = [f"text {i}" for i in range(n_rows)], np.arange(n_rows)
    for changes in ({}, {"layer": "auto"}):
        regressor = make(llm, max_epochs=2, n_estimators="auto", **changes)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="y is constant")
            assert np.isfinite(regressor.fit(texts, y).predict(texts)).all()


def test_equal_texts_are_held_out_together(llm):
    """Rows given twice teach the ridges nothing about themselves."""
    texts = [f"text number {i}" for i in range(40)] * 2
    y = np.tile(np.random.default_rng(0).normal(size=40), 2)
    regressor = make(llm, max_epochs=2, n_estimators=5, validation_fraction=0.2).fit(texts, y)
    assert regressor.score([f"text number {i}" for i in range(40)], y[:40]) < 0.5


def test_a_fit_works_under_metadata_routing(llm):
    texts, y = reviews(30)
    with config_context(enable_metadata_routing=True):
        regressor = make(llm, max_epochs=1).fit(texts, y, sample_weight=np.ones(30))
    assert regressor.head_.linear is None  # 3 rows are held out
    with config_context(enable_metadata_routing=True):
        regressor.set_params(n_estimators=5).fit(texts, y, sample_weight=np.ones(30))
    assert regressor.head_.linear is not None


def test_a_weight_of_next_to_nothing_is_as_good_as_none(llm):
    texts, y = reviews(60)
    y[-1] = 1e6
    weight = np.r_[np.ones(59), 1e-300]
    predicted = make(llm, max_epochs=2).fit(texts, y, sample_weight=weight).predict(texts)
    without = make(llm, max_epochs=2).fit(texts[:-1], y[:-1]).predict(texts)
    np.testing.assert_allclose(predicted, without)


def test_auto_epochs_make_enough_steps_of_a_small_set(llm):
    texts, y = reviews(50)
    assert make(llm).fit(texts, y).n_epochs_ == 100  # 45 rows, 2 steps an epoch


def test_a_refused_or_interrupted_fit_leaves_the_earlier_one(llm, monkeypatch):
    texts, y = reviews(40)
    regressor = make(llm, max_epochs=1).fit(texts, y)
    before = regressor.predict(texts)
    with pytest.raises(ValueError, match="row 0"):
        regressor.fit(pd.DataFrame({"a": texts, "b": texts}), np.r_[np.nan, y[1:]])
    assert (regressor.predict(texts) == before).all()
    monkeypatch.setattr(
        FrozenLLM, "_read_batch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        regressor.fit(["fresh", "texts"], [-1e6, 1e6])
    assert (regressor.predict(texts) == before).all()


def test_another_model_than_the_fitted_one_is_said():
    texts, y = reviews(40)
    regressor = make(str(tiny_model()), max_epochs=1).fit(texts, y)
    regressor.set_params(model=str(tiny_model("gpt2")))
    with pytest.warns(
        UserWarning, match="differs from the language model, or from its revision or prefix, used"
    ):
        regressor.predict(texts)


def test_numpy_numbers_are_parameters_too(llm):
    texts, y = reviews(40)
    numpy_parameters = {
        "max_epochs": np.int64(2),
        "batch_size": np.int32(8),
        "n_heads": np.int64(2),
    }
    assert make(llm, layer=np.int64(2), **numpy_parameters).fit(texts, y).n_epochs_ == 2


def test_fits_in_threads_do_not_disturb_each_other(llm):
    texts, y = reviews(40)
    with joblib.parallel_backend("threading", n_jobs=4):
        fits = joblib.Parallel()(
            joblib.delayed(make(llm, max_epochs=1).fit)(texts, y) for _ in range(12)
        )
    first, *others = [fit.predict(texts) for fit in fits]
    assert all((other == first).all() for other in others)


def test_html_repr_shows_the_parameters(llm):
    assert "n_iterations" in make(llm)._repr_html_()


def test_encoder_pools_the_states_that_the_regressor_reads(llm):
    texts, _ = reviews(10)
    states = dict.fromkeys(("mean", "last"))
    for pooling in states:
        states[pooling] = LLMEncoder(llm, pooling=pooling, state_norm=None).fit_transform(texts)
    raw = next(iter(llm.read([texts[0]], layers=[2], max_length=512)))[1][0].arrays[0]
    np.testing.assert_allclose(states["mean"][0], raw.mean(0), atol=1e-5)
    np.testing.assert_allclose(states["last"][0], raw[-1], atol=1e-5)
    encoder = LLMEncoder(llm).fit(texts)
    assert encoder.transform(texts).dtype == np.float32
    assert encoder.get_feature_names_out()[-1] == f"llmencoder{SIZE - 1}"
    normed = raw / raw.square().mean(1, keepdim=True).sqrt()
    np.testing.assert_allclose(encoder.transform(texts)[0], normed.mean(0), atol=1e-4)


def test_a_pickle_opens_in_another_process_without_a_gpu_and_predicts_the_same(tmp_path, llm):
    texts, y = reviews(30)
    regressor = make(str(tiny_model()), max_epochs=1).fit(texts, y)
    (tmp_path / "model").write_bytes(pickle.dumps(regressor))
    code = (
        "import pickle, pathlib, sys; r = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes());"
        "print(*r.predict(['good', 'poor']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    np.testing.assert_allclose(
        [float(number) for number in run.stdout.split()],
        regressor.predict(["good", "poor"]),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("loss", "quantile"),
    [
        ("squared_error", 0.5),
        ("absolute_error", 0.5),
        ("quantile", 0.5),
        ("quantile", [0.1, 0.5, 0.9]),
        ("poisson", 0.5),
        ("gamma", 0.5),
    ],
)
@pytest.mark.parametrize("n_outputs", [1, 2])
def test_every_loss_learns(llm, loss, quantile, n_outputs):
    texts, y = reviews(300)
    fresh, truth = reviews(200, seed=1)
    if n_outputs == 2:
        y, truth = np.stack([y, 10 * y], axis=1), np.stack([truth, 10 * truth], axis=1)
    regressor = make(llm, loss=loss, quantile=quantile, max_epochs=40, n_estimators=2).fit(texts, y)
    assert regressor.score(fresh, truth) > 0.8
    assert regressor.validation_score_ > 0.7
    interval = regressor.predict_interval(fresh, coverage=0.8)
    assert interval.shape == (*truth.shape, 2)
    assert (interval[..., 0] <= interval[..., 1]).all()
    if loss == "quantile":
        quantiles = regressor.predict_quantiles(fresh)
        assert quantiles.shape == (*truth.shape, np.size(quantile))
        assert (np.diff(quantiles) >= 0).all()
        assert (quantiles == regressor.predict(fresh)[..., None]).any(axis=-1).all()
    else:
        assert not hasattr(regressor, "predict_quantiles")
        with pytest.raises(AttributeError) as caught:
            regressor.predict_quantiles(fresh)
        assert f"needs loss='quantile', but the loss is {loss!r}" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("changes", "y", "message"),
    [
        ({"loss": "poisson"}, [1, -1, 0, 2, -3], r"of 0 or more: y is not in rows 1, 4"),
        ({"loss": "gamma"}, [1, 0, 1, 2, 3], r"above 0: y is not in row 1"),
        ({"loss": "quantile", "quantile": [0.9, 0.1]}, [1, 2, 3, 4, 5], "in rising order"),
        ({"loss": "quantile", "quantile": []}, [1, 2, 3, 4, 5], "in rising order"),
        ({"quantile": 0.9}, [1, 2, 3, 4, 5], "quantile=0.9 has no effect with loss='huber'"),
        ({"loss": "gamma", "quantile": [0.5]}, [1, 2, 3, 4, 5], r"quantile=\[0.5\] has no effect"),
        (
            {"loss": "poisson", "linear_path": True},
            [1, 2, 3, 4, 5],
            "linear_path=True is not available with loss",
        ),
        (
            {"loss": "quantile", "linear_path": True},
            [1, 2, 3, 4, 5],
            "not available with loss='quantile': pass linear_path='auto' or False",
        ),
    ],
)
def test_targets_and_parameters_that_a_loss_is_not_for(llm, changes, y, message):
    for method in ("fit", "partial_fit"):
        with pytest.raises(ValueError, match=message):
            getattr(make(llm, **changes), method)(list("abcde"), y)


@pytest.mark.parametrize("loss", ["huber", "squared_error", "absolute_error", "gamma"])
def test_the_linear_path_is_there_where_the_loss_allows_it(llm, loss):
    texts, y = reviews(60)
    settings = {"loss": loss, "max_epochs": 1, "n_estimators": 2, "validation_fraction": 0.4}
    linear = make(llm, **settings).fit(texts, y).head_.linear
    assert (linear is not None) == (loss in ("huber", "squared_error"))
    if linear is not None:
        asked = make(llm, linear_path=True, **settings).fit(texts, y).head_.linear
        assert torch.equal(asked.weight, linear.weight)
    assert make(llm, linear_path=False, **settings).fit(texts, y).head_.linear is None


def test_intervals_need_held_out_rows(llm):
    texts, y = reviews(60)
    regressor = make(llm, max_epochs=1, early_stopping=False).fit(texts, y)
    assert regressor.validation_score_ is None
    with pytest.raises(ValueError, match="There are no intervals"):
        regressor.predict_interval(texts)
    regressor.set_params(early_stopping=True).fit(texts, y)
    with pytest.raises(ValueError, match="coverage must be above 0 and below 1, got 90"):
        regressor.predict_interval(texts, coverage=90)
    with pytest.raises(ValueError, match=r"coverage must be .*, got 'high'"):
        regressor.predict_interval(texts, coverage="high")
    with pytest.raises(ValueError, match="max_length must be 1 or more, got 0"):
        clone(regressor).fit(texts, y).set_params(max_length=0).predict(texts)
    with pytest.raises(ValueError, match=r"coverage=0\.99 needs 99 held-out rows"):
        regressor.predict_interval(texts, coverage=0.99)


def everything(regressor, texts):
    """All that a fitted regressor says of texts."""
    said = [regressor.predict(texts), *regressor.staged_predict(texts)]
    if regressor._conformal is not None:
        said.append(regressor.predict_interval(texts, coverage=0.5))
    if regressor.loss == "quantile":
        said.append(regressor.predict_quantiles(texts))
    return said


FITS = [
    {},
    {"n_estimators": 3, "validation_fraction": 0.4},
    {"n_estimators": 2, "layer": "auto", "loss": "squared_error"},
    {"early_stopping": False},
    {"loss": "quantile", "quantile": [0.1, 0.5, 0.9]},
    {"loss": "poisson", "share_weights": True},
    {"deep_supervision": False, "state_norm": None, "batch_size": 7},
]


@pytest.mark.parametrize("method", ["fit", "partial_fit", "warm_start"])
@pytest.mark.parametrize("changes", FITS)
def test_a_weight_is_a_repetition_and_the_order_is_nothing(llm, method, changes):
    """To the last bit; equal texts with other targets, and rows of no weight, among the rows."""
    random = np.random.RandomState(0)
    texts = np.array([f"{text} {i % 50}" for i, text in enumerate(reviews(60)[0])])
    y = np.round(random.normal(100, 20, (60, 2)), 1)
    texts[50:55], y[50:55] = texts[:5], y[:5]  # equal pairs
    texts[55:] = texts[5:10]  # equal texts
    weight = random.randint(0, 4, 60)
    rows = random.permutation(np.repeat(np.arange(60), weight))
    order = random.permutation(60)

    def fit(texts, y, weight=None):
        regressor = make(llm, max_epochs=1, **changes)
        if method == "partial_fit":
            regressor.partial_fit(texts, y, weight)
            return regressor.partial_fit(texts, y, weight)
        regressor.fit(texts, y, weight)
        if method == "warm_start":
            regressor.set_params(warm_start=True).fit(texts, y, weight)
        return regressor

    weighted = fit(texts, y, weight)
    for other in (fit(texts[rows], y[rows]), fit(texts[order], y[order], 8 * weight[order])):
        assert other.history_ == weighted.history_
        assert other.validation_score_ == weighted.validation_score_
        for ours, theirs in zip(everything(other, texts), everything(weighted, texts), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_weights_are_summed_alike_in_any_order(llm):
    """0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1 in floating point."""
    texts, y = np.repeat(["a", "b", "c", "d"], 3), np.repeat([1.0, 2.0, 4.0, 8.0], 3)
    weight = np.tile([0.1, 0.2, 0.3], 4)
    one = make(llm, max_epochs=2).fit(texts, y, weight).predict(texts)
    weight[3:6], weight[9:] = [0.3, 0.2, 0.1], [0.2, 0.3, 0.1]
    other = make(llm, max_epochs=2).fit(texts, y, weight).predict(texts)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("changes", [{}, {"loss": "quantile", "quantile": [0.1, 0.9]}])
def test_enormous_weights_and_batches(llm, changes):
    texts, y = reviews(40)
    weight = np.linspace(0.5, 1.0, 40)
    enormous = 1.7e308 * weight  # their sum is infinite
    plain = make(llm, max_epochs=2, batch_size=40, **changes).fit(texts, y, weight)
    settings = {"max_epochs": 2, "batch_size": 10**18, **changes}
    regressor = make(llm, **settings).fit(texts, y, enormous)
    np.testing.assert_allclose(regressor.predict(texts), plain.predict(texts), rtol=1e-5)
    assert np.isfinite(make(llm, **settings).partial_fit(texts, y, enormous).predict(texts)).all()


def test_a_weight_that_outweighs_all_others(llm):
    texts, y = reviews(40)
    weight = np.ones(40)
    weight[3] = 1e17  # the sum of all weights is the same number
    regressor = make(llm, max_epochs=2).fit(texts, y, weight)
    np.testing.assert_allclose(regressor.predict(texts[3:4]), y[3], atol=1.0)


def test_warm_start_goes_on_where_the_last_fit_ended(llm):
    texts, y = reviews(200)
    regressor = make(llm, max_epochs=8, n_estimators=2, warm_start=True).fit(texts, y)
    before, mean = regressor.predict(texts), regressor._y_mean
    assert regressor.validation_score_ is not None
    regressor.set_params(learning_rate=1e-9).fit(texts, y + 1000.0)
    # In the same units, from the same weights, with the same ridges.
    np.testing.assert_array_equal(regressor._y_mean, mean)
    np.testing.assert_allclose(regressor.predict(texts), before, rtol=1e-4)
    # Other texts are held out now, and the heads may have seen them.
    assert regressor.validation_score_ is None
    with pytest.raises(ValueError, match="There are no intervals"):
        regressor.predict_interval(texts)
    fresh = make(llm, max_epochs=1).fit(texts, y).history_[0]["train_loss"]
    regressor.set_params(learning_rate=3e-3, max_epochs=1).fit(texts, y)
    assert regressor.history_[0]["train_loss"] < fresh / 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_size": 16}, "latent_size=32, but 16 was requested"),
        ({"n_estimators": 3}, "n_estimators=3, but 2 heads are fitted"),
        ({"loss": "poisson"}, "log link of the loss=False, but True"),
        ({"loss": "quantile", "quantile": [0.1, 0.9]}, "number of quantiles=1, but 2"),
        ({"loss": "quantile", "quantile": 0.9}, "The fitted ridges can't be used"),
    ],
)
def test_heads_are_not_trained_further_as_others(llm, changes, message):
    texts, y = reviews(60)
    settings = {"max_epochs": 1, "n_estimators": 2, "validation_fraction": 0.4}
    regressor = make(llm, warm_start=True, **settings).fit(texts, y)
    for fit in (regressor.fit, regressor.partial_fit):
        regressor.set_params(**changes)
        with pytest.raises(ValueError, match=message):
            fit(texts, y)
    with pytest.raises(ValueError, match=r"2 features, but .* expecting 1 features"):
        regressor.fit(np.array([texts, texts]).T, y)


def test_data_that_arrives_in_pieces(llm):
    texts, y = reviews(600)
    fresh, truth = reviews(200, seed=1)
    regressor = make(llm, n_estimators=2)
    scores = []
    for start in range(0, 600, 100):
        piece = slice(start, start + 100)
        assert regressor.partial_fit(texts[piece], y[piece]) is regressor
        scores.append(regressor.score(fresh, truth))
    assert scores[-1] > 0.9
    assert scores[-1] > scores[0]
    assert regressor.n_epochs_ == len(regressor.history_) == 6 * 10 * 2
    with pytest.raises(ValueError, match="There are no intervals"):
        regressor.predict_interval(fresh)
    kept = pickle.loads(pickle.dumps(regressor))
    regressor.partial_fit(texts[:1], y[:1])  # a row alone is no constant target
    regressor = pickle.loads(pickle.dumps(kept))
    with pytest.raises(ValueError, match="NaN"):
        regressor.partial_fit(texts[:2], [1.0, np.nan])
    np.testing.assert_array_equal(regressor.predict(fresh), kept.predict(fresh))


def test_long_texts_in_windows(llm):
    """What tells stands at the end, beyond what is read at once."""
    texts, y = reviews(300)
    long = ["x" * 60 + text for text in texts]
    settings = {"max_length": 32, "max_epochs": 20}
    with pytest.warns(UserWarning, match="were cut"):
        blind = make(llm, **settings).fit(long[:200], y[:200])
    with pytest.warns(UserWarning, match="were cut"):
        assert blind.score(long[200:], y[200:]) < 0.1
    regressor = make(llm, long_text="window", **settings).fit(long[:200], y[:200])
    assert regressor.score(long[200:], y[200:]) > 0.8


def test_batches_of_long_texts_are_taken_in_parts(llm, monkeypatch):
    texts, y = reviews(100)
    whole = make(llm, max_epochs=2).fit(texts, y)
    monkeypatch.setattr("sklearn_relish.training.batching.STEP_TOKENS", 40)
    parts = make(llm, max_epochs=2).fit(texts, y)
    np.testing.assert_allclose(parts.predict(texts), whole.predict(texts), rtol=1e-4)


def test_a_prompt_goes_through_the_chat_template(llm, monkeypatch):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    texts, y = reviews(60)
    chat = make(llm, chat_template=True, prompt="How good? {text}", max_epochs=2).fit(texts, y)
    asked = [f"<user>How good? {text}<answer>" for text in texts]
    plain = make(llm, max_epochs=2).fit(asked, y)
    np.testing.assert_array_equal(chat.predict(texts), plain.predict(asked))


def test_two_quantiles_predict_what_is_between_them(llm):
    texts, y = reviews(100)
    regressor = make(llm, loss="quantile", quantile=[0.05, 0.95], max_epochs=2).fit(texts, y)
    middle = regressor.predict_quantiles(texts).mean(axis=1)
    np.testing.assert_allclose(regressor.predict(texts), middle)


def test_a_fit_on_a_constant_target_does_not_spoil_later_ones(llm):
    texts, y = reviews(100)
    with pytest.warns(UserWarning, match="y is constant"):
        regressor = make(llm, max_epochs=10).fit(texts, np.full(len(y), 3.0))
    assert regressor.head_.head_weight.tolist() == [1.0]
    assert regressor.partial_fit(texts, y).score(texts, y) > 0.5


@pytest.mark.parametrize("pair", [False, True])
def test_a_fit_does_not_depend_on_settings_of_torch(llm, pair):
    texts, y = reviews(60)
    X = pd.DataFrame({"a": texts, "b": texts[::-1]}) if pair else texts
    expected = make(llm, max_epochs=2).fit(X, y)
    with torch.inference_mode():
        found = make(llm, max_epochs=2).fit(X, y)
        found.preview(X)
    np.testing.assert_array_equal(found.predict(X), expected.predict(X))
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    try:
        found = make(llm, max_epochs=2).fit(X, y)
        found.preview(X)
        assert {weight.dtype for weight in found.head_.parameters()} == {torch.float32}
        assert found.partial_fit(X, y).score(X, y) > -1
        assert LLMEncoder(llm).fit_transform(X).dtype == np.float32
    finally:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)


def test_quantiles_are_those_of_the_fit(llm):
    texts, y = reviews(100)
    regressor = (
        make(llm, max_epochs=1).fit(texts, y).set_params(loss="quantile", quantile=[0.1, 0.9])
    )
    assert not hasattr(regressor, "predict_quantiles")


def test_a_constant_column_and_one_that_is_not(llm):
    texts, y = reviews(100)
    both = np.stack([y, np.full(100, 7.0)], axis=1)
    with pytest.warns(UserWarning, match=r"y is constant in columns \[1\]"):
        regressor = make(llm, loss="gamma", max_epochs=10).fit(texts, both)
    assert (regressor.predict(texts)[:, 1] == 7).all()
    assert np.corrcoef(regressor.predict(texts)[:, 0], y)[0, 1] > 0.5
    assert regressor.validation_score_ > 0.2  # of the column that varies alone
    units = regressor._y_mean[0], regressor._y_scale[0]
    regressor.partial_fit(texts[:20], both[:20] + np.arange(20.0)[:, None])
    assert (regressor._y_mean[0], regressor._y_scale[0]) == units


@pytest.mark.parametrize("changes", [*FITS, {"random_state": None}])
def test_a_fit_leaves_the_global_random_states_alone(llm, changes):
    texts, y = reviews(60)
    before = global_random_states()
    settings = {"max_epochs": 1, "n_estimators": 2, "validation_fraction": 0.4, **changes}
    regressor = make(llm, warm_start=True, **settings)
    for method in (regressor.fit, regressor.fit, regressor.partial_fit):
        method(texts, y)
    everything(pickle.loads(pickle.dumps(regressor)), texts)
    assert global_random_states() == before


def global_random_states():
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    return random.getstate(), pickle.dumps(numpy), bytes(torch.get_rng_state())


@pytest.mark.parametrize("changes", FITS)
def test_texts_of_one_token(llm, changes):
    texts, y = list("abcdefghijklmnopqrstuvwxyz"), np.arange(1.0, 27.0)
    assert [len(ids) for ids in llm.tokenizer(texts)["input_ids"]] == [1] * 26
    regressor = make(llm, max_epochs=2, **changes).fit(texts, y)
    everything(regressor, ["a"])
    for found in (*regressor.attention(["a"]), *regressor.attention(["a", "bcd"])[:1]):
        assert (found.text, found.tokens, found.spans.tolist()) == ("a", ["a"], [[0, 1]])
        shape = len(regressor.head_.heads), regressor.n_iterations, regressor.n_heads, 1
        np.testing.assert_allclose(found.weights, np.ones(shape))
    regressor.partial_fit(["a"], [3.0])
    assert all(np.isfinite(said).all() for said in everything(regressor, ["a", "z"]))


def test_texts_of_one_token_are_drawn_and_encoded(llm):
    pytest.importorskip("matplotlib").use("Agg")
    texts, y = list("abcdef"), np.arange(6.0)
    regressor = make(llm, max_epochs=1).fit(texts, y)
    assert RefinementDisplay.from_estimator(regressor, "a").attention.tokens == ["a"]
    RefinementDisplay.from_estimator(regressor, texts, y)
    for pooling in ("mean", "last"):
        assert LLMEncoder(llm, pooling=pooling).fit_transform(["a"]).shape == (1, SIZE)


@pytest.fixture
def odd_pieces(monkeypatch):
    """Stores give states in small pieces of any order; the sizes of these pieces."""
    sizes = []

    def pieces(store, texts, llm, cut, *, progress=False, **settings):
        states = store.fetch(texts, llm, progress=progress, **settings)
        for rows in np.array_split(np.random.RandomState(0).permutation(len(texts)), 7):
            sizes.append(len(rows))
            yield rows, states[torch.from_numpy(rows)]

    monkeypatch.setattr(StateStore, "_pieces", pieces)
    return sizes


@pytest.mark.parametrize("changes", FITS)
def test_predictions_are_made_piece_by_piece(llm, changes, request):
    texts, y = reviews(60)
    texts = [f"{text} {i}" for i, text in enumerate(texts)]
    regressor = make(llm, max_epochs=2, **changes).fit(texts, y)
    said, attention = everything(regressor, texts), regressor.attention(texts)
    sizes = request.getfixturevalue("odd_pieces")
    for ours, whole in zip(everything(regressor, texts), said, strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-9)
    for ours, whole in zip(regressor.attention(texts), attention, strict=True):
        assert ours.tokens == whole.tokens
        np.testing.assert_allclose(ours.weights, whole.weights, rtol=1e-9)
    assert max(sizes) == 9


def test_an_encoder_works_piece_by_piece_but_where_it_fills_a_store(llm, odd_pieces):
    texts, _ = reviews(60)
    texts = [f"{text} {i}" for i, text in enumerate(texts)]
    encoder = LLMEncoder(llm)
    filled = encoder.fit_transform(texts)
    assert odd_pieces == []
    np.testing.assert_array_equal(encoder.transform(texts), filled)
    assert max(odd_pieces) == 9


def test_predictions_while_another_thread_refits(llm):
    """Each is that of one fit, never the heads of one in the units of another."""
    texts, y = reviews(60)
    settings = {"max_epochs": 1, "n_estimators": 2, "validation_fraction": 0.4}
    targets = (y, 1000.0 - 50 * y)
    fits = [make(llm, **settings).fit(texts, y) for y in targets]
    expected = [said_by(fit, texts) for fit in fits]
    served = make(llm, **settings).fit(texts, y)
    done, mixed, counts = threading.Event(), [], []

    def serve():
        count = 0
        while not done.is_set() or count == 0:
            said = said_by(served, texts)
            for name, value in said.items():
                if not any((value == fit[name]).all() for fit in expected):
                    mixed.append(name)
            count += 1
        counts.append(count)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for n in range(8):
            served.fit(texts, targets[n % 2])
    finally:
        done.set()
        for thread in threads:
            thread.join(timeout=120)
    assert len(counts) == 3
    assert mixed == []


def said_by(regressor, texts):
    return {
        "predict": regressor.predict(texts),
        "staged_predict": np.stack(list(regressor.staged_predict(texts))),
        "predict_interval": regressor.predict_interval(texts, coverage=0.5),
        "attention": np.concatenate(
            [found.weights.ravel() for found in regressor.attention(texts[:3])]
        ),
    }


@pytest.mark.parametrize("method", ["predict", "staged_predict", "predict_interval", "attention"])
def test_a_refit_within_a_prediction_changes_nothing(llm, method, monkeypatch):
    """The refit comes at the worst moment: when some of the fitted state has been looked at."""
    texts, y = reviews(60)
    settings = {"max_epochs": 1, "n_estimators": 2, "validation_fraction": 0.4}
    regressor = make(llm, **settings).fit(texts, y)
    before = said_by(regressor, texts)[method]
    pieces = StateStore._pieces

    def refit_meanwhile(*args, **kwargs):
        regressor.__dict__ = make(llm, **settings).fit(texts, 1000.0 - 50 * y).__dict__
        yield from pieces(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(StateStore, "_pieces", refit_meanwhile)
        if method == "staged_predict":
            during = np.stack(list(regressor.staged_predict(texts)))
        elif method == "attention":
            found = regressor.attention(texts[:3])
            during = np.concatenate([some.weights.ravel() for some in found])
        else:
            options = {"coverage": 0.5} if method == "predict_interval" else {}
            during = getattr(regressor, method)(texts, **options)
    np.testing.assert_array_equal(during, before)
    assert (said_by(regressor, texts)[method] != before).any()


def test_parameters_that_are_set_during_a_fit_stay(llm, monkeypatch):
    texts, y = reviews(40)
    regressor = make(llm, max_epochs=1)
    fit = RelishRegressor._fit

    def set_meanwhile(fitted, *args):
        fit(fitted, *args)
        regressor.set_params(max_epochs=7)

    monkeypatch.setattr(RelishRegressor, "_fit", set_meanwhile)
    regressor.fit(texts, y)
    assert (regressor.max_epochs, regressor.n_epochs_) == (7, 1)


def test_warnings_name_the_line_of_the_user(llm):
    texts, y = reviews(30)
    texts = [text * 3 for text in texts]
    regressor = make(llm, max_epochs=1, max_length=4)
    encoder = LLMEncoder(llm, max_length=4)
    reading = [
        lambda: regressor.fit(texts, y),
        lambda: regressor.partial_fit(texts, y),
        lambda: regressor.predict(texts),
        lambda: list(regressor.staged_predict(texts)),
        lambda: regressor.attention(texts),
        lambda: regressor.score(texts, y),
        lambda: encoder.fit_transform(texts),
        lambda: encoder.transform(texts),
        lambda: make_pipeline(encoder, RidgeCV()).fit(texts, y),
        lambda: cross_val_score(regressor, texts, y, cv=2),
    ]
    for call in reading:
        with pytest.warns(UserWarning, match="were cut") as caught:
            call()
        assert {warning.filename for warning in caught} == {__file__}
    with pytest.warns(UserWarning, match="y is constant") as caught:
        make(llm, max_epochs=1).fit(texts, np.ones(30))
    assert {warning.filename for warning in caught} == {__file__}
    table = pd.DataFrame({"a": ["x", "y", "z"], "b": [1, 2, 3]})
    regressor = make(llm, max_epochs=1).fit(table, [1, 2, 3])
    with pytest.warns(UserWarning, match="Column 'b' is missing in all rows") as caught:
        regressor.predict(table.assign(b=None))
    assert {warning.filename for warning in caught} == {__file__}

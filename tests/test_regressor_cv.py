"""RelishRegressorCV: which folds it uses, what it is once fitted, and what it refuses."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from inspect import signature

import numpy as np
import pandas as pd
import pytest
from sklearn import config_context
from sklearn.base import clone
from sklearn.metrics import make_scorer, r2_score
from sklearn.model_selection import (
    GroupKFold,
    KFold,
    LeaveOneOut,
    RepeatedKFold,
    TimeSeriesSplit,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from test_regressor import WORDS
from tiny import tiny_model

from sklearn_relish import FrozenLLM, RefinementDisplay, RelishRegressor, RelishRegressorCV
from sklearn_relish.training import search as search_module

GRID = {"n_iterations": [1, 2], "latent_size": [8, 16]}


@pytest.fixture(scope="module")
def llm():
    return FrozenLLM(tiny_model(), device="cpu", dtype="float32")


def reviews(n, seed=0):
    """Different texts, and how positive each is."""
    grades = np.random.default_rng(seed).integers(0, 5, n)
    texts = [f"{WORDS[grade]} {i}" for i, grade in enumerate(grades)]
    return texts, 10.0 + 2 * grades


def make(llm, **parameters):
    settings = {"n_heads": 2, "learning_rate": 5e-3, "max_epochs": 6, "cv": 3, "random_state": 0}
    return RelishRegressorCV(llm, **(GRID | settings | parameters))


@pytest.fixture(scope="module")
def fitted(llm):
    return make(llm, max_epochs=12).fit(*reviews(90))


def test_the_heads_of_the_folds_are_the_ensemble(fitted):
    texts, y = reviews(60, seed=1)
    assert fitted.score(texts, y) > 0.7
    assert len(fitted.head_.heads) == fitted.n_splits_ == 3
    assert fitted.head_.linear is not None
    best = fitted.best_estimator_
    assert isinstance(best, RelishRegressor)
    assert best.get_params()["latent_size"] == fitted.best_params_["latent_size"]
    assert fitted.head_.heads[0].n_iterations == fitted.best_params_["n_iterations"]
    np.testing.assert_array_equal(best.predict(texts), fitted.predict(texts))


def test_results_are_those_of_a_search(fitted):
    results = pd.DataFrame(fitted.cv_results_)
    assert len(results) == 4
    assert {
        "params", "param_latent_size", "param_n_iterations", "split2_test_score",
        "mean_test_score", "std_test_score", "rank_test_score", "mean_fit_time", "n_folds",
    } <= set(results)  # fmt: skip
    best = results.loc[fitted.best_index_]
    assert best["rank_test_score"] == 1
    assert best["params"] == fitted.best_params_
    splits = best[["split0_test_score", "split1_test_score", "split2_test_score"]]
    assert fitted.best_score_ == pytest.approx(splits.mean())
    assert results["n_folds"].tolist().count(3) == 2  # the iterations of one latent size
    dropped = results[results["n_folds"] == 1]
    assert dropped["split1_test_score"].isna().all()
    assert (dropped["rank_test_score"] > 2).all()


def test_it_has_the_methods_of_a_regressor(fitted, tmp_path):
    texts, _ = reviews(5, seed=2)
    *_, last = fitted.staged_predict(texts)
    np.testing.assert_array_equal(last, fitted.predict(texts))
    assert (np.diff(fitted.predict_interval(texts, coverage=0.8)) > 0).all()
    assert fitted.attention(texts)[0].weights.shape[0] == 3
    RefinementDisplay.from_estimator(fitted, texts[0])
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict(texts), fitted.predict(texts))
    fitted.save_pretrained(tmp_path / "saved", metrics={"r": 0.5}, license="mit")
    assert "license: mit" in (tmp_path / "saved" / "README.md").read_text("utf-8")
    loaded = RelishRegressor.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(loaded.predict(texts), fitted.predict(texts))
    continued = pickle.loads(pickle.dumps(fitted)).best_estimator_.partial_fit(texts, range(5))
    assert len(continued.head_.heads) == 3


def public_methods(cls):
    return {name: getattr(cls, name) for name in dir(cls) if not name.startswith("_")}


def test_it_has_every_method_of_a_fitted_regressor():
    of_regressor, of_search = public_methods(RelishRegressor), public_methods(RelishRegressorCV)
    # `best_estimator_` is trained further, and it is what is loaded.
    assert set(of_regressor) - set(of_search) == {
        "partial_fit", "set_partial_fit_request", "from_pretrained",
    }  # fmt: skip
    for name in set(of_regressor) & set(of_search) - {"fit"}:
        if not name.endswith("_request"):  # of scikit-learn, annotated with the class
            assert signature(of_search[name]) == signature(of_regressor[name]), name


def test_the_preview_of_a_search(llm):
    texts, _ = reviews(60)
    preview = make(llm).preview(texts)
    assert (preview.n_distinct, preview.layer) == (60, 2)
    assert preview.train_seconds >= 0
    plans = {
        "default": (make(llm)._plan(60, 8), 2, 2 + 1 + 1, 40),  # iterations share trainings
        "separate": (make(llm, deep_supervision=False)._plan(60, 8), 4, 4 + 2 + 1, 40),
        "splitter": (make(llm, cv=KFold(4))._plan(60, 8), 2, 2 + 1 + 1 + 1, 45),
        "repeated": (make(llm, cv=RepeatedKFold(n_splits=2, n_repeats=3))._plan(60, 8), 2, 7, 50),
        "by rows": (make(llm, cv=LeaveOneOut())._plan(60, 8), 2, 2 + 1 + 1 + 1 + 1, 48),
        "folds": (make(llm, cv=[([0], [1])] * 2)._plan(60, 8), 2, 2 + 1, 30),
        "no list": (make(llm, latent_size=8, n_iterations=1)._plan(60, 8), 1, 3, 40),
        "a part is trained": (make(llm)._plan(60, 8, n_folds=4, n_trained=2), 2, 3, 45),
    }
    for plan, *expected in plans.values():
        assert [len(plan.trainings), plan.n_trainings, plan.n_rows] == expected
        assert plan.n_rows + plan.n_held_out == 60
    with pytest.raises(ValueError, match="The 'latent_size' parameter"):
        make(llm, latent_size=[8, 0]).preview(texts)
    splits = iter([(np.arange(40), np.arange(40, 60))])
    make(llm, cv=splits).preview(texts)
    assert len(list(splits)) == 1  # a preview does not use up the folds


def test_the_plan_is_what_a_search_trains(llm, monkeypatch):
    calls, original = [], search_module.train_candidates

    def counted(*arguments, **options):
        calls.append(len(arguments[1].states))
        return original(*arguments, **options)

    monkeypatch.setattr(search_module, "train_candidates", counted)
    search = make(llm, max_epochs=1).fit(*reviews(60))
    plan = search._plan(60, 8)
    assert calls == [plan.n_rows] * plan.n_trainings


def test_in_a_pipeline_nested_and_cloned(llm):
    pipeline = make_pipeline(FunctionTransformer(), make(llm, latent_size=8))
    scores = cross_val_score(pipeline, *reviews(60), cv=2)
    assert np.isfinite(scores).all()
    assert not hasattr(clone(make(llm)), "best_params_")


def test_a_fit_depends_neither_on_the_order_of_the_rows_nor_on_repetitions(llm):
    texts, y = reviews(40)
    search = make(llm, max_epochs=2).fit(texts, y)
    order = [*range(39, -1, -1), 3, 3]
    weight = np.ones(40)
    weight[3] = 3
    repeated = make(llm, max_epochs=2).fit([texts[i] for i in order], y[order])
    weighted = make(llm, max_epochs=2).fit(texts, y, sample_weight=weight)
    np.testing.assert_array_equal(repeated.predict(texts), weighted.predict(texts))
    np.testing.assert_allclose(repeated.best_score_, weighted.best_score_)
    shuffled = make(llm, max_epochs=2).fit(texts[::-1], y[::-1])
    np.testing.assert_array_equal(shuffled.predict(texts), search.predict(texts))


def test_values_keep_their_types(llm):
    values = {"max_epochs": ["auto", 1], "state_norm": ("rms", None), "latent_size": np.array([8])}
    assert make(llm, **values)._lists() == {
        "max_epochs": ["auto", 1],
        "state_norm": ["rms", None],
        "latent_size": [8],
        "n_iterations": [1, 2],
    }


def test_column_names_of_an_earlier_fit_are_removed(llm):
    texts, y = reviews(30)
    search = make(llm, latent_size=8, max_epochs=1).fit(pd.DataFrame({"review": texts}), y)
    assert search.feature_names_in_.tolist() == ["review"]
    assert not hasattr(search.fit(texts, y), "feature_names_in_")
    assert search.predict(texts).shape == (30,)


def held_out_of(monkeypatch):
    """The held-out rows of each fold of the next search."""
    folds = []
    original = search_module.search_heads

    def spy(examples, given, *args, **options):
        folds.extend(given)
        return original(examples, given, *args, **options)

    monkeypatch.setattr("sklearn_relish.regressor_cv.search_heads", spy)
    return folds


def test_equal_texts_are_in_one_fold(llm, monkeypatch):
    folds = held_out_of(monkeypatch)
    texts = [f"{WORDS[i % 5]} {i % 10}" for i in range(60)]
    make(llm, latent_size=8, max_epochs=1, cv=5).fit(texts, np.arange(60.0))
    for train, held_out in folds:
        assert sorted([*train, *held_out]) == list(range(60))
        assert len(held_out) == 12  # 2 texts with 6 targets each; pairs are sorted by text
        assert len({row // 6 for row in held_out}) == 2


def test_groups_and_splitters(llm, monkeypatch):
    texts, y = reviews(40)
    rank = {text: number for number, text in enumerate(sorted(texts))}  # as rows are sorted
    groups = np.arange(40) % 4
    quick = {"latent_size": 8, "max_epochs": 1}
    for cv in (4, GroupKFold(4)):
        folds = held_out_of(monkeypatch)
        make(llm, **quick, cv=cv).fit(texts, y, groups=groups)
        found = {tuple(sorted(held_out)) for _, held_out in folds}
        assert found == {
            tuple(sorted(rank[texts[row]] for row in np.flatnonzero(groups == group)))
            for group in range(4)
        }
    for cv in (KFold(4), TimeSeriesSplit(3)):
        folds = held_out_of(monkeypatch)
        search = make(llm, **quick, cv=cv).fit(texts, y)
        expected = [
            [sorted(rank[texts[row]] for row in rows) for rows in split]
            for split in cv.split(texts)
        ]
        assert [[sorted(train), sorted(test)] for train, test in folds] == expected
        assert np.isfinite(search.predict(texts)).all()


def test_ridges_are_judged_on_the_same_folds(llm):
    """Each group has a word and a target of its own, which tell nothing about other groups."""
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 8)
    effect = random.normal(size=12)
    words = ["".join(random.choice(list("abcdefgh"), 6)) for _ in range(12)]
    texts = [f"{words[group]} {i}" for i, group in enumerate(groups)]
    quick = {"latent_size": 8, "n_iterations": 1, "cv": 4}
    search = make(llm, **quick).fit(texts, effect[groups], groups=groups)
    assert search.validation_score_ < 0.3
    assert make(llm, **quick).fit(texts, effect[groups]).validation_score_ > 0.5


def test_raters_of_the_same_texts_as_groups(llm):
    """Each text is in every fold, so no ridge can learn without the held-out texts."""
    texts, y = reviews(30)
    raters = ["ann"] * 30 + ["bob"] * 30
    search = make(llm, cv=2, linear_path=True)
    with pytest.warns(UserWarning, match="has no effect.*each text has rows in both parts"):
        search.fit(texts * 2, np.concatenate([y, y + 1]), groups=raters)
    assert search.head_.linear is None
    assert np.isfinite(search.predict(texts)).all()
    with pytest.raises(ValueError, match="groups has missing values in rows 1, 3, 5"):
        make(llm, cv=2).fit(texts, y, groups=["ann", None] * 15)
    mixed = make(llm, cv=2, max_epochs=1).fit(texts, y, groups=[[1], ["a"], [2.5]] * 10)
    assert mixed.n_splits_ == 2


def test_candidates_are_scored_with_the_ridges(llm):
    """Heads that learn nothing do not hide what the ridges know."""
    texts, y = reviews(60)
    quick = {"latent_size": 8, "n_iterations": 1, "max_epochs": 1, "learning_rate": 1e-9}
    assert make(llm, **quick).fit(texts, y).best_score_ > 0.5
    assert make(llm, **quick, linear_path=False).fit(texts, y).best_score_ < 0.1
    search = make(llm, **quick, state_norm=["rms", None]).fit(texts, y)
    first, second = search.cv_results_["split0_test_score"]
    assert min(first, second) > 0.3
    assert first != second  # each with ridges of its own


def test_losses(llm):
    texts, y = reviews(60)
    quick = {"latent_size": 8, "max_epochs": 2}
    search = make(llm, **quick, loss="quantile", quantile=[0.1, 0.5, 0.9]).fit(texts, y)
    assert (np.diff(search.predict_quantiles(texts)) >= 0).all()
    assert (make(llm, **quick, loss="poisson").fit(texts, y).predict(texts) > 0).all()


def test_scorers_that_take_no_weights(llm):
    texts, y = reviews(40)
    quick = {"latent_size": 8, "n_iterations": 1, "max_epochs": 1}

    def negative_error(estimator, X, y):
        return -np.abs(estimator.predict(X) - y).mean()

    search = make(llm, **quick, scoring=negative_error).fit(texts, y, sample_weight=2.0)
    by_name = make(llm, **quick, scoring="neg_mean_absolute_error").fit(texts, y)
    assert search.best_score_ == pytest.approx(by_name.best_score_)


def test_weights_of_zero_with_groups(llm):
    texts, y = reviews(40)
    groups, weight = np.arange(40) % 4, np.ones(40)
    weight[[3, 8]] = 0
    quick = {"latent_size": 8, "n_iterations": 1, "max_epochs": 1, "cv": 4}
    weighted = make(llm, **quick).fit(texts, y, sample_weight=weight, groups=groups)
    kept = np.flatnonzero(weight)
    without = make(llm, **quick).fit([texts[i] for i in kept], y[kept], groups=groups[kept])
    np.testing.assert_array_equal(weighted.predict(texts), without.predict(texts))
    assert weighted.best_score_ == pytest.approx(without.best_score_)
    with pytest.raises(ValueError, match="cv=4 needs 4 or more groups with a weight above 0"):
        make(llm, **quick).fit(texts, y, sample_weight=groups > 0, groups=groups)
    quick["cv"] = GroupKFold(4)
    with pytest.raises(ValueError, match=r"Fold . of cv has no rows with a weight above 0"):
        make(llm, **quick).fit(texts, y, sample_weight=groups > 0, groups=groups)


def test_groups_are_routed(llm):
    texts, y = reviews(40)
    groups = np.arange(40) % 6
    quick = {"latent_size": 8, "n_iterations": 1, "max_epochs": 1, "cv": 3}
    with config_context(enable_metadata_routing=True):
        search = make(llm, **quick).set_fit_request(groups=True)
        scores = cross_val_score(
            search, np.array(texts), y, cv=GroupKFold(2), params={"groups": groups}
        )
    assert np.isfinite(scores).all()


def test_scoring(llm):
    texts, y = reviews(60)
    weight = np.random.default_rng(0).integers(1, 4, 60)
    quick = {"latent_size": 8, "max_epochs": 3}
    search = make(llm, **quick, scoring="neg_mean_absolute_error").fit(texts, y, weight)
    assert search.best_score_ < 0
    calls = []

    def unweighted(y_true, y_pred):
        calls.append(y_true)
        return r2_score(y_true, y_pred)

    scorer = make_scorer(unweighted)
    scored = make(llm, **quick, scoring=scorer).fit(texts, y, weight)
    assert sorted(np.concatenate(calls[::2]).tolist()) == sorted(y.tolist())  # in units of y
    assert scored.best_score_ != make(llm, **quick).fit(texts, y, weight).best_score_
    two = np.column_stack([y, -y])
    assert make(llm, **quick).fit(texts, two).predict(texts).shape == (60, 2)


def test_each_text_is_read_once(monkeypatch):
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    texts, y = reviews(40)
    read = []
    original = FrozenLLM._read_batch

    def counting(self, tokens, layers):
        read.append(len(tokens))
        return original(self, tokens, layers)

    monkeypatch.setattr(FrozenLLM, "_read_batch", counting)
    make(llm, max_epochs=1).fit(texts, y)
    assert sum(read) == 40


def test_a_bar_counts_the_heads(llm, capfd, monkeypatch):
    for seconds in ("DELAY_SECONDS", "REFRESH_SECONDS"):
        monkeypatch.setattr(f"sklearn_relish.utils.progress.{seconds}", 0.0)
    make(llm, max_epochs=1, verbose=1).fit(*reviews(40))
    shown = capfd.readouterr().err
    assert "Training, head 2 of 4: " in shown
    assert "fold=1/3" in shown
    assert "\rFit: 100%" in shown


def interrupt_third_training(monkeypatch):
    """Raise KeyboardInterrupt in the third training. The calls are returned."""
    calls, original = [], search_module.train_candidates

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(search_module, "train_candidates", interrupted)
    return calls


@pytest.mark.parametrize("random_state", [0, None])
@pytest.mark.usefixtures("one_thread")
def test_an_interrupted_fit_is_continued(llm, monkeypatch, random_state):
    texts, y = reviews(40)
    search = make(llm, max_epochs=2, random_state=random_state)
    calls = interrupt_third_training(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        search.fit(texts, y)
    assert not hasattr(search, "best_params_")
    search.fit(texts, y)
    assert len(calls) == 1 + 4  # the first attempt's last call, and 2 + 1 + 1 trainings
    if random_state == 0:
        complete = make(llm, max_epochs=2).fit(texts, y)
        np.testing.assert_array_equal(search.predict(texts), complete.predict(texts))
    calls[:] = [None] * 3
    search.fit(texts, y + np.arange(40))  # other targets, and the last search was complete
    assert len(calls) == 3 + 4


@pytest.mark.parametrize(
    "change",
    [{"learning_rate": 1e-3}, {"cv": 4}, {"cv": KFold(3)}, {"latent_size": [8, 32]}],
    ids=["parameter", "folds", "splitter", "candidates"],
)
@pytest.mark.usefixtures("one_thread")
def test_another_search_does_not_continue_an_interrupted_one(llm, monkeypatch, change):
    texts, y = reviews(40)
    search = make(llm, max_epochs=1)
    interrupt_third_training(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        search.fit(texts, y)
    search.set_params(**change).fit(texts, y)
    expected = make(llm, max_epochs=1, **change).fit(texts, y)
    np.testing.assert_array_equal(search.predict(texts), expected.predict(texts))


@pytest.mark.usefixtures("one_thread")
def test_an_interrupted_fit_is_continued_with_another_scoring(llm):
    """The scoring decides which heads were dropped."""
    texts, y = reviews(40)
    grid = {"latent_size": [8, 16, 32, 64], "n_iterations": 1, "max_epochs": 2}
    calls = []

    def interrupts(estimator, X, y):
        calls.append(y)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return -np.mean((estimator.predict(X) - y) ** 2)

    def opposite(estimator, X, y):
        return np.mean((estimator.predict(X) - y) ** 2)

    search = make(llm, scoring=interrupts, **grid)
    with pytest.raises(KeyboardInterrupt):
        search.fit(texts, y)
    search.set_params(scoring=opposite).fit(texts, y)
    expected = make(llm, scoring=opposite, **grid).fit(texts, y)
    assert search.best_params_ == expected.best_params_
    np.testing.assert_array_equal(search.predict(texts), expected.predict(texts))


def test_fits_of_one_object_in_two_threads(llm):
    texts, y = reviews(40)
    search, targets = make(llm, max_epochs=2), [y, y[::-1].copy()]
    expected = [make(llm, max_epochs=2).fit(texts, target).best_score_ for target in targets]
    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda target: search.fit(texts, target), targets))
        assert search.best_score_ in expected


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"latent_size": []}, "latent_size is an empty list"),
        ({"latent_size": [8, 0]}, "The 'latent_size' parameter"),
        ({"latent_size": [8, 9]}, "latent_size=9 is not a multiple of n_heads=2"),
        ({"n_iterations": [1, "two"]}, "The 'n_iterations' parameter"),
        ({"cv": 50}, "cv=50 needs 50 or more different texts"),
        ({"cv": [([0, 1], [])]}, "Fold 0 of cv has no rows"),
        ({"cv": [([0, 1], [40])]}, "row numbers that are not whole numbers from 0 to 39"),
        ({"cv": 40}, "No score is finite on fold 0: .*more texts"),
        ({"scoring": "no such score"}, "The 'scoring' parameter"),
    ],
)
@pytest.mark.filterwarnings("ignore:R.2 score is not well-defined")
def test_errors(llm, parameters, message):
    texts, y = reviews(40)
    with pytest.raises(ValueError, match=message):
        make(llm, **{"max_epochs": 1} | parameters).fit(texts, y)

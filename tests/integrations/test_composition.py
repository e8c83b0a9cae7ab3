"""The estimators in scikit-learn's meta-estimators, searches and tools."""

import numpy as np
import pytest
from scipy.stats import randint
from sklearn import config_context
from sklearn.base import clone
from sklearn.callback import ProgressBar
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.ensemble import BaggingRegressor, StackingRegressor, VotingRegressor
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.inspection import permutation_importance
from sklearn.linear_model import Ridge
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    KFold,
    RandomizedSearchCV,
    cross_val_predict,
    cross_validate,
    learning_curve,
)
from sklearn.multioutput import MultiOutputRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder

from sklearn_relish import LLMEncoder

pd = pytest.importorskip("pandas")
GRID = {"n_iterations": [1, 2], "latent_size": [8, 16]}


@pytest.fixture
def table(reviews):
    texts, _ = reviews
    random = np.random.default_rng(1)
    kinds = random.choice(["film", "play"], len(texts))
    return pd.DataFrame({"review": texts, "kind": kinds, "seats": random.integers(9, 99, 120)})


def tfidf():
    return make_pipeline(TfidfVectorizer(), Ridge())


def test_pipeline(regressor, reviews):
    texts, y = reviews
    lower = FunctionTransformer(lambda texts: [text.lower() for text in texts])
    pipeline = make_pipeline(lower, regressor).fit(texts, y)
    np.testing.assert_array_equal(
        pipeline.predict([text.upper() for text in texts]), pipeline.predict(texts)
    )


def test_column_transformer(llm, table, reviews):
    columns = ColumnTransformer(
        [("text", LLMEncoder(llm), ["review"]), ("kind", OneHotEncoder(), ["kind"])]
    )
    pipeline = make_pipeline(columns, Ridge()).fit(table, reviews[1])
    assert pipeline.score(table, reviews[1]) > 0.5
    assert columns.fit(table).get_feature_names_out()[0] == "text__llmencoder0"


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_set_output(llm, reviews, library):
    pytest.importorskip(library)
    frame = LLMEncoder(llm).set_output(transform=library).fit_transform(reviews[0])
    assert type(frame).__module__.partition(".")[0] == library
    assert frame.shape == (120, 32)
    assert list(frame.columns)[:2] == ["llmencoder0", "llmencoder1"]


def test_transformed_target(regressor, reviews):
    texts, y = reviews
    logarithm = TransformedTargetRegressor(regressor, func=np.log, inverse_func=np.exp)
    assert logarithm.fit(texts, y).score(texts, y) > 0.5


@pytest.mark.parametrize(
    "search",
    [
        lambda regressor: GridSearchCV(regressor, GRID, cv=2),
        lambda regressor: HalvingGridSearchCV(regressor, GRID, cv=2, min_resources=40),
        lambda regressor: RandomizedSearchCV(
            regressor, {"latent_size": [8, 16], "n_iterations": randint(1, 3)}, n_iter=2, cv=2
        ),
    ],
    ids=["GridSearchCV", "HalvingGridSearchCV", "RandomizedSearchCV"],
)
def test_searches(regressor, reviews, search):
    found = search(regressor.set_params(max_epochs=2, n_estimators=1)).fit(*reviews)
    assert found.best_params_["n_iterations"] in (1, 2)
    assert np.isfinite(found.predict(reviews[0])).all()


class Recorder:
    """A callback that keeps the names of the estimators whose fits began and ended."""

    def __init__(self):
        self.begun, self.ended = [], []

    def setup(self, estimator, context):
        pass

    def teardown(self, estimator, context):
        pass

    def on_fit_task_begin(self, estimator, context):
        self.begun.append(context.estimator_name)

    def on_fit_task_end(self, estimator, context):
        self.ended.append(context.estimator_name)


def test_callbacks(regressor, reviews):
    texts, y = reviews
    regressor.set_params(max_epochs=1, n_estimators=1)
    alone, search = Recorder(), Recorder()
    clone(regressor).set_callbacks(alone).fit(texts, y)
    assert alone.begun == alone.ended == ["RelishRegressor"]
    GridSearchCV(regressor, GRID, cv=2).set_callbacks(search).fit(texts, y)
    assert "GridSearchCV" in search.begun
    assert sorted(search.ended) == sorted(search.begun)


class Propagated(Recorder):
    """Keeps the number, the values and the texts of each fit of a search."""

    max_propagation_depth = 1

    def __init__(self):
        super().__init__()
        self.fits = {}

    def on_fit_task_begin(self, estimator, context, *, X=None):
        if context.source_task_name == "candidate-split-evaluation":
            values = {name: getattr(estimator, name) for name in GRID}
            self.fits[context.task_id] = values, list(X)


def test_the_number_of_a_fit_says_its_candidate_and_fold(regressor, reviews):
    texts, y = reviews
    seen, folds = Propagated(), KFold(3)
    regressor.set_params(max_epochs=1, n_estimators=1, linear_path=False)
    search = GridSearchCV(regressor, GRID, cv=folds).set_callbacks(seen).fit(texts, y)
    training_rows = [train for train, _ in folds.split(texts)]
    assert sorted(seen.fits) == list(range(12))
    for number, (values, fitted) in seen.fits.items():
        assert values == search.cv_results_["params"][number // 3]
        assert fitted == [texts[row] for row in training_rows[number % 3]]


def test_the_bar_of_scikit_learn_has_a_line_for_each_fit(regressor, reviews, capfd):
    pytest.importorskip("rich")
    regressor.set_params(max_epochs=1, n_estimators=1, linear_path=False)
    search = GridSearchCV(regressor, {"n_iterations": [1, 2]}, cv=2)
    search.set_callbacks(ProgressBar()).fit(*reviews)
    shown = capfd.readouterr().out
    assert "GridSearchCV - search" in shown
    assert all(f"RelishRegressor - fit #{number}" in shown for number in range(4))


def test_cross_validate_with_several_metrics(regressor, reviews):
    scoring = ["r2", "neg_mean_absolute_error", "explained_variance"]
    scores = cross_validate(regressor, *reviews, cv=3, scoring=scoring, return_train_score=True)
    assert np.mean(scores["test_r2"]) > 0.3
    assert (scores["test_neg_mean_absolute_error"] < 0).all()


def test_stacking_and_voting_with_tfidf(regressor, reviews):
    both = [("relish", regressor), ("tfidf", tfidf())]
    texts, y = reviews
    for ensemble in (StackingRegressor(both, cv=2), VotingRegressor(both)):
        assert ensemble.fit(np.array(texts, dtype=object), y).score(texts, y) > 0.5


def test_bagging_of_tables(regressor, table, reviews):
    bagging = BaggingRegressor(regressor, n_estimators=2, random_state=0).fit(table, reviews[1])
    assert np.isfinite(bagging.predict(table)).all()


def test_multi_output(regressor, reviews):
    texts, y = reviews
    both = MultiOutputRegressor(regressor).fit(texts, np.stack([y, -y], axis=1)).predict(texts)
    one = regressor.fit(texts, y).predict(texts)
    np.testing.assert_allclose(both[:, 0], one)


def test_learning_curve(regressor, reviews):
    sizes, _, scores = learning_curve(regressor, *reviews, train_sizes=[15, 60], cv=2)
    assert sizes.tolist() == [15, 60]
    assert scores[1].mean() > scores[0].mean()


def test_permutation_importance_of_columns(regressor, table, reviews):
    regressor.set_params(max_epochs=20).fit(table, reviews[1])
    found = permutation_importance(regressor, table, reviews[1], n_repeats=2, random_state=0)
    assert found.importances_mean.argmax() == 0  # the review, which determines y


def test_metadata_routing(regressor, reviews):
    texts, y = reviews
    weight = np.tile([0.0, 1.0], 60)
    with config_context(enable_metadata_routing=True):
        regressor.set_fit_request(sample_weight=True)
        pipeline = make_pipeline(FunctionTransformer(), regressor)
        routed = cross_val_predict(pipeline, texts, y, cv=2, params={"sample_weight": weight})
        assert np.isfinite(routed).all()
        pipeline.fit(texts, y, sample_weight=weight)
    direct = regressor.fit(texts, y, sample_weight=weight).predict(texts)
    np.testing.assert_array_equal(pipeline.predict(texts), direct)

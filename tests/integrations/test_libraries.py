"""The estimators in other libraries, each used as its documentation shows."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from tiny import tiny_model

from sklearn_relish import LLMEncoder

pd = pytest.importorskip("pandas")


def test_optuna_search(regressor, reviews):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def loss_fn(trial):
        regressor.set_params(
            latent_size=trial.suggest_categorical("latent_size", [8, 16]),
            learning_rate=trial.suggest_float("learning_rate", 1e-3, 1e-2, log=True),
        )
        return cross_val_score(regressor, *reviews, cv=2).mean()

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(loss_fn, n_trials=3)
    assert study.best_value > 0.3


def test_skrub_table_vectorizer(llm, reviews):
    skrub = pytest.importorskip("skrub")
    texts, y = reviews
    frame = pd.DataFrame({"review": texts, "seats": np.arange(120.0), "kind": ["a", "b"] * 60})
    encoder = skrub.ApplyToCols(LLMEncoder(llm), cols=["review"])
    vectorizer = skrub.TableVectorizer(specific_transformers=[(encoder, ["review"])])
    pipeline = make_pipeline(vectorizer, Ridge()).fit(frame, y)
    assert pipeline.score(frame, y) > 0.5
    assert pipeline[0].transform(frame).shape[1] > 32


def test_shap_text_explainer(regressor, reviews):
    shap = pytest.importorskip("shap")
    texts, y = reviews
    regressor.set_params(max_epochs=30).fit(texts, y)

    def predict(texts):
        return regressor.predict(list(texts))

    explainer = shap.Explainer(predict, shap.maskers.Text(r"\W+"))
    found = explainer(["superb 7", "awful 7"], silent=True)
    for explained, text in zip(found, ["superb 7", "awful 7"], strict=True):
        total = explained.base_values + explained.values.sum()
        assert total == pytest.approx(float(regressor.predict([text])[0]), rel=1e-3)
    assert found[0].values[0] > found[1].values[0]  # "superb" raises it more than "awful"


def test_mapie_intervals(regressor, reviews):
    mapie = pytest.importorskip("mapie.regression")
    texts, y = np.array(reviews[0], dtype=object), reviews[1]
    regressor.fit(texts[:40], y[:40])
    conformal = mapie.SplitConformalRegressor(regressor, confidence_level=0.8, prefit=True)
    conformal.conformalize(texts[40:80], y[40:80])
    predicted, intervals = conformal.predict_interval(texts)
    np.testing.assert_array_equal(predicted, regressor.predict(texts))
    inside = (intervals[:, 0, 0] <= y) & (y <= intervals[:, 1, 0])
    assert 0.6 <= inside[80:].mean() <= 0.95  # of 40 new rows


def test_cloudpickle(regressor, reviews):
    cloudpickle = pytest.importorskip("cloudpickle")
    regressor.fit(*reviews)
    opened = cloudpickle.loads(cloudpickle.dumps(regressor))
    np.testing.assert_array_equal(opened.predict(reviews[0]), regressor.predict(reviews[0]))


def test_skops_trusts_only_this_package(regressor, reviews, tmp_path):
    skops = pytest.importorskip("skops.io")
    regressor.set_params(memory=tmp_path / "states", layer="auto").fit(*reviews)
    skops.dump(regressor, tmp_path / "model.skops")
    untrusted = skops.get_untrusted_types(file=tmp_path / "model.skops")
    assert all(name.startswith("sklearn_relish.") for name in untrusted)
    opened = skops.load(tmp_path / "model.skops", trusted=untrusted)
    np.testing.assert_array_equal(opened.predict(reviews[0]), regressor.predict(reviews[0]))
    np.testing.assert_array_equal(
        opened.predict_interval(reviews[0]), regressor.predict_interval(reviews[0])
    )
    pipeline = make_pipeline(LLMEncoder(str(tiny_model()), device="cpu"), Ridge()).fit(*reviews)
    skops.dump(pipeline, tmp_path / "pipeline.skops")
    untrusted = skops.get_untrusted_types(file=tmp_path / "pipeline.skops")
    assert untrusted == ["sklearn_relish.encoder.LLMEncoder"]
    opened = skops.load(tmp_path / "pipeline.skops", trusted=untrusted)
    np.testing.assert_array_equal(opened.predict(reviews[0]), pipeline.predict(reviews[0]))


@pytest.mark.filterwarnings("ignore:.*type hint is inferred as AnyType:UserWarning")  # MLflow's
def test_mlflow_scikit_learn_flavour(regressor, reviews, tmp_path):
    mlflow = pytest.importorskip("mlflow.sklearn")
    texts, y = reviews
    regressor.fit(pd.DataFrame({"review": texts}), y)
    mlflow.save_model(regressor, tmp_path / "model", serialization_format="cloudpickle")
    opened = mlflow.load_model(str(tmp_path / "model"))
    frame = pd.DataFrame({"review": texts})
    np.testing.assert_array_equal(opened.predict(frame), regressor.predict(frame))

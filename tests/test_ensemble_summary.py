"""What is left to look at after a fit: the parts of the ensemble, and the HTML representation."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.utils import estimator_html_repr
from tiny import tiny_model

import sklearn_relish
from sklearn_relish import FrozenLLM, LLMEncoder, RelishRegressor, RelishRegressorCV

TEXTS = [f"{word} film {i}" for i in range(20) for word in ("dull", "fine", "splendid")]
Y = np.tile([1.0, 3.0, 5.0], 20) + np.arange(60) / 60
SMALL = {"latent_size": 16, "n_heads": 2, "max_epochs": 3, "random_state": 0}
COLUMNS = [
    "part", "layer", "best_epoch", "n_rows", "n_held_out", "validation_r2", "weight",
    "contribution",
]  # fmt: skip
RIDGES = ["ridge mean", "ridge last", "ridge std"]


@pytest.fixture(scope="module")
def llm():
    return FrozenLLM(tiny_model(), device="cpu", dtype="float32")


def column(regressor, name):
    return [row[name] for row in regressor.ensemble_summary_]


def test_each_head_and_ridge_has_a_row(llm):
    regressor = RelishRegressor(llm, n_estimators=3, layer=2, **SMALL)
    regressor.fit([*TEXTS, TEXTS[0]], [*Y, Y[0]])  # a repeated row counts once
    assert [list(row) for row in regressor.ensemble_summary_] == [COLUMNS] * 6
    assert column(regressor, "part") == ["head 1", "head 2", "head 3", *RIDGES]
    assert column(regressor, "layer") == [2] * 6
    assert column(regressor, "best_epoch") == [*regressor.best_epoch_, None, None, None]
    assert column(regressor, "n_rows") == [48] * 3 + [60] * 3
    assert column(regressor, "n_held_out") == [12] * 3 + [60] * 3
    weights = column(regressor, "weight")
    assert sum(weights[:3]) == pytest.approx(float(regressor.head_.head_weight))
    assert len(set(weights[:3])) == 1
    contributions = column(regressor, "contribution")
    assert sum(contributions) == pytest.approx(1)
    assert min(contributions) >= 0
    assert max(column(regressor, "validation_r2")) < 1
    json.dumps(regressor.ensemble_summary_)


@pytest.mark.parametrize("changes", [{}, {"loss": "quantile", "quantile": [0.1, 0.5, 0.9]}])
def test_the_score_of_a_single_head_is_that_of_the_fit(llm, changes):
    settings = {"n_estimators": 1, "linear_path": False, **SMALL, **changes}
    regressor = RelishRegressor(llm, **settings).fit(TEXTS, Y)
    (row,) = regressor.ensemble_summary_
    assert row["validation_r2"] == pytest.approx(regressor.validation_score_)
    assert row["weight"] == row["contribution"] == 1


def test_ridges_contribute_more_than_heads_that_have_learned_nothing(llm):
    settings = {"n_estimators": 2, **SMALL, "max_epochs": 1, "learning_rate": 1e-9}
    regressor = RelishRegressor(llm, **settings).fit(TEXTS, np.column_stack([Y, -Y]))
    contributions = column(regressor, "contribution")
    assert sum(contributions[2:]) > 0.55  # without any rows it would be a half
    r2 = column(regressor, "validation_r2")
    assert max(r2[:2]) < 0.1
    assert r2[2] > 0.9
    # The linear path is the sum of the ridges, so the weights are those of its parts.
    linear = regressor.head_.linear.weight.reshape(2, 3, -1).abs().sum(dim=2).mean(dim=0)
    assert (linear > 0).tolist() == [weight > 0 for weight in column(regressor, "weight")[2:]]


def test_without_held_out_rows_there_are_no_scores_and_equal_weights(llm):
    regressor = RelishRegressor(llm, n_estimators=2, early_stopping=False, **SMALL).fit(TEXTS, Y)
    assert column(regressor, "validation_r2") == [None, None]
    assert column(regressor, "n_held_out") == [0, 0]
    assert column(regressor, "weight") == column(regressor, "contribution") == [0.5, 0.5]
    constant = RelishRegressor(llm, n_estimators=2, **SMALL)
    with pytest.warns(UserWarning, match="constant"):
        constant.fit(TEXTS, np.ones(60))
    assert column(constant, "validation_r2") == [None] * 5
    assert np.isfinite(column(constant, "contribution")).all()


def test_further_training_keeps_the_weights_and_drops_the_scores(llm):
    regressor = RelishRegressor(llm, n_estimators=2, **SMALL).fit(TEXTS, Y)
    before = regressor.ensemble_summary_
    for further in (
        lambda: regressor.set_params(warm_start=True, max_epochs=5).fit(TEXTS[:30], Y[:30]),
        lambda: regressor.set_params(max_epochs=7).partial_fit(TEXTS[:20], Y[:20]),
    ):
        further()
        assert regressor.ensemble_summary_[2:] == before[2:]
        assert column(regressor, "weight") == [row["weight"] for row in before]
        assert column(regressor, "validation_r2")[:2] == [None, None]
        assert column(regressor, "best_epoch")[:2] == regressor.best_epoch_
    assert column(regressor, "n_rows")[:2] == [20, 20]
    assert regressor.best_epoch_ == [7, 7]
    new = RelishRegressor(llm, n_estimators=2, **SMALL).partial_fit(TEXTS, Y)
    assert column(new, "part") == ["head 1", "head 2"]
    assert column(new, "weight") == [0.5, 0.5]


def test_a_search_has_the_rows_of_its_heads(llm):
    grid = {"latent_size": [8, 16], "n_iterations": 1, "cv": 3}
    search = RelishRegressorCV(llm, **SMALL | grid).fit(TEXTS, Y)
    assert column(search, "part") == ["head 1", "head 2", "head 3", *RIDGES]
    assert column(search, "n_rows")[:3] == [40] * 3
    assert search.ensemble_summary_ == search.best_estimator_.ensemble_summary_


def test_the_rows_are_saved(tmp_path):
    regressor = RelishRegressor(tiny_model(), n_estimators=2, **SMALL).fit(TEXTS, Y)
    regressor.save_pretrained(tmp_path)
    loaded = RelishRegressor.from_pretrained(tmp_path)
    pickled = pickle.loads(pickle.dumps(regressor))
    assert loaded.ensemble_summary_ == pickled.ensemble_summary_ == regressor.ensemble_summary_


@pytest.mark.parametrize("cls", [RelishRegressor, RelishRegressorCV, LLMEncoder])
def test_the_html_links_to_a_page_of_the_guide(cls):
    html = estimator_html_repr(cls())
    address = cls()._get_doc_link()
    assert f'href="{address}"' in html
    assert f"Documentation for {cls.__name__}" in html
    path, _, anchor = re.fullmatch(
        r"https://github\.com/sklearn-relish/sklearn-relish/blob/main/([^#]*)(#?)(.*)", address
    ).groups()
    page = (Path(sklearn_relish.__file__).parents[1] / path).read_text("utf-8")
    assert cls.__name__ in page
    titles = [title.lower().replace(" ", "-") for title in re.findall(r"(?m)^#+ (.*)$", page)]
    assert not anchor or anchor in titles


def test_a_subclass_elsewhere_has_no_link():
    class Mine(RelishRegressor):
        pass

    assert "sk-estimator-doc-link" in estimator_html_repr(Mine())
    assert Mine()._get_doc_link() == ""

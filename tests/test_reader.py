"""The estimators on a reader that is not a Transformers model."""

import hashlib
import json
import pickle
import re

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline

from sklearn_relish import LLMEncoder, RelishRegressor, StateStore, TokenStateReader, TokenStates


class HashedWords(TokenStateReader):
    """Each word has a random vector, determined by its hash; layer 2 adds its position."""

    model, n_layers, hidden_size = "hashed-words", 2, 24

    def __init__(self, version=1):
        self.version = version
        self.n_read = 0

    @property
    def fingerprint(self):
        return digest(f"hashed words {self.version}")

    def read(self, texts, *, layers, max_length, windows=False):
        for start in range(0, len(texts), 7):
            words = [text.split() or [""] for text in texts[start : start + 7]]
            self.n_read += len(words)
            full_lengths = np.array([len(text) for text in words])
            if not windows:
                words = [text[:max_length] for text in words]
            lengths = torch.tensor([len(text) for text in words])
            states = []
            for layer in layers:
                values = [self.state(i, w, layer) for text in words for i, w in enumerate(text)]
                values = torch.tensor(np.array(values), dtype=self.torch_dtype)
                states.append(TokenStates.from_lengths(values, lengths))
            yield start + np.arange(len(words)), states, full_lengths

    def state(self, position, word, layer):
        random = np.random.default_rng(int(digest(f"{self.version} {word}"), 16))
        state = random.normal(size=self.hidden_size)
        return state + np.cos(position * np.arange(self.hidden_size)) if layer == 2 else state


class HashedWordsWithSpans(HashedWords):
    def tokens(self, texts, *, max_length, windows=False):
        found = [list(re.finditer(r"\S+", text))[:max_length] for text in texts]
        return [
            ([word.group() for word in words], np.array([word.span() for word in words]))
            for words in found
        ]


def digest(text):
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


GRADES = {"awful": 0, "poor": 1, "fair": 2, "good": 3, "superb": 4}
TEXTS = [f"a {word} film of {year}" for year in range(1990, 2006) for word in GRADES]
Y = np.array([float(GRADES[text.split()[1]]) for text in TEXTS])
SMALL = {"latent_size": 16, "n_heads": 2, "n_estimators": 2, "max_epochs": 16, "random_state": 0}


def make_regressor(reader, **parameters):
    return RelishRegressor(reader, learning_rate=5e-3, **SMALL | parameters)


def test_a_regressor_on_another_reader(tmp_path):
    reader = HashedWords()
    regressor = make_regressor(reader, memory=StateStore(tmp_path / "states")).fit(TEXTS, Y)
    assert regressor.layer_ == 1
    assert regressor.score(TEXTS, Y) > 0.9
    assert reader.n_read == len(TEXTS)
    expected = regressor.predict(["a good film", "an awful film"])
    assert expected[0] > expected[1]
    *_, last = regressor.staged_predict(TEXTS[:3])
    assert last.tolist() == regressor.predict(TEXTS[:3]).tolist()
    assert regressor.predict_interval(TEXTS).shape == (80, 2)
    with pytest.raises(ValueError, match=r"HashedWords\('hashed-words'\) can't map tokens"):
        regressor.attention(TEXTS)

    copy = pickle.loads(pickle.dumps(regressor))
    assert copy.model is not reader
    np.testing.assert_array_equal(copy.predict(["a good film", "an awful film"]), expected)
    regressor.save_pretrained(tmp_path / "saved")
    loaded = RelishRegressor.from_pretrained(tmp_path / "saved", model=reader)
    np.testing.assert_array_equal(loaded.predict(["a good film", "an awful film"]), expected)
    loaded.set_params(model=HashedWords(version=2))
    with pytest.warns(UserWarning, match=r"HashedWords\('hashed-words'\) differs from"):
        loaded.predict(["a good film"])
    (kept,) = StateStore(tmp_path / "states").info()
    assert (kept["model"], kept["dtype"], kept["n_texts"]) == ("hashed-words", "float32", 80)


def test_texts_of_one_token_do_not_inflate_predictions():
    """The standard deviation of their states is 0, and so are the features of one ridge."""
    texts, y = [f"word{i}" for i in range(80)], np.random.RandomState(0).randint(1, 6, 80)
    regressor = make_regressor(HashedWords(), n_estimators=5, max_epochs=5).fit(texts, y)
    predictions = regressor.predict(["word3", "new"])
    assert (predictions > -5).all()
    assert (predictions < 11).all()


def test_states_that_are_not_finite_are_refused():
    class Broken(HashedWords):
        fingerprint = digest("broken")

        def read(self, texts, **settings):
            for rows, states, full_lengths in super().read(texts, **settings):
                states[0].arrays[0][0] = np.nan
                yield rows, states, full_lengths

    with pytest.raises(FloatingPointError, match=r"Broken\('hashed-words'\) gives states"):
        make_regressor(Broken()).fit(TEXTS, Y)


def test_an_error_of_a_server_does_not_turn_off_the_comparison_of_two_texts():
    class Server(HashedWordsWithSpans):
        fingerprint = digest("server")

        def tokens(self, texts, **settings):
            return json.loads("not JSON")

    X = pd.DataFrame({"a": TEXTS, "b": TEXTS[::-1]})
    with pytest.raises(json.JSONDecodeError):
        make_regressor(Server()).fit(X, Y)


def test_attention_of_a_reader_with_spans():
    regressor = make_regressor(HashedWordsWithSpans()).fit(TEXTS, Y)
    first, second = regressor.attention(["a good film", "superb"])
    assert first.tokens == ["a", "good", "film"]
    assert first.spans.tolist() == [[0, 1], [2, 6], [7, 11]]
    assert first.weights.shape == (2, 3, 2, 3)
    assert second.weights.shape == (2, 3, 2, 1)


def test_a_search_reads_each_text_once_with_another_reader():
    reader = HashedWords()
    regressor = make_regressor(reader, n_estimators=1, linear_path=False)
    assert clone(regressor).model is reader
    grid = {"layer": [-1], "n_iterations": [1, 2]}
    search = GridSearchCV(regressor, grid, cv=3, error_score="raise").fit(TEXTS, Y)
    assert search.best_estimator_.model is reader
    assert search.best_estimator_.layer_ == 2
    assert reader.n_read == len(TEXTS)


def test_the_layer_can_be_chosen_with_another_reader():
    regressor = make_regressor(HashedWords(), layer="auto").fit(TEXTS, Y)
    assert regressor.layer_ == 1
    with pytest.raises(ValueError, match="layer=3 is not a layer of 'hashed-words', which has 2"):
        regressor.set_params(layer=3).fit(TEXTS, Y)


def test_threads_share_a_reader(tmp_path):
    pipeline = make_pipeline(LLMEncoder(HashedWords(), memory=tmp_path), Ridge())
    expected = cross_val_score(pipeline, TEXTS, Y, cv=4)
    pipeline = make_pipeline(LLMEncoder(HashedWords()), Ridge())
    with joblib.parallel_config(backend="threading", n_jobs=2):
        np.testing.assert_array_equal(cross_val_score(pipeline, TEXTS, Y, cv=4), expected)


@pytest.mark.parametrize(
    "parameters", [{"device": "cpu"}, {"dtype": "float32"}, {"model_kwargs": {}}]
)
def test_parameters_of_a_model_given_by_name_are_refused(parameters):
    with pytest.raises(ValueError, match="model is a HashedWords: pass them to HashedWords"):
        LLMEncoder(HashedWords(), **parameters).fit(TEXTS)


def test_a_reader_has_no_prefix():
    with pytest.raises(ValueError, match=r"model is a HashedWords, which reads texts by itself"):
        LLMEncoder(HashedWords(), prefix="films: ").fit_transform(TEXTS)


def test_a_reader_without_a_chat_template():
    with pytest.raises(ValueError, match=r"no chat template: pass chat_template=False"):
        LLMEncoder(HashedWords(), chat_template=True).fit(TEXTS)


def test_what_a_reader_lacks_is_named():
    class Nameless(TokenStateReader):
        read = HashedWords.read

    reader = Nameless()
    reader.n_layers = 2
    with pytest.raises(TypeError, match=r"Nameless .* has no model, fingerprint, hidden_size: a"):
        LLMEncoder(reader).fit(TEXTS)
    with pytest.raises(TypeError, match=r"abstract class TokenStateReader .*read"):
        TokenStateReader()
    with pytest.raises(ValueError, match=r"must be an instance of 'str'.*TokenStateReader"):
        LLMEncoder(object()).fit(TEXTS)


def test_a_fingerprint_must_be_one():
    class Odd(HashedWords):
        fingerprint = "version 1"

    with pytest.raises(ValueError, match="must be 32 hexadecimal digits in lower case, got 'ver"):
        LLMEncoder(Odd()).fit(TEXTS)


def wrong(change):
    """A reader that yields something else than it should."""

    class Wrong(HashedWords):
        def read(self, texts, **options):
            for batch in super().read(texts, **options):
                yield change(*batch)

    return Wrong()


@pytest.mark.parametrize("method", ["fit_transform", "transform"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows, states, n: (rows, [], n), "0 states for 1 layers"),
        (lambda rows, states, n: (rows, [half(states[0])], n), "arrays, the first of .*float16"),
        (lambda rows, states, n: (rows, [narrow(states[0])], n), r"shape \(\d+, 23\) and"),
        (lambda rows, states, n: (rows[1:], states, n), "6 rows with states of 7 texts"),
        (lambda rows, states, n: (rows, states, n[1:]), "7 texts at layer 1 and 6 full_lengths"),
        (lambda rows, states, n: (rows * 0, states, n), "a row twice"),
        (lambda rows, states, n: (rows % 7, states, n), "a row twice"),
    ],
)
def test_what_a_reader_yields_is_checked(method, change, message):
    encoder = LLMEncoder(wrong(change))
    with pytest.raises(ValueError, match=message):
        getattr(encoder.fit(TEXTS), method)(TEXTS)


@pytest.mark.parametrize("method", ["fit_transform", "transform"])
def test_a_reader_that_leaves_a_text_out_is_refused(method):
    class Forgetful(HashedWords):
        def read(self, texts, **options):
            yield from super().read(texts[:-1], **options)

    with pytest.raises(ValueError, match="read yielded no states for 1 of 80 texts"):
        getattr(LLMEncoder(Forgetful()).fit(TEXTS), method)(TEXTS)


def half(states):
    return TokenStates.from_lengths(states.arrays[0].half(), states.lengths)


def narrow(states):
    return TokenStates.from_lengths(states.arrays[0][:, 1:].contiguous(), states.lengths)


def test_a_preview_of_a_reader_is_scaled_from_a_sample():
    reader = HashedWords()
    preview = RelishRegressor(reader, max_length=4, **SMALL).preview(TEXTS)
    assert reader.n_read < len(TEXTS) + 16  # a sample, and the texts that are read first
    assert (preview.n_tokens, preview.longest) == (4 * len(TEXTS), 5)
    assert (preview.n_distinct, preview.n_cut) == (len(TEXTS), len(TEXTS))
    assert preview.n_bytes == 4 * len(TEXTS) * reader.hidden_size * 4

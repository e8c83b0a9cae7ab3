"""Any Unicode text has a finite prediction that does not depend on the other texts."""

import numpy as np
import pytest
from sklearn.base import clone

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
CONTROL = st.text(st.characters(categories=["Cc", "Cf", "Co", "Cn"]), min_size=1, max_size=20)
SPECIAL = st.sampled_from(["", " ", "\x00", "\n\n", "<s>", "</s><s>", "{text}", "\ufeff", "ﷺ" * 9])
TEXTS = st.lists(UNICODE | CONTROL | SPECIAL, min_size=1, max_size=6)
FEW = settings(max_examples=30)


@pytest.fixture(scope="module")
def fitted(llm, reviews):
    from sklearn_relish import RelishRegressor

    small = {"latent_size": 16, "n_heads": 2, "max_epochs": 2, "n_estimators": 2}
    return RelishRegressor(llm, max_length=64, random_state=0, **small).fit(*reviews)


@FEW
@given(texts=TEXTS, seed=st.integers(0, 99))
def test_the_prediction_of_any_text_does_not_depend_on_other_texts(fitted, texts, seed):
    together = fitted.predict(texts)
    assert np.isfinite(together).all()
    # States in float32 may differ by some millionths when a text is read again.
    close = {"rtol": 1e-5, "atol": 1e-5}
    alone = np.concatenate([fitted.predict([text]) for text in texts])
    np.testing.assert_allclose(alone, together, **close)
    order = np.random.default_rng(seed).permutation(len(texts))
    np.testing.assert_allclose(fitted.predict([texts[i] for i in order]), together[order], **close)


@FEW
@given(texts=TEXTS)
def test_any_text_can_be_fitted(fitted, texts):
    longer = [*texts, "one more", "and another"]
    refitted = clone(fitted).set_params(max_epochs=1).fit(longer, np.arange(len(longer)))
    assert np.isfinite(refitted.predict(longer)).all()


@FEW
@given(before=UNICODE, code=st.integers(0xD800, 0xDFFF))
def test_a_lone_surrogate_is_a_clear_error(fitted, before, code):
    with pytest.raises(ValueError, match=r"lone surrogates.* in row 1: clean them"):
        fitted.predict(["fine", before + chr(code)])


def test_a_million_characters(fitted):
    text = "".join(chr(33 + i * i % 90) for i in range(1_000_000))
    with pytest.warns(UserWarning, match="1 of 2 texts are longer"):
        truncated = fitted.predict([text, "short"])
    np.testing.assert_allclose(truncated[0], fitted.predict([text[:64]])[0], rtol=1e-5)
    windows = clone(fitted).set_params(long_text="window", max_length=256)
    windows = windows.fit(["short", "other"] * 9, [1, 2] * 9)
    predictions = windows.predict([text[:200_000], "short"])  # 1,000 windows
    assert np.isfinite(predictions).all()
    assert 0 < predictions[0] < 3
    assert predictions[0] != predictions[1]

"""What the iterations do: each step's answer, and the tokens that it looks at."""

import copy
import sys
import warnings

import numpy as np
import pytest
import torch
from tiny import tiny_model

from sklearn_relish import FrozenLLM, RefinementDisplay, RelishRegressor
from sklearn_relish.head.head import RelishHead
from sklearn_relish.predictor import TextAttention

pd = pytest.importorskip("pandas")

TEXTS = [f"{word} {i}" for i in range(12) for word in ("good", "bad", "ünïcode 🙂")]
Y = np.tile([2.0, -2.0, 0.0], 12) + np.arange(36) / 36
SMALL = {"latent_size": 16, "n_heads": 2, "max_epochs": 2, "n_estimators": 2, "random_state": 0}


@pytest.fixture(scope="module")
def llm():
    return FrozenLLM(tiny_model(), device="cpu", dtype="float32")


@pytest.mark.parametrize(
    "changes",
    [
        {"n_iterations": 4},
        {"share_weights": True, "linear_path": False},
        {"loss": "quantile", "quantile": [0.1, 0.5, 0.9]},
        {"loss": "poisson"},
    ],
)
@pytest.mark.parametrize("n_outputs", [1, 2])
def test_the_last_stage_is_the_prediction(llm, changes, n_outputs):
    y = np.abs(Y) if n_outputs == 1 else np.abs(np.stack([Y, 3 * Y], axis=1))
    regressor = RelishRegressor(llm, **SMALL | changes).fit(TEXTS, y)
    stages = list(regressor.staged_predict(TEXTS))
    assert len(stages) == regressor.n_iterations
    assert {stage.shape for stage in stages} == {y.shape}
    np.testing.assert_allclose(stages[-1], regressor.predict(TEXTS), rtol=1e-12)
    assert not np.allclose(stages[0], stages[-1])


@pytest.mark.parametrize("state_norm", ["rms", None])
def test_attention_is_that_of_the_textbook(state_norm):
    """The weights of `torch.nn.MultiheadAttention`, iteration by iteration."""
    torch.manual_seed(0)
    head = RelishHead(6, 8, n_heads=2, state_norm=state_norm).double()
    states = torch.randn(3, 5, 6, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [1], [3]])
    normed = states
    if state_norm == "rms":
        normed = states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    tokens = head.projection(normed)
    latent = head.latent.expand(3, 1, 8)
    for block, step in zip(head.blocks, head.steps(states, mask), strict=True):
        part = block.attention
        textbook = torch.nn.MultiheadAttention(8, 2, batch_first=True).double()
        textbook.in_proj_weight.data = torch.cat(
            [part.query.weight, part.key.weight, part.value.weight]
        )
        textbook.in_proj_bias.data = torch.cat([part.query.bias, part.key.bias, part.value.bias])
        textbook.out_proj.load_state_dict(part.output.state_dict())
        attended, weights = textbook(
            latent, tokens, tokens, key_padding_mask=~mask, average_attn_weights=False
        )
        torch.testing.assert_close(step.attention, weights[:, :, 0])
        latent = block.attention_norm(latent + attended)
        latent = block.mlp_norm(latent + block.mlp(latent))
        torch.testing.assert_close(step.latent, latent[:, 0])


def test_weights_are_of_the_tokens_of_the_text(llm):
    regressor = RelishRegressor(llm, **SMALL).fit(TEXTS, Y)
    found = regressor.attention(TEXTS[:6])
    for text, (shown, tokens, spans, weights) in zip(TEXTS[:6], found, strict=True):
        assert shown == text
        assert weights.shape == (2, 3, 2, len(tokens))
        assert spans.shape == (len(tokens), 2)
        np.testing.assert_allclose(weights.sum(axis=-1), 1)
        ((_, (states,), _),) = llm.read([text], layers=[regressor.layer_], max_length=512)
        batch, mask = states.batch(torch.tensor([0]))
        with torch.no_grad():
            of_head = copy.deepcopy(regressor.head_).double().attention(batch, mask)[:, :, 0]
        np.testing.assert_allclose(weights, of_head, atol=1e-5)  # token by token
        assert [text[begin:end] for begin, end in spans] == tokens
        assert spans[-1, 1] == len(text)  # nothing of it is left out
    alone = regressor.attention(TEXTS[1:2])[0]
    np.testing.assert_allclose(alone.weights, found[1].weights, rtol=1e-5)


def test_tokens_of_texts_that_are_cut_or_read_in_windows():
    llm = FrozenLLM(tiny_model("bert"), device="cpu", dtype="float32")
    text = "abcdefghij" * 5
    ((cut, spans),) = llm.tokens([text], max_length=12)
    assert cut == ["<s>", *"abcdefghij", "</s>"]
    assert spans[[0, 1, -1]].tolist() == [[0, 0], [0, 1], [0, 0]]
    ((whole, spans),) = llm.tokens([text], max_length=12, windows=True)
    assert whole == ["<s>", *text, "</s>"]
    ((_, (batch,), _),) = llm.read([text], layers=[1], max_length=12, windows=True)
    assert len(next(iter(batch))) == len(whole)
    ((nothing, spans),) = FrozenLLM(tiny_model()).tokens([""], max_length=12)
    assert (len(nothing), spans.tolist()) == (1, [[0, 0]])


@pytest.fixture
def pyplot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    yield pyplot
    pyplot.close("all")


def shown(axes):
    """The pieces of text on an axes, in rows from the top, each from the left."""
    rows: dict[float, list[tuple[float, str]]] = {}
    for piece in axes.texts:
        column, row = piece.get_position()
        if column >= 0:
            rows.setdefault(row, []).append((column, piece.get_text()))
    return ["".join(piece for _, piece in sorted(rows[row])) for row in sorted(rows)]


def test_display_of_a_text(llm, pyplot):
    regressor = RelishRegressor(llm, **SMALL).fit(TEXTS, Y)
    text = "good enough"
    display = RefinementDisplay.from_estimator(regressor, text, y=1.5)
    words, path = display.axes_
    assert shown(words) == [text] * 3  # a row an iteration
    (line,) = [line for line in path.lines if len(line.get_xdata()) == 3]
    stages = [float(stage[0]) for stage in regressor.staged_predict([text])]
    np.testing.assert_allclose(line.get_xdata(), stages)
    assert "true 1.5" in [some.get_text() for some in path.texts]
    # The darkest token of an iteration is looked at most, the lightest least, up to a shade.
    (attention,) = regressor.attention([text])
    weights = attention.weights.mean(axis=(0, 2))  # (n_iterations, n_tokens)
    darkness = -np.array([sum(patch.get_facecolor()[:3]) for patch in words.patches]).reshape(3, -1)
    rows = np.arange(3)
    assert (weights[rows, darkness.argmax(axis=1)] > 0.98 * weights.max(axis=1)).all()
    assert (weights[rows, darkness.argmin(axis=1)] < 1.02 * weights.min(axis=1)).all()
    display.figure_.canvas.draw()


def test_display_of_a_long_text_shows_the_lines_that_are_looked_at_most(llm, pyplot):
    regressor = RelishRegressor(llm, **SMALL).fit(TEXTS, Y)
    text = "\n".join(f"${line} lines^ of {line}$" for line in range(20))
    display = RefinementDisplay.from_estimator(regressor, text)
    display.plot(width=30, max_lines=4)
    rows = shown(display.axes_[0])
    (attention,) = regressor.attention([text])
    peaks = attention.weights.mean(axis=(0, 2)).max(axis=0)  # (n_tokens,)
    lines = text.split("\n")
    line = np.array([text[:begin].count("\n") for begin, _ in attention.spans])
    best = np.argsort([-peaks[line == number].max() for number in range(len(lines))])[:4]
    assert [row.rstrip("⏎") for row in rows] == [lines[number] for number in sorted(best)] * 3
    assert "⋮" in [piece.get_text() for piece in display.axes_[0].texts]
    display.figure_.canvas.draw()


def test_every_character_is_drawn_once(pyplot):
    """Whatever a tokenizer's spans are: shared characters, gaps, newlines, wide and bare marks."""
    text = " Это film.\n   Not $bad^: हि 日本\tnow\r\n"
    spans = [(0, 0), (0, 2), (1, 2), (2, 4), (5, 9), (9, 10), (10, 14), (14, len(text)), (0, 0)]
    tokens = [text[begin:end] or "<s>" for begin, end in spans]
    weights = np.full((1, 2, 1, len(spans)), 0.5 / (len(spans) - 1))
    weights[..., 2] = 0.5
    attention = TextAttention(text, tokens, np.array(spans), weights)
    display = RefinementDisplay(np.array([[251234.0], [252999.0]]), attention=attention)
    display.plot()
    first, second, third = shown(display.axes_[0])[:3]
    assert (first, third) == ("<s> Это film.⏎", "<s>")
    assert second == "   Not $bad^: हि 日本 now⏎"
    shades = {piece.get_facecolor() for piece in display.axes_[0].patches[:4]}
    dark = display.axes_[0].patches[1]  # the second half of Э counts for where Э stands
    assert sum(dark.get_facecolor()) == min(map(sum, shades))
    wide = display.axes_[0].get_xlim()[1]
    assert wide == len(second) + 2  # two characters of double width
    assert [label.get_text() for label in display.axes_[1].texts] == ["251234", "252999"]
    assert "⋮" not in [piece.get_text() for piece in display.axes_[0].texts]


def test_tokens_are_those_of_the_states():
    """However a row becomes a text, and a text what is read."""
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    llm.tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}!"
    frame = pd.DataFrame({"title": TEXTS, "kind": ["a", None] * 18})

    def check(X, shown, side="right", **changes):
        llm.tokenizer.truncation_side = side
        regressor = RelishRegressor(llm, **SMALL | changes)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*were cut", UserWarning)
            regressor.fit(X, Y)
            found = regressor.attention(X[:3])
            states = list(regressor._states([one.text for one in found], regressor.layer_))
        for one, some in zip(found, states, strict=True):
            assert one.weights.shape[-1] == len(one.tokens) == len(one.spans) == len(some)
        assert "".join(found[0].tokens) == shown

    check(frame, "title: good 0\nkind: a")
    check(TEXTS, "<s>good 0</s>!", chat_template=True)
    check(TEXTS, "good 0", max_length=4, long_text="window")
    check(TEXTS, "good", max_length=4)
    check(TEXTS, "od 0", side="left", max_length=4)


def test_a_slow_tokenizer_is_refused(llm, monkeypatch):
    regressor = RelishRegressor(llm, **SMALL).fit(TEXTS, Y)
    monkeypatch.setattr(type(llm.tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="only a fast tokenizer can"):
        regressor.attention(TEXTS)


def test_display_of_many_texts(llm, pyplot):
    regressor = RelishRegressor(llm, **SMALL).fit(TEXTS, Y)
    display = RefinementDisplay.from_estimator(regressor, TEXTS, Y)
    (axes,) = display.axes_
    errors = [np.abs(stage - Y).mean() for stage in regressor.staged_predict(TEXTS)]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), errors)
    figure, mine = pyplot.subplots()
    display = RefinementDisplay.from_estimator(regressor, TEXTS, Y, ax=mine)
    assert display.figure_ is figure
    assert display.line_ in mine.lines
    with pytest.raises(ValueError, match="pass their targets as y"):
        RefinementDisplay.from_estimator(regressor, TEXTS)
    with pytest.raises(ValueError, match="pass their targets as y"):
        RefinementDisplay(display.stages)
    with pytest.raises(ValueError, match="must be 1 or more"):
        display.plot(max_lines=0)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        RefinementDisplay.from_estimator(regressor, TEXTS, Y[:-1])
    several = RelishRegressor(llm, **SMALL).fit(TEXTS, np.stack([Y, Y], axis=1))
    with pytest.raises(ValueError, match="has 2 outputs"):
        RefinementDisplay.from_estimator(several, TEXTS, Y)


def test_display_says_what_is_missing(llm, monkeypatch):
    regressor = RelishRegressor(llm, **SMALL).fit(TEXTS, Y)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"sklearn-relish\[plot\]"):
        RefinementDisplay.from_estimator(regressor, TEXTS, Y)

"""Texts to token ids: cut, in windows, and as a chat."""

import numpy as np
import pytest
import torch
from read_helpers import read
from tiny import tiny_model

from sklearn_relish import FrozenLLM


def test_long_texts_are_cut_to_max_length_and_to_the_models_context():
    llm = FrozenLLM(tiny_model("bert"), device="cpu", dtype="float32")
    (short, long), full_lengths = read(llm, ["abc", "x" * 100], 1, max_length=10)
    assert (len(short), len(long), full_lengths) == (5, 10, [5, 102])
    (long,), _ = read(llm, ["x" * 100], 1)
    assert len(long) == 64  # max_position_embeddings of the tiny BERT


def test_texts_are_tokenized_chunk_by_chunk(monkeypatch):
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    texts = ["x" * n for n in np.random.default_rng(0).integers(1, 30, 50)]
    expected, full_lengths = read(llm, texts, 2, max_length=20)
    assert full_lengths == [len(text) for text in texts]
    tokenize, chunks = llm._text_tokenizer.tokenize, []

    def recording(texts, **kwargs):
        chunks.append(len(texts))
        return tokenize(texts, **kwargs)

    monkeypatch.setattr(llm._text_tokenizer, "tokenize", recording)
    monkeypatch.setattr("sklearn_relish.llm.batching.CHUNK_TEXTS", 7)
    states, same_lengths = read(llm, texts, 2, max_length=20)
    assert chunks == [7] * 7 + [1]
    assert same_lengths == full_lengths
    torch.testing.assert_close(states, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_long_text_in_windows_has_a_state_for_each_token(kind):
    llm = FrozenLLM(tiny_model(kind), device="cpu", dtype="float32")
    special = llm.tokenizer.num_special_tokens_to_add()
    texts = ["a" * 10, "".join(chr(97 + i % 26) for i in range(1000)), "b" * 70, ""]
    states, lengths = read(llm, texts, 2, max_length=64, windows=True)
    assert lengths == [len(text) + special for text in texts]
    assert list(map(len, states)) == [max(1, length) for length in lengths]
    cut, _ = read(llm, texts, 2, max_length=64)
    torch.testing.assert_close(states[0], cut[0])  # a short text has no windows
    if kind == "llama":  # the states of an encoder also depend on the tokens after
        torch.testing.assert_close(states[1][:64], cut[1])


def test_states_of_a_window_are_those_of_the_window_alone():
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    text = "".join(chr(97 + (7 * i) % 26) for i in range(150))
    (states,), _ = read(llm, [text], 2, max_length=64, windows=True)
    for begin, first in ((0, 0), (48, 64), (96, 112)):  # windows of 64 that share 16
        (window,), _ = read(llm, [text[begin : begin + 64]], 2, max_length=64)
        torch.testing.assert_close(states[first : begin + 64], window[first - begin :])


def test_windows_do_not_depend_on_the_truncation_side():
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    left = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    left.tokenizer.truncation_side = "left"
    text = "".join(chr(97 + (7 * i) % 26) for i in range(150))
    expected, _ = read(llm, [text], 2, max_length=64, windows=True)
    states, _ = read(left, [text], 2, max_length=64, windows=True)
    torch.testing.assert_close(states, expected)


def test_windows_without_room_between_the_special_tokens_are_refused():
    llm = FrozenLLM(tiny_model("bert"), device="cpu", dtype="float32")
    with pytest.raises(ValueError, match=r"no room for a text.*raise max_length"):
        read(llm, ["abcdefgh"], 2, max_length=2, windows=True)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_only_the_part_of_a_long_text_that_is_read_is_tokenized(kind, side, monkeypatch):
    llm = FrozenLLM(tiny_model(kind), device="cpu", dtype="float32")
    llm.tokenizer.truncation_side = side
    text = "".join(np.random.default_rng(0).choice(list("abcdef "), size=100_000))
    n_characters, tokenizer = [], llm.tokenizer

    class Counting:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, texts, **kwargs):
            n_characters.append(sum(map(len, texts)))
            return tokenizer(texts, **kwargs)

    llm._text_tokenizer.tokenizer = Counting()
    ((piece,), _) = llm._text_tokenizer.tokenize([text], max_length=32, windows=False)
    expected = tokenizer(text, truncation=True, max_length=32)["input_ids"]
    assert piece.ids.tolist() == expected
    assert 0 < sum(n_characters) < 3_000
    ((pieces, spans),) = llm.tokens([text], max_length=32)
    assert "".join(text[a:b] for a, b in spans) == tokenizer.decode(
        expected, skip_special_tokens=True
    )
    assert len(pieces) == 32


def test_a_cut_text_of_long_tokens_has_max_length_tokens():
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    long_token = "z" * 100
    llm.tokenizer.add_tokens([long_token])
    ((piece,), full_lengths) = llm._text_tokenizer.tokenize(
        [long_token * 500], max_length=200, windows=False
    )
    assert len(piece.ids) == 200
    assert set(piece.ids) == {llm.tokenizer.convert_tokens_to_ids(long_token)}
    assert full_lengths[0] > 200


def test_a_chat_has_the_models_template_and_one_bos_token():
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="no chat template: name a model that was tuned for chat"):
        llm.as_chat(["hello"])
    llm.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert llm.as_chat(["hello", "you"]) == [
        "<s>[user] hello\n[assistant]",
        "<s>[user] you\n[assistant]",
    ]
    encoder = FrozenLLM(tiny_model("bert"), device="cpu", dtype="float32")
    encoder.tokenizer.chat_template = llm.tokenizer.chat_template
    (chat,) = encoder.as_chat(["hello"])  # its tokenizer adds the bos token itself
    assert encoder.tokenizer(chat)["input_ids"].count(encoder.tokenizer.bos_token_id) == 1


def test_batches_are_padded_with_the_padding_token_if_there_is_one():
    with_padding, without = (
        FrozenLLM(tiny_model(kind))._text_tokenizer for kind in ("bert", "llama")
    )
    assert with_padding.padding_id == with_padding.tokenizer.pad_token_id != with_padding.filler_id
    assert without.padding_id == without.filler_id == without.tokenizer.bos_token_id

"""A prefix that is read before every text."""

import copy
import pickle
import shutil

import numpy as np
import pytest
import torch
from read_helpers import read
from tiny import SIZE, byte_tokenizer, tiny_model
from tokenizers import normalizers
from transformers import AutoModel, Gemma3TextConfig, Phi3Config, Qwen2Config

from sklearn_relish import FrozenLLM, LLMEncoder, RelishRegressor, StateStore
from sklearn_relish.llm import prefix as prefix_module
from sklearn_relish.llm.prefix import with_prefix

PREFIX = "Films and their stars. dull: 1, fine: 3, splendid: 5. "
TEXTS = ["", "a", "dull", "dull film", "a film of medium length", "a long film " * 8]
SLIDING = {
    "gemma3": Gemma3TextConfig(
        **{"hidden_size": SIZE, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300},
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        initializer_range=0.2,
    ),
    "qwen2": Qwen2Config(
        **{"hidden_size": SIZE, "intermediate_size": 64, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300},
        initializer_range=0.2,
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {kind: tiny_model(kind) for kind in ("llama", "gpt2", "bert", "t5")}
    for kind, config in SLIDING.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        byte_tokenizer("llama").save_pretrained(made[kind])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModel.from_config(config).save_pretrained(made[kind])
    return made


def in_full(llm, text, prefix, layer):
    """States of a text from a pass that reads the prefix and the text."""
    n_special = len(llm._text_tokenizer.special_ids)
    ids = llm.tokenizer(text).input_ids or [llm._text_tokenizer.filler_id]
    before = llm.tokenizer(prefix, add_special_tokens=False).input_ids
    tokens = torch.tensor([[*ids[:n_special], *before, *ids[n_special:]]])
    with torch.inference_mode():
        (states,) = llm._forward_pass.states_at([layer], input_ids=tokens)
    return torch.cat([states[0, :n_special], states[0, n_special + len(before) :]])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "qwen2"])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_causal_model_reads_it_once(kind, layer, folders):
    llm = FrozenLLM(folders[kind], device="cpu", dtype="float32")
    prefixed = with_prefix(llm, PREFIX)
    states, lengths = read(prefixed, TEXTS, layer)
    for text, found, length in zip(TEXTS, states, lengths, strict=True):
        assert len(found) == max(1, length) == max(1, len(text))
        torch.testing.assert_close(found, in_full(llm, text, PREFIX, layer), rtol=1e-4, atol=1e-4)
    assert prefixed._n_prefix_tokens([layer], 100) == 0
    plain, _ = read(llm, TEXTS, layer)
    assert not torch.allclose(states[2], plain[2], rtol=1e-2)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_an_encoder_reads_it_with_every_text(kind, folders):
    llm = FrozenLLM(folders[kind], device="cpu", dtype="float32")
    prefix, texts = "stars: ", ["", "a", "dull film", "fine"]
    prefixed = with_prefix(llm, prefix)
    states, _ = read(prefixed, texts, 2)
    for text, found in zip(texts, states, strict=True):
        torch.testing.assert_close(found, in_full(llm, text, prefix, 2), rtol=1e-4, atol=1e-4)
    assert prefixed._n_prefix_tokens([2], 10) == len(prefix)
    assert [len(found) for found in states] == [len(found) for found in read(llm, texts, 2)[0]]


@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "t5"])
def test_a_text_has_the_same_bits_in_any_batch(kind, dtype, n_threads, folders, set_threads):
    set_threads(n_threads)
    llm = with_prefix(FrozenLLM(folders[kind], device="cpu", dtype=dtype), PREFIX)
    alone = [read(llm, [text], 2)[0][0] for text in TEXTS]
    order = np.random.default_rng(0).permutation(len(TEXTS))
    for chosen in (range(len(TEXTS)), order, [2] * 40 + [4]):
        together, _ = read(llm, [TEXTS[i] for i in chosen], 2)
        assert all(torch.equal(found, alone[i]) for found, i in zip(together, chosen, strict=True))
    again = with_prefix(FrozenLLM(folders[kind], device="cpu", dtype=dtype), PREFIX)
    assert torch.equal(read(again, TEXTS[3:4], 2)[0][0], alone[3])


def test_it_is_before_every_window_of_a_long_text(folders):
    llm = FrozenLLM(folders["gemma3"], device="cpu", dtype="float32")
    text = "abcdefghij" * 10
    ((found,), _) = read(with_prefix(llm, PREFIX), [text], 2, max_length=40, windows=True)
    assert len(found) == len(text)
    # Windows of 40 tokens begin every 30; the first 10 are context.
    expected = in_full(llm, text[30:70], PREFIX, 2)[10:]
    torch.testing.assert_close(found[40:70], expected, rtol=1e-4, atol=1e-4)


def test_deeper_layers_and_longer_texts_may_come_later(folders):
    llm = FrozenLLM(folders["gemma3"], device="cpu", dtype="float32")
    prefixed = with_prefix(llm, PREFIX)
    for layer, text in ((1, "a"), (3, "a"), (2, "long " * 60), (3, "long " * 100)):
        ((found,), _) = read(prefixed, [text], layer)
        expected = in_full(llm, text, PREFIX, layer)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(read(llm, ["a"], 3)[0]) == 1  # the model without it is unchanged


def test_the_prefix_is_read_again_only_for_other_layers(folders, monkeypatch):
    llm = with_prefix(FrozenLLM(folders["llama"], device="cpu", dtype="float32"), PREFIX)
    forward_pass, passes = llm._forward_pass, []
    read_prefix = forward_pass._read_prefix
    monkeypatch.setattr(
        forward_pass,
        "_read_prefix",
        lambda prefix, layers: passes.append(layers) or read_prefix(prefix, layers),
    )
    for layer in (2, 2, 1, 2, 1):
        read(llm, TEXTS, layer)
    assert passes == [[2], [1, 2]]


def test_its_tokens_do_not_count_for_max_length_but_for_the_context(folders):
    llm = FrozenLLM(folders["llama"], device="cpu", dtype="float32")  # has 4,096 positions
    prefixed = with_prefix(llm, "a" * 4000)
    n_read, full_lengths = prefixed.count_tokens(["b" * 300, "b" * 50], max_length=60)
    assert n_read.tolist() == [60, 50]
    assert full_lengths.tolist() == [300, 50]
    assert [len(states) for states in read(prefixed, ["b" * 300, "b" * 50], 1)[0]] == [96, 50]
    with pytest.raises(ValueError, match=r"prefix has 4096 tokens, and .* reads 4096 tokens at"):
        read(with_prefix(llm, "a" * 4096), ["b"], 1)


def test_weights_are_shared_and_few_prefixes_are_kept(folders, monkeypatch):
    monkeypatch.setattr(prefix_module, "MAX_PREFIXES", 2)
    llm = FrozenLLM(folders["llama"], device="cpu", dtype="float32")
    assert with_prefix(llm, "") is llm
    first = with_prefix(llm, "a")
    read(first, ["text"], 3)
    assert first.network is llm.network
    assert with_prefix(llm, "a") is first
    with_prefix(llm, "b"), with_prefix(llm, "a"), with_prefix(llm, "c")
    assert list(llm._prefixed) == ["a", "c"]
    assert llm.token_budget == first.token_budget
    first.token_budget = 100
    assert llm.token_budget == 100


def test_copies_and_pickles_hold_the_text_and_no_weights(folders):
    llm = with_prefix(FrozenLLM(folders["llama"], device="cpu", dtype="float32"), PREFIX)
    read(llm, ["text"], 1)
    assert copy.deepcopy(llm) is llm
    pickled = pickle.dumps(llm)
    assert len(pickled) < 1000
    loaded = pickle.loads(pickled)
    assert loaded.prefix == PREFIX
    assert loaded.fingerprint == llm.fingerprint != llm.llm.fingerprint
    assert repr(llm).startswith("FrozenLLM(")
    assert repr(llm).endswith("with the prefix 'Films and th...splendid: 5. '")


def test_models_that_can_not_pack_texts_read_it_with_every_text(folders, monkeypatch):
    llm = FrozenLLM(folders["llama"], device="cpu", dtype="float32")
    monkeypatch.setattr(llm._forward_pass, "packing", lambda layer: None)
    prefixed = with_prefix(llm, PREFIX)
    states, _ = read(prefixed, TEXTS, 2)
    for text, found in zip(TEXTS, states, strict=True):
        expected = in_full(llm, text, PREFIX, 2)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert prefixed._n_prefix_tokens([2], 10) == len(PREFIX)


def test_a_prefix_without_tokens_is_none(tmp_path):
    tokenizer = byte_tokenizer("llama")
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    tokenizer.save_pretrained(tmp_path)
    for path in tiny_model().iterdir():
        if not path.name.startswith("tokenizer"):
            shutil.copy(path, tmp_path)
    llm = FrozenLLM(tmp_path, device="cpu", dtype="float32")
    assert torch.equal(read(with_prefix(llm, " \n"), ["a"], 2)[0][0], read(llm, ["a"], 2)[0][0])


def test_texts_at_the_limit_of_the_context(folders):
    llm = FrozenLLM(folders["bert"], device="cpu", dtype="float32")  # has 64 positions
    for n_tokens in (60, 61):
        ((states,), _) = read(with_prefix(llm, "a" * n_tokens), ["b" * 9], 2)
        assert len(states) == 64 - n_tokens
    with pytest.raises(ValueError, match="shorten the prefix"):
        read(with_prefix(llm, "a" * 62), ["b"], 2)
    causal = FrozenLLM(folders["gpt2"], device="cpu", dtype="float32")  # 1,024 positions
    prefixed = with_prefix(causal, "a" * 1023)
    assert torch.allclose(
        read(prefixed, ["b"], 2)[0][0], in_full(causal, "b", "a" * 1023, 2), atol=1e-4
    )


def test_positions_that_depend_on_the_longest_text(tmp_path):
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = Phi3Config(
        **{"hidden_size": SIZE, "intermediate_size": 64, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300},
        **{"max_position_embeddings": 512, "original_max_position_embeddings": 128},
        rope_parameters={"rope_type": "longrope", "rope_theta": 10_000.0, **factors},
        pad_token_id=0,
    )
    byte_tokenizer("llama").save_pretrained(tmp_path)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    llm = FrozenLLM(tmp_path, device="cpu", dtype="float32")
    prefixed = with_prefix(llm, "a" * 30)
    ((found,), _) = read(prefixed, ["b" * 120], 2)
    torch.testing.assert_close(found, in_full(llm, "b" * 120, "a" * 30, 2), rtol=1e-4, atol=1e-4)
    assert prefixed._n_prefix_tokens([2], 120) == 30


@pytest.fixture
def rows():
    texts = [f"{word} film {i}" for i in range(20) for word in ("dull", "fine", "splendid")]
    return texts, np.array([1.0, 3.0, 5.0] * 20)


def regressor(**parameters):
    return RelishRegressor(
        tiny_model(), dtype="float32", random_state=0, **{"max_epochs": 2} | parameters
    )


def test_a_regressor_fits_on_states_after_a_prefix_and_keeps_them_apart(rows, tmp_path):
    texts, y = rows
    store = StateStore(tmp_path)
    plain = regressor(memory=store).fit(texts, y)
    prefixed = regressor(memory=store, prefix=PREFIX).fit(texts, y)
    fresh = regressor(prefix=PREFIX).fit(texts, y)
    assert np.array_equal(prefixed.predict(texts), fresh.predict(texts))
    assert not np.allclose(prefixed.predict(texts), plain.predict(texts), rtol=1e-3)
    assert prefixed.preview(texts).n_tokens == plain.preview(texts).n_tokens


def test_a_saved_regressor_has_its_prefix(rows, tmp_path):
    texts, y = rows
    fitted = regressor(prefix=PREFIX).fit(texts, y)
    fitted.save_pretrained(tmp_path / "saved")
    loaded = RelishRegressor.from_pretrained(tmp_path / "saved")
    assert loaded.prefix == PREFIX
    assert np.array_equal(loaded.predict(texts), fitted.predict(texts))
    unpickled = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(unpickled.predict(texts), fitted.predict(texts))


def test_another_prefix_after_fit_is_warned_of(rows):
    texts, y = rows
    fitted = regressor(prefix=PREFIX).fit(texts, y)
    fitted.set_params(prefix="Something else. ")
    with pytest.warns(UserWarning, match="with the prefix 'Something else. ' differs from"):
        fitted.predict(texts[:3])


def test_encoders_and_attention_have_the_tokens_of_the_text(rows):
    texts, y = rows
    encoder = LLMEncoder(tiny_model(), dtype="float32", prefix=PREFIX)
    assert not np.allclose(
        encoder.fit_transform(texts), LLMEncoder(tiny_model(), dtype="float32").fit_transform(texts)
    )
    attention = regressor(prefix=PREFIX).fit(texts, y).attention(texts[:1])
    assert "".join(attention[0].tokens) == texts[0]

import copy
import gc
import itertools
import os
import pickle
import shutil
import threading
import time
import warnings
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from tiny import N_LAYERS, SIZE, tiny_model
from transformers import AutoModel, AutoTokenizer, GPT2Model
from transformers.utils import logging as transformers_logging

from sklearn_relish import FrozenLLM, RelishRegressor
from sklearn_relish.llm.frozen import SHORTEST, TOKEN_BUDGET, shared_llm

TEXTS = ["one", "a longer text, of more tokens", "x", "", "one more"]


def read(llm, texts, layer, max_length=512):
    """States of each text, in order, and the uncut lengths."""
    states, full_lengths = [None] * len(texts), [None] * len(texts)
    for rows, (batch,), full in llm.read(texts, layers=[layer], max_length=max_length):
        for row, text, length in zip(rows, batch, full, strict=True):
            states[row], full_lengths[row] = text, length
    return states, full_lengths


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("layer", range(1, N_LAYERS + 1))
def test_states_are_the_hidden_states_of_transformers(kind, layer):
    folder = tiny_model(kind)
    llm = FrozenLLM(folder, device="cpu", dtype="float32")
    assert (llm.n_layers, llm.hidden_size) == (N_LAYERS, SIZE)
    states, _ = read(llm, TEXTS, layer)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    model = model.encoder if kind == "t5" else model
    for text, ours in zip(TEXTS, states, strict=True):
        if not text and kind != "bert":
            assert ours.shape == (1, SIZE)  # no token at all: one stands in
            continue
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            theirs = model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_no_layer_above_the_one_asked_for_is_computed():
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    ran = []
    for number, layer in enumerate(llm._layers, start=1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    read(llm, ["text"], 2)
    assert ran == [1, 2]
    assert all(len(layer._forward_hooks) == 1 for layer in llm._layers)  # ours is gone


def test_weights_are_frozen_and_no_gradient_is_kept():
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    (states, *_), _ = read(llm, TEXTS, 2)
    assert not states.requires_grad
    assert not any(parameter.requires_grad for parameter in llm.network.parameters())
    assert not hasattr(llm.network, "lm_head")


def passes_of(llm, monkeypatch):
    """The lengths of the texts in each pass, from now on."""
    start, passes = llm._start_pass, []

    def counted(tokens, layers):
        passes.append([len(ids) for ids in tokens])
        return start(tokens, layers)

    monkeypatch.setattr(llm, "_start_pass", counted)
    return passes


@pytest.mark.parametrize("packed", [True, False])
def test_batches_are_as_large_as_the_token_budget_allows(packed, monkeypatch):
    monkeypatch.setitem(TOKEN_BUDGET, "cpu", 60)
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    if not packed:
        monkeypatch.setattr(llm, "_packs", lambda layer: None)
    passes = passes_of(llm, monkeypatch)
    lengths = np.random.default_rng(0).integers(1, 80, 100)
    read(llm, ["x" * n for n in lengths], 1)
    assert sorted(itertools.chain.from_iterable(passes)) == sorted(lengths)
    assert all(len(batch) == 1 or sum(batch) <= 60 for batch in passes)
    assert [batch[0] for batch in passes] == sorted((b[0] for b in passes), reverse=True)
    if packed:  # no text that follows would have found room
        for batch, following in itertools.pairwise(passes):
            assert sum(batch) + following[0] > 60
    else:  # texts of one length
        assert all(len(set(batch)) == 1 for batch in passes)
        assert max(map(len, passes)) > 2


def test_texts_are_tokenized_window_by_window(monkeypatch):
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    texts = ["x" * n for n in np.random.default_rng(0).integers(1, 30, 50)]
    whole, full_lengths = read(llm, texts, 2, max_length=20)
    monkeypatch.setattr("sklearn_relish.llm.frozen.WINDOW_TEXTS", 7)
    windows, same_lengths = read(llm, texts, 2, max_length=20)
    assert full_lengths == same_lengths == [len(text) for text in texts]
    torch.testing.assert_close(windows, whole, rtol=1e-4, atol=1e-5)


def test_one_pass_gives_the_states_of_several_layers(monkeypatch):
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    alone = [read(llm, TEXTS, layer)[0] for layer in (3, 1)]
    passes = passes_of(llm, monkeypatch)
    together = [[None] * len(TEXTS), [None] * len(TEXTS)]
    for rows, states, _ in llm.read(TEXTS, layers=[3, 1], max_length=512):
        assert len(states) == 2
        for found, some in zip(together, states, strict=True):
            for row, text in zip(rows, some, strict=True):
                found[row] = text
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    assert len(passes) == 1


def test_batches_hold_texts_of_similar_length_on_other_devices(monkeypatch):
    monkeypatch.setattr(FrozenLLM, "_packs", lambda *_: None)
    monkeypatch.setitem(SHORTEST, "cpu", 0.875)
    lengths = np.random.default_rng(0).integers(1, 80, 200)
    texts = ["x" * n for n in lengths]
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    passes = passes_of(llm, monkeypatch)
    padded, _ = read(llm, texts, 1, max_length=99)
    assert [len(states) for states in padded] == lengths.tolist()
    assert all(min(batch) >= 0.875 * max(batch) for batch in passes)
    assert any(len(set(batch)) > 1 for batch in passes)
    alone = [read(llm, [text], 1)[0][0] for text in texts[:20]]
    torch.testing.assert_close(padded[:20], alone, rtol=1e-4, atol=1e-5)


def test_a_batch_is_started_before_the_one_before_is_finished(monkeypatch):
    """As on a CUDA device, with room for two texts of 20 tokens at a time."""
    texts = [letter * n for n in range(1, 21) for letter in "abc"]
    expected, _ = read(FrozenLLM(tiny_model(), device="cpu", dtype="float32"), texts, 2)
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    start_pass, finish_pass, under_way, most = llm._start_pass, llm._finish_pass, [], []

    def start(tokens, layers):
        if sum(map(len, tokens)) + sum(under_way) > 40:
            raise torch.OutOfMemoryError("not enough")
        under_way.append(sum(map(len, tokens)))
        most.append(len(under_way))
        return start_pass(tokens, layers)._replace(done=[threading.Event()])

    def finish(unfinished, layers):
        assert under_way.pop(0) == int(unfinished.lengths.sum())
        return finish_pass(unfinished._replace(done=[]), layers)

    monkeypatch.setattr(llm, "_start_pass", start)
    monkeypatch.setattr(llm, "_finish_pass", finish)
    with pytest.warns(UserWarning, match="too much for the memory"):
        states, _ = read(llm, texts, 2)
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
    assert max(most) == 2
    assert not under_way


def test_what_is_too_much_for_the_memory_is_read_in_smaller_batches(monkeypatch):
    texts = [letter * n for n in range(1, 21) for letter in "abc"]
    expected, _ = read(FrozenLLM(tiny_model(), device="cpu", dtype="float32"), texts, 2)
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    states_at = llm._states_at

    def tight(layers, input_ids, **inputs):
        if input_ids.numel() > 25:
            raise torch.OutOfMemoryError("not enough")
        return states_at(layers, input_ids=input_ids, **inputs)

    monkeypatch.setattr(llm, "_states_at", tight)
    with pytest.warns(UserWarning, match="too much for the memory of cpu") as told:
        states, _ = read(llm, texts, 2)
    assert [str(warning.message).split()[3] for warning in told] == ["60", "30"]  # tokens
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
    assert llm.token_budget == 15

    with pytest.raises(torch.OutOfMemoryError):
        read(llm, ["x" * 26], 2)


def test_long_texts_are_cut_to_max_length_and_to_the_window():
    llm = FrozenLLM(tiny_model("bert"), device="cpu", dtype="float32")
    (short, long), full_lengths = read(llm, ["abc", "x" * 100], 1, max_length=10)
    assert (len(short), len(long), full_lengths) == (5, 10, [5, 102])
    (long,), _ = read(llm, ["x" * 100], 1)
    assert len(long) == 64  # max_position_embeddings of the tiny BERT


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_do_not_depend_on_the_company_of_a_text(dtype):
    llm = FrozenLLM(tiny_model(), device="cpu", dtype=dtype)
    texts = [letter * n for n in (3, 3, 3, 9, 9, 30) for letter in "abcdefg"]
    together, _ = read(llm, texts, 2)
    for text, states in zip(texts, together, strict=True):
        (alone,), _ = read(llm, [text], 2)
        torch.testing.assert_close(alone, states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "number"), [(1, 1), (3, 3), (-1, 3), (-3, 1), (0.01, 1), (0.66, 2), (1.0, 3)]
)
def test_layer_by_number_and_by_share(layer, number):
    assert FrozenLLM(tiny_model()).resolve_layer(layer) == number


@pytest.mark.parametrize("layer", [0, 4, -4, 1.5])
def test_layer_that_the_model_does_not_have(layer):
    with pytest.raises(ValueError, match=f"layer={layer} is none of .* which has 3 layers"):
        FrozenLLM(tiny_model()).resolve_layer(layer)


def test_is_never_copied():
    llm = FrozenLLM(tiny_model(), dtype="float32")
    assert copy.copy(llm) is llm
    assert copy.deepcopy(llm) is llm
    assert clone(RelishRegressor(llm)).model is llm


def test_pickle_holds_the_name_alone():
    llm = shared_llm(tiny_model(), dtype="float32")
    read(llm, ["text"], 1)
    pickled = pickle.dumps(llm)
    assert len(pickled) < 500
    assert pickle.loads(pickled) is llm


def test_named_models_are_loaded_once_a_process():
    assert shared_llm(str(tiny_model())) is shared_llm(tiny_model())
    assert shared_llm(tiny_model()) is not shared_llm(tiny_model(), dtype="float32")


def test_a_model_that_changes_on_disk_is_another_model(tmp_path, monkeypatch):
    for name, kind in (("a", "llama"), ("b", "gpt2")):
        (tmp_path / name).mkdir()
        for path in tiny_model(kind).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    first = shared_llm("a", "cpu", "float32")
    assert shared_llm(tmp_path / "a", torch.device("cpu"), torch.float32) is first
    before = first.fingerprint
    for path in (tmp_path / "b").iterdir():
        (tmp_path / "a" / path.name).write_bytes(path.read_bytes())
    second = shared_llm("a", "cpu", "float32")
    assert second.fingerprint != before
    assert second.fingerprint == shared_llm("b", "cpu", "float32").fingerprint


def test_subfolders_are_models_of_their_own(tmp_path):
    for name, kind in (("a", "llama"), ("b", "gpt2")):
        (tmp_path / name).mkdir()
        for path in tiny_model(kind).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    llms = [FrozenLLM(tmp_path, model_kwargs={"subfolder": name}) for name in "ab"]
    assert [llm.config.model_type for llm in llms] == ["llama", "gpt2"]
    assert llms[0].fingerprint != llms[1].fingerprint


def test_secrets_are_not_shown():
    assert "hf_" not in repr(FrozenLLM("x", model_kwargs={"token": "hf_secret"}))


def test_device_that_is_not_there():
    with pytest.raises(ValueError, match="device='gpu' is not to be had here"):
        _ = FrozenLLM(tiny_model(), device="gpu").torch_device


def test_code_of_a_model_does_not_run_unless_asked(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(
        '{"model_type": "odd", "auto_map": {"AutoConfig": "code.Odd"}}'
    )
    (tmp_path / "code.py").write_text("raise SystemExit('the code ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        _ = FrozenLLM(tmp_path).config


def test_dtype():
    folder = tiny_model()
    (states, *_), _ = read(FrozenLLM(folder, device="cpu", dtype="bfloat16"), TEXTS, 1)
    assert states.dtype == torch.bfloat16
    assert FrozenLLM(folder, dtype=torch.float16).torch_dtype == torch.float16
    assert FrozenLLM(folder, device="cpu").torch_dtype in (torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="dtype must be 'auto'"):
        _ = FrozenLLM(folder, dtype="int8").torch_dtype


def test_overflow_is_an_error_and_no_silent_number():
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    llm.network.layers[0].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"not finite at layer 1 in torch\.float32: the"):
        read(llm, ["text"], 1)


def test_missing_model_says_what_was_tried(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        OSError, match=r"No model 'no/such'.*tried the folder .*no/such and the Hug"
    ):
        _ = FrozenLLM("no/such", model_kwargs={"local_files_only": True}).n_layers
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"The folder .*empty holds no model: it has no config.json"):
        _ = FrozenLLM(tmp_path / "empty").n_layers
    with pytest.raises(FileNotFoundError, match=r"No model file at .*nothing.gguf"):
        _ = FrozenLLM("nothing.gguf").n_layers


def test_only_safetensors_unless_asked(tmp_path):
    folder = tiny_model("gpt2")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    model = GPT2Model.from_pretrained(folder)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="use_safetensors"):
        read(FrozenLLM(tmp_path, device="cpu", dtype="float32"), ["text"], 1)
    asked = FrozenLLM(
        tmp_path, device="cpu", dtype="float32", model_kwargs={"use_safetensors": False}
    )
    (ours,), _ = read(asked, ["text"], 1)
    (theirs,), _ = read(FrozenLLM(folder, device="cpu", dtype="float32"), ["text"], 1)
    assert torch.equal(ours, theirs)


def test_fingerprint_follows_the_content_and_not_the_path(tmp_path):
    folder = tiny_model()
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert FrozenLLM(tmp_path).fingerprint == FrozenLLM(folder).fingerprint
    weights = tmp_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert FrozenLLM(tmp_path).fingerprint != FrozenLLM(folder).fingerprint
    quantized = FrozenLLM(folder, model_kwargs={"quantization_config": "4 bit"})
    assert quantized.fingerprint != FrozenLLM(folder).fingerprint
    for neutral in ({"token": "x"}, {"device_map": "auto"}):
        assert FrozenLLM(folder, model_kwargs=neutral).fingerprint == FrozenLLM(folder).fingerprint


def test_reading_is_silent_and_changes_no_setting_of_transformers(capfd):
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(FrozenLLM(tiny_model(), device="cpu"), TEXTS, 1)
    after = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    assert before == after
    assert capfd.readouterr() == ("", "")


def test_path_objects_are_taken():
    assert FrozenLLM(tiny_model()).model == os.fspath(tiny_model())


def test_a_model_that_changes_under_its_fingerprint_is_refused(tmp_path):
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    llm = FrozenLLM(folder, device="cpu", dtype="float32")
    assert llm.fingerprint == FrozenLLM(tiny_model(), device="cpu", dtype="float32").fingerprint
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    with pytest.raises(RuntimeError, match="have changed since this process first looked"):
        read(llm, TEXTS, layer=1)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_long_text_is_read_in_windows_and_each_token_once(kind):
    llm = FrozenLLM(tiny_model(kind), device="cpu", dtype="float32")
    special = llm.tokenizer.num_special_tokens_to_add()
    texts = ["a" * 10, "".join(chr(97 + i % 26) for i in range(1000)), "b" * 70, ""]
    found = {}
    for rows, (batch,), full in llm.read(texts, layers=[2], max_length=64, windows=True):
        for row, states, length in zip(rows, batch, full, strict=True):
            assert row not in found
            assert length == len(texts[row]) + special
            assert len(states) == max(1, length)
            found[row] = states
    assert sorted(found) == [0, 1, 2, 3]
    whole, _ = read(llm, texts, 2, max_length=64)
    torch.testing.assert_close(found[0], whole[0])  # what fits is read as ever
    if kind == "llama":  # of an encoder, what comes after the cut has a say in what comes before
        torch.testing.assert_close(found[1][:64], whole[1])


def test_states_of_a_window_are_those_of_the_window_alone():
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    text = "".join(chr(97 + (7 * i) % 26) for i in range(150))
    ((_, (batch,), _),) = llm.read([text], layers=[2], max_length=64, windows=True)
    (states,) = batch
    for begin, first in ((0, 0), (48, 64), (96, 112)):  # windows of 64 that share 16
        ((_, (window,), _),) = llm.read([text[begin : begin + 64]], layers=[2], max_length=64)
        expected = next(iter(window))[first - begin :]
        torch.testing.assert_close(states[first : begin + 64], expected)


def test_windows_are_in_order_where_the_tokenizer_cuts_on_the_left():
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    other = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    other.tokenizer.truncation_side = "left"
    text = "".join(chr(97 + (7 * i) % 26) for i in range(150))
    found = [
        next(iter(next(some.read([text], layers=[2], max_length=64, windows=True))[1][0]))
        for some in (llm, other)
    ]
    torch.testing.assert_close(*found)


def test_long_texts_are_handed_on_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr("sklearn_relish.llm.frozen.GROUP_BUDGETS", 1)
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    llm.token_budget = 256
    passes, start = [], FrozenLLM._start_pass

    def counted(self, batch, layers):
        passes.append(len(batch))
        return start(self, batch, layers)

    monkeypatch.setattr(FrozenLLM, "_start_pass", counted)
    reading = llm.read(
        [chr(97 + i) * 300 for i in range(20)], layers=[2], max_length=64, windows=True
    )
    next(reading)
    assert sum(passes) < 20  # of 120 windows
    assert len({int(row) for rows, *_ in reading for row in rows}) == 19


def test_windows_too_narrow_for_the_special_tokens():
    llm = FrozenLLM(tiny_model("bert"), device="cpu", dtype="float32")
    with pytest.raises(ValueError, match=r"no room for a text.*raise max_length"):
        list(llm.read(["abcdefgh"], layers=[2], max_length=2, windows=True))


def test_the_cost_of_windows_is_linear_in_the_length(monkeypatch):
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    start, tokens = FrozenLLM._start_pass, []

    def counted(self, batch, layers):
        tokens.append(sum(len(ids) for ids in batch))
        return start(self, batch, layers)

    monkeypatch.setattr(FrozenLLM, "_start_pass", counted)
    n_read = {}
    for n in (10_000, 20_000):
        tokens.clear()
        list(llm.read(["a" * n], layers=[2], max_length=128, windows=True))
        n_read[n] = sum(tokens)
    assert n_read[10_000] < 1.35 * 10_000
    assert n_read[20_000] == pytest.approx(2 * n_read[10_000], rel=0.02)


def test_a_chat_goes_through_the_models_template_and_begins_once():
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
    (chat,) = encoder.as_chat(["hello"])  # its tokenizer begins the text itself
    assert encoder.tokenizer(chat)["input_ids"].count(encoder.tokenizer.bos_token_id) == 1


def truncated(name, keep):
    def change(folder):
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])

    return change


def without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def with_another_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name][:5].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncated("model.safetensors", 0.0), "its files are damaged or do not fit together"),
        (truncated("model.safetensors", 0.5), "its files are damaged or do not fit together"),
        (truncated("tokenizer.json", 0.1), "its files are damaged or do not fit together"),
        (truncated("config.json", 0.5), "not a valid JSON file"),
        (with_another_shape, "its files are damaged or do not fit together"),
        (without_a_tensor, r"incomplete: 1 tensors are missing, the first is 'layers.0.mlp.down"),
    ],
)
def test_damaged_models_are_refused(change, message, tmp_path):
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    change(folder)
    with pytest.raises(OSError, match=message):
        read(FrozenLLM(folder, device="cpu", dtype="float32"), ["text"], 2)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\xff\xfe" * 5000])
def test_damaged_gguf_files_are_refused(content, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"model.gguf can't be converted: it is damaged or incomple"):
        _ = FrozenLLM(path).config
    assert not list((tmp_path / "cache").rglob("config.json"))


def test_a_model_whose_files_change_replaces_the_one_before(tmp_path):
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    first = shared_llm(folder, "cpu", "float32")
    assert shared_llm(folder, "cpu", "float32") is first
    references = []
    for i in range(5):
        os.utime(folder / "config.json", ns=(i, i))
        references.append(weakref.ref(shared_llm(folder, "cpu", "float32")))
    gc.collect()
    assert [reference() is not None for reference in references] == [False] * 4 + [True]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_of_a_long_text_only_what_is_read_is_tokenized(kind, side, monkeypatch):
    llm = FrozenLLM(tiny_model(kind), device="cpu", dtype="float32")
    llm.tokenizer.truncation_side = side
    text = "".join(np.random.default_rng(0).choice(list("abcdef "), size=100_000))
    seen = []
    tokenizer = llm.tokenizer

    class Counting:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, texts, **kwargs):
            seen.append(sum(map(len, texts)))
            return tokenizer(texts, **kwargs)

    llm.__dict__["tokenizer"] = Counting()
    ((piece,), _) = llm._tokenize([text], 32, False)
    expected = tokenizer(text, truncation=True, max_length=32)["input_ids"]
    assert piece.ids.tolist() == expected
    assert sum(seen) < 3_000
    ((pieces, spans),) = llm.tokens([text], max_length=32)
    assert "".join(text[a:b] for a, b in spans) == tokenizer.decode(
        expected, skip_special_tokens=True
    )
    assert len(pieces) == 32


def test_a_text_of_long_tokens_is_tokenized_as_far_as_it_takes():
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    long_token = "z" * 100
    llm.tokenizer.add_tokens([long_token])
    ((piece,), full) = llm._tokenize([long_token * 500], 200, False)
    assert len(piece.ids) == 200
    assert set(piece.ids) == {llm.tokenizer.convert_tokens_to_ids(long_token)}
    assert full[0] > 200


def test_another_thread_waits_for_the_current_batch_at_most(monkeypatch):
    monkeypatch.setitem(TOKEN_BUDGET, "cpu", 16)
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    other = FrozenLLM(tiny_model("bert"), device="cpu", dtype="float32")
    inside, go_on, passes, served = threading.Event(), threading.Event(), [], threading.Event()
    states_at = llm._states_at

    def slow(layers, **inputs):
        passes.append(threading.current_thread().name)
        if len(passes) == 3:
            inside.set()
            assert go_on.wait(60)
        return states_at(layers, **inputs)

    def serve():
        read(llm, ["a text"], 2)
        served.set()

    llm._packs(2)
    monkeypatch.setattr(llm, "_states_at", slow)
    corpus = threading.Thread(target=read, args=(llm, [f"{i} text" for i in range(200)], 2))
    corpus.start()
    assert inside.wait(60)
    service = threading.Thread(target=serve, name="service")
    service.start()
    read(other, ["of another model"], 2)  # does not wait at all
    while not llm._passing._waiting:
        time.sleep(0.001)
    go_on.set()
    assert served.wait(60)
    corpus.join(60)
    assert passes.index("service") == 3  # the first after the batch that was under way


def test_a_loading_model_does_not_keep_others_waiting(monkeypatch):
    loading, go_on = threading.Event(), threading.Event()
    from_pretrained = FrozenLLM._from_pretrained

    def slow(self, auto_class, **kwargs):
        if threading.current_thread().name == "slow":
            loading.set()
            assert go_on.wait(60)
        return from_pretrained(self, auto_class, **kwargs)

    monkeypatch.setattr(FrozenLLM, "_from_pretrained", slow)
    first, second = (FrozenLLM(tiny_model(), device="cpu", dtype="float32") for _ in range(2))
    thread = threading.Thread(target=lambda: first.network, name="slow")
    thread.start()
    assert loading.wait(60)
    read(second, ["text"], 2)
    go_on.set()
    thread.join(60)
    assert "network" in vars(first)

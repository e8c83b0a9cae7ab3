"""Loading only the layers that are read: equal states, and what is loaded when."""

import json
import os
import shutil
import tempfile
import threading
from functools import cache
from pathlib import Path

import pytest
import torch
from read_helpers import read
from safetensors.torch import load_file, save_file
from tiny import N_LAYERS, SIZE, byte_tokenizer, tiny_model
from torch import nn
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModel,
    BigBirdConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
)

from sklearn_relish import FrozenLLM
from sklearn_relish.llm.layers import NotLoaded, _shares_weights, partial_model_class, text_layers

TEXTS = ["one", "a longer text, of more tokens", "x", "", "one more"]
SIZES = {
    "hidden_size": SIZE,
    "intermediate_size": 64,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "vocab_size": 300,
}
PARTIAL = ["llama", "gpt2", "bert", "t5", "gemma3_text", "gemma3"]


def configuration(kind):
    if kind == "albert":  # all layers are one
        return AlbertConfig(**SIZES, embedding_size=16)
    if kind == "bigbird":  # for short texts it changes the attention of all layers
        return BigBirdConfig(**SIZES, attention_type="block_sparse")
    text = {**SIZES, "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 4}
    text["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    if kind == "gemma3_text":
        return Gemma3TextConfig(**text, pad_token_id=0)
    vision = {**SIZES, "image_size": 28, "patch_size": 14}
    return Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=299
    )


@cache
def model_folder(kind):
    if kind in {"llama", "gpt2", "bert", "t5"}:
        return tiny_model(kind)
    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{kind}-"))
    byte_tokenizer("llama").save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModel.from_config(configuration(kind)).save_pretrained(folder)
    return folder


def new_llm(folder, **model_kwargs):
    return FrozenLLM(folder, device="cpu", dtype="float32", model_kwargs=model_kwargs or None)


def with_all_layers(kind):
    llm = new_llm(model_folder(kind))
    assert loaded_layers(llm.network) == [1, 2, 3]
    return llm


def loaded_layers(network):
    layers = text_layers(network, N_LAYERS)
    return [i for i, layer in enumerate(layers, 1) if not isinstance(layer, NotLoaded)]


def loaded_by_reading(llm, layer):
    read(llm, ["text"], layer)
    return loaded_layers(llm._forward_pass_to(layer).network)


def folder_with(folder, copy, change):
    """A copy of a model's folder in which `change` has been made to the dict of its tensors."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def without_layers(*numbers):
    def change(tensors):
        for name in list(tensors):
            if any(f".{number - 1}." in name for number in numbers):
                del tensors[name]

    return change


@pytest.mark.parametrize("kind", PARTIAL)
@pytest.mark.parametrize("layer", range(1, N_LAYERS + 1))
def test_states_have_the_bits_of_the_whole_network(kind, layer):
    expected, _ = read(with_all_layers(kind), TEXTS, layer)
    llm = new_llm(model_folder(kind))
    states, _ = read(llm, TEXTS, layer)
    torch.testing.assert_close(states, expected, rtol=0, atol=0)
    assert loaded_by_reading(llm, layer) == list(range(1, layer + 1))


@pytest.mark.parametrize("kind", PARTIAL)
def test_a_deeper_layer_is_loaded_when_it_is_read(kind):
    whole, llm = with_all_layers(kind), new_llm(model_folder(kind))
    for layer in (1, 3, 2):
        states, _ = read(llm, TEXTS, layer)
        torch.testing.assert_close(states, read(whole, TEXTS, layer)[0], rtol=0, atol=0)
    assert loaded_by_reading(llm, 1) == [1, 2, 3]


def test_the_deepest_of_several_layers_decides():
    llm = new_llm(tiny_model())
    list(llm.read(TEXTS, layers=[2, 1], max_length=512))
    assert loaded_by_reading(llm, 1) == [1, 2]


@pytest.mark.parametrize("kind", PARTIAL)
def test_only_missing_layers_are_loaded_again(kind):
    network, depth = new_llm(model_folder(kind))._load_network(range(1, 2))
    assert depth == 2
    names = [name for name, _ in network.named_parameters()]
    assert any(".1." in name for name in names)
    assert loaded_layers(network) == [2]
    if kind != "t5":  # its embedding has the weights of two parts
        assert all(name.startswith(("layers.1.", "h.1.", "encoder.layer.1.")) for name in names)


def test_weights_above_the_layer_are_not_read(tmp_path):
    folder = folder_with(tiny_model(), tmp_path / "model", without_layers(3))
    llm = new_llm(folder)
    expected, _ = read(with_all_layers("llama"), TEXTS, 2)
    torch.testing.assert_close(read(llm, TEXTS, 2)[0], expected, rtol=0, atol=0)
    for _ in range(2):
        with pytest.raises(OSError, match=r"incomplete: 9 tensors are missing, the first is 'la"):
            read(llm, TEXTS, 3)
        assert torch.equal(read(llm, TEXTS, 2)[0][1], expected[1])


def test_weights_of_layers_that_are_read_must_be_there(tmp_path):
    folder = folder_with(tiny_model(), tmp_path / "model", without_layers(1))
    with pytest.raises(OSError, match="incomplete: 9 tensors are missing"):
        read(new_llm(folder), TEXTS, 2)


def test_sharded_weights(tmp_path):
    shutil.copytree(tiny_model(), tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    model = AutoModel.from_pretrained(tiny_model())
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    expected, _ = read(with_all_layers("llama"), TEXTS, 2)
    llm = new_llm(tmp_path)
    torch.testing.assert_close(read(llm, TEXTS, 2)[0], expected, rtol=0, atol=0)
    assert loaded_by_reading(llm, 2) == [1, 2]


def test_a_network_that_uses_layers_above_is_loaded_completely():
    expected, _ = read(with_all_layers("bigbird"), TEXTS, 1)
    for texts in (TEXTS, TEXTS[1:2]):
        llm = new_llm(model_folder("bigbird"))
        states, _ = read(llm, texts, 1)
        assert llm._depth == 3
        found = expected if texts is TEXTS else expected[1:2]
        torch.testing.assert_close(states, found, rtol=0, atol=0)


@pytest.mark.parametrize(
    "model_kwargs",
    [
        {"device_map": {"": "cpu"}},
        {"trust_remote_code": True},
        {"attention_dropout": 0.5},  # any that is not known to leave the modules as they are
    ],
)
def test_some_keyword_arguments_need_all_layers(model_kwargs):
    llm = new_llm(tiny_model(), **model_kwargs)
    expected, _ = read(with_all_layers("llama"), TEXTS, 1)
    torch.testing.assert_close(read(llm, TEXTS, 1)[0], expected, rtol=0, atol=0)
    assert loaded_by_reading(llm, 1) == [1, 2, 3]


def partial_class(config, source="."):
    return partial_model_class(config, range(2), source=str(source), kwargs={})


def test_some_models_need_all_layers():
    assert partial_class(AutoConfig.from_pretrained(tiny_model())) is not None
    quantized = AutoConfig.from_pretrained(tiny_model())
    quantized.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert partial_class(quantized) is None
    assert partial_class(configuration("albert")) is None
    assert partial_model_class(LlamaConfig(**SIZES), range(3), source=".", kwargs={}) is None


def test_a_model_with_an_adapter_needs_all_layers(tmp_path):
    pytest.importorskip("peft")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    config = AutoConfig.from_pretrained(tiny_model())
    assert partial_class(config, tmp_path) is None


@pytest.mark.parametrize(
    ("changed", "shared"), [("layers.2", True), ("outside", True), (None, False)]
)
def test_layers_that_share_weights_are_found(changed, shared):
    model = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.Linear(2, 2) for _ in range(3)]), "outside": nn.Linear(2, 2)}
    )
    if changed is not None:
        model.get_submodule(changed).weight = model["layers"][0].weight
    assert _shares_weights(model, "layers") == shared


def test_reading_goes_on_while_another_thread_loads_deeper_layers(monkeypatch):
    loading, proceed, found = threading.Event(), threading.Event(), []
    llm = new_llm(tiny_model())
    expected, _ = read(llm, TEXTS, 2)
    load = llm._load_network

    def slow(layers):
        loaded = load(layers)
        loading.set()
        assert proceed.wait(60)
        return loaded

    monkeypatch.setattr(llm, "_load_network", slow)
    thread = threading.Thread(target=lambda: found.extend(read(llm, TEXTS, 3)[0]))
    thread.start()
    assert loading.wait(60)
    during, _ = read(llm, TEXTS, 2)
    proceed.set()
    thread.join(60)
    torch.testing.assert_close(during, expected, rtol=0, atol=0)
    torch.testing.assert_close(found, read(with_all_layers("llama"), TEXTS, 3)[0], rtol=0, atol=0)


def test_threads_that_start_together_load_once(monkeypatch):
    llm, loads, start = new_llm(tiny_model()), [], threading.Barrier(4)
    load = llm._load_network
    monkeypatch.setattr(llm, "_load_network", lambda layers: loads.append(layers) or load(layers))

    def reader():
        start.wait(60)
        read(llm, TEXTS, 2)

    threads = [threading.Thread(target=reader) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert loads == [range(2)]


def test_layers_of_changed_files_are_not_added(tmp_path):
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    llm = new_llm(folder)
    read(llm, TEXTS, 1)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    with pytest.raises(RuntimeError, match="have changed since this process first read them"):
        read(llm, TEXTS, 2)
    with pytest.raises(RuntimeError, match="have changed since this process first read them"):
        _ = llm.fingerprint


def test_the_fingerprint_does_not_depend_on_the_layers_loaded():
    unloaded, llm = new_llm(tiny_model()), new_llm(tiny_model())
    read(llm, TEXTS, 1)
    assert llm.fingerprint == unloaded.fingerprint
    before = llm.fingerprint
    read(llm, TEXTS, 3)
    assert llm.fingerprint == before

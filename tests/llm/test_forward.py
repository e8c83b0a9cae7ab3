"""The forward pass: which states it gives, how far it goes, and who waits for it."""

import threading
import time

import pytest
import torch
from read_helpers import read, record_batches
from tiny import N_LAYERS, SIZE, tiny_model
from transformers import AutoModel, AutoTokenizer

from sklearn_relish import FrozenLLM
from sklearn_relish.llm.batching import TOKEN_BUDGET

TEXTS = ["one", "a longer text, of more tokens", "x", "", "one more"]


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
            assert ours.shape == (1, SIZE)  # a text without tokens has one filler token
            continue
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            theirs = model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_no_layer_above_the_requested_one_is_computed():
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    ran = []
    for number, layer in enumerate(llm._forward_pass.layers, start=1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    read(llm, ["text"], 2)
    assert ran == [1, 2]
    for layer in llm._forward_pass.layers:
        assert len(layer._forward_hooks) == 1  # the hook of the pass is removed


def test_weights_are_frozen_and_no_gradient_is_kept():
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    (states, *_), _ = read(llm, TEXTS, 2)
    assert not states.requires_grad
    assert not any(parameter.requires_grad for parameter in llm.network.parameters())
    assert not hasattr(llm.network, "lm_head")


def test_one_pass_gives_the_states_of_several_layers(monkeypatch):
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    alone = [read(llm, TEXTS, layer)[0] for layer in (3, 1)]
    batches = record_batches(llm, monkeypatch)
    together = [[None] * len(TEXTS), [None] * len(TEXTS)]
    for rows, states, _ in llm.read(TEXTS, layers=[3, 1], max_length=512):
        assert len(states) == 2
        for found, layer_states in zip(together, states, strict=True):
            for row, text in zip(rows, layer_states, strict=True):
                found[row] = text
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    assert len(batches) == 1


def test_states_that_overflow_are_an_error():
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    llm.network.layers[0].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"not finite at layer 1 in torch\.float32: the"):
        read(llm, ["text"], 1)


def test_a_thread_waits_for_the_current_batch_of_another_and_no_longer(monkeypatch):
    monkeypatch.setitem(TOKEN_BUDGET, "cpu", 16)
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    other = FrozenLLM(tiny_model("bert"), device="cpu", dtype="float32")
    inside, proceed, served = threading.Event(), threading.Event(), threading.Event()
    passes = []
    states_at = llm._forward_pass.states_at

    def slow(layers, **inputs):
        passes.append(threading.current_thread().name)
        if len(passes) == 3:
            inside.set()
            assert proceed.wait(60)
        return states_at(layers, **inputs)

    def serve():
        read(llm, ["a text"], 2)
        served.set()

    llm._forward_pass.packing(2)
    monkeypatch.setattr(llm._forward_pass, "states_at", slow)
    corpus = threading.Thread(target=read, args=(llm, [f"{i} text" for i in range(200)], 2))
    corpus.start()
    assert inside.wait(60)
    service = threading.Thread(target=serve, name="service")
    service.start()
    read(other, ["of another model"], 2)  # does not wait at all
    while not llm._forward_pass.lock._waiting:
        time.sleep(0.001)
    proceed.set()
    assert served.wait(60)
    corpus.join(60)
    assert passes.index("service") == 3  # the first after the current batch

"""`FrozenLLM` as an object: its parameters, copies, pickles, and one instance for each model."""

import copy
import gc
import os
import pickle
import shutil
import threading
import weakref

import pytest
import torch
from read_helpers import read
from sklearn.base import clone
from tiny import tiny_model

from sklearn_relish import FrozenLLM, RelishRegressor
from sklearn_relish.llm.frozen import shared_llm


@pytest.mark.parametrize(
    ("layer", "number"), [(1, 1), (3, 3), (-1, 3), (-3, 1), (0.01, 1), (0.66, 2), (1.0, 3)]
)
def test_a_layer_is_a_number_or_a_fraction_of_the_depth(layer, number):
    assert FrozenLLM(tiny_model()).resolve_layer(layer) == number


@pytest.mark.parametrize("layer", [0, 4, -4, 1.5])
def test_a_layer_that_the_model_does_not_have_is_refused(layer):
    with pytest.raises(ValueError, match=f"layer={layer} is not a layer of .* which has 3 layers"):
        FrozenLLM(tiny_model()).resolve_layer(layer)


def test_it_is_never_copied():
    llm = FrozenLLM(tiny_model(), dtype="float32")
    assert copy.copy(llm) is llm
    assert copy.deepcopy(llm) is llm
    assert clone(RelishRegressor(llm)).model is llm


def test_a_pickle_holds_the_name_and_no_weights():
    llm = shared_llm(tiny_model(), dtype="float32")
    read(llm, ["text"], 1)
    pickled = pickle.dumps(llm)
    assert len(pickled) < 500
    assert pickle.loads(pickled) is llm


def test_named_models_are_loaded_once_a_process():
    assert shared_llm(str(tiny_model())) is shared_llm(tiny_model())
    assert shared_llm(tiny_model()) is not shared_llm(tiny_model(), dtype="float16")


def test_a_shared_model_is_replaced_after_its_files_change(tmp_path):
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    first = shared_llm(folder, "cpu", "float32")
    assert shared_llm(folder, "cpu", "float32") is first
    references = []
    for i in range(5):
        os.utime(folder / "config.json", ns=(i, i))
        references.append(weakref.ref(shared_llm(folder, "cpu", "float32")))
    gc.collect()
    assert [reference() is not None for reference in references] == [False] * 4 + [True]


def test_repr_does_not_show_the_token():
    kwargs = {"token": "hf_secret", "revision": "main"}
    assert repr(FrozenLLM("x", model_kwargs=kwargs)) == (
        "FrozenLLM('x', model_kwargs={'token': '...', 'revision': 'main'})"
    )
    assert kwargs["token"] == "hf_secret"


def test_an_unavailable_device_is_refused():
    with pytest.raises(ValueError, match="device='gpu' is not available here"):
        _ = FrozenLLM(tiny_model(), device="gpu").torch_device


def test_dtypes(monkeypatch):
    folder = tiny_model()
    (states,), _ = read(FrozenLLM(folder, device="cpu", dtype="bfloat16"), ["text"], 1)
    assert states.dtype == torch.bfloat16
    assert FrozenLLM(folder, dtype=torch.float16).torch_dtype == torch.float16
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(
            "sklearn_relish.llm.frozen.computes_bfloat16", lambda _, native=native: native
        )
        assert FrozenLLM(folder, device="cpu").torch_dtype == dtype
    with pytest.raises(ValueError, match="dtype must be 'auto'"):
        _ = FrozenLLM(folder, dtype="int8").torch_dtype


def test_model_may_be_a_path_object():
    assert FrozenLLM(tiny_model()).model == os.fspath(tiny_model())


def test_loading_a_model_does_not_block_other_models(monkeypatch):
    loading, proceed = threading.Event(), threading.Event()
    from_pretrained = FrozenLLM._from_pretrained

    def slow(self, auto_class, **kwargs):
        if threading.current_thread().name == "slow":
            loading.set()
            assert proceed.wait(60)
        return from_pretrained(self, auto_class, **kwargs)

    monkeypatch.setattr(FrozenLLM, "_from_pretrained", slow)
    first, second = (FrozenLLM(tiny_model(), device="cpu", dtype="float32") for _ in range(2))
    thread = threading.Thread(target=lambda: first.network, name="slow")
    thread.start()
    assert loading.wait(60)
    read(second, ["text"], 2)
    proceed.set()
    thread.join(60)
    assert first._depth == first.n_layers

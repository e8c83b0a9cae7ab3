import os
from functools import cache

# Waiting OpenMP threads spin for microseconds, then sleep. The default, milliseconds, delays other
# processes of a busy machine. torch's import reads this, here and in processes that tests start.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ["SCIPY_ARRAY_API"] = "1"  # read by SciPy's import; a scikit-learn check needs it

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples in each run, without a time limit.
settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")

# Tiny models are not faster with threads, and much slower where test processes share the cores.
torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def fresh_process_state(monkeypatch):
    """Start each test without a shared model and without a shared store."""
    monkeypatch.setattr("sklearn_relish.llm.frozen._shared", {})
    monkeypatch.setattr("sklearn_relish.states.contents._cached", {})


@pytest.fixture
def set_threads():
    """Sets torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(set_threads):
    """One thread of torch: heads are trained one after another."""
    set_threads(1)


@pytest.fixture
def four_threads(set_threads):
    """Four threads of torch, as on a machine with four cores."""
    set_threads(4)


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory):
    """An empty folder where this run, with all its xdist workers, keeps converted models.

    The metadata of a GGUF file is parsed once: Transformers parses it three times to load a model,
    which takes most of the time of a conversion.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= "models"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gguf.GGUFReader", cache(pytest.importorskip("gguf").GGUFReader))
        yield folder

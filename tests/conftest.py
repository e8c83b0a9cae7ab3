import os

# Threads that wait spin for microseconds, then sleep: on a busy machine the default of milliseconds
# takes the cores from others. Read by torch's import, here and in the processes that tests start.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ["SCIPY_ARRAY_API"] = "1"  # read by SciPy's import; a scikit-learn check needs it

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples each time, however slow the machine is.
settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")

# Tiny models gain nothing from threads, and lose much where test processes share the cores.
torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def fresh_process_state(monkeypatch):
    """Each test finds no shared model and no shared store."""
    monkeypatch.setattr("sklearn_relish.llm.frozen._shared", {})
    monkeypatch.setattr("sklearn_relish.states.contents._cached", {})


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory):
    """A cache folder of this run alone, empty at first, for what is converted."""
    return tmp_path_factory.mktemp("cache")

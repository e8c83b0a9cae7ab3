import numpy as np
import pytest
from tiny import tiny_model

from sklearn_relish import FrozenLLM, RelishRegressor

# Its import changes the package. `--doctest-modules` would import it into the tests' process.
collect_ignore = ["killed_worker.py"]

WORDS = ["awful", "poor", "fair", "good", "superb"]


@pytest.fixture(scope="session")
def llm():
    return FrozenLLM(tiny_model(), device="cpu", dtype="float32")


@pytest.fixture
def regressor(llm):
    """A small regressor that learns from the states of a tiny model."""
    return RelishRegressor(
        llm,
        latent_size=16,
        n_heads=2,
        learning_rate=5e-3,
        max_epochs=8,
        n_estimators=2,
        random_state=0,
    )


@pytest.fixture(scope="session")
def reviews():
    """120 distinct texts, and how positive each is."""
    random = np.random.default_rng(0)
    grades = random.integers(0, 5, 120)
    texts = [f"{WORDS[grade]} {i}" for i, grade in enumerate(grades)]
    return texts, 10.0 + 2 * grades

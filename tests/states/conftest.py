import pytest
from store_helpers import CountingLLM
from tiny import tiny_model


@pytest.fixture
def llm():
    """A model that counts the tokens that it reads."""
    return CountingLLM(tiny_model(), device="cpu", dtype="float32")

"""Texts to token states: the frozen language model and what it needs to read."""

from sklearn_relish.llm.frozen import FrozenLLM

__all__ = ["FrozenLLM"]

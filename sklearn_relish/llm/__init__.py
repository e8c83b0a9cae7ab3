"""Texts to token states: the frozen language model and what it needs to read."""

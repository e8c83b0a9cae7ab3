"""What the tests of the store have in common."""

import numpy as np
import torch
from tiny import tiny_model

import sklearn_relish.states.contents
import sklearn_relish.states.index
import sklearn_relish.states.reading
import sklearn_relish.states.retention
from sklearn_relish import FrozenLLM

TEXTS = [f"text number {i}" + " more" * (i % 7) for i in range(20)]


class CountingLLM(FrozenLLM):
    """Counts the tokens of the texts that it reads."""

    tokens_read = 0

    def _read_batch(self, tokens, layers):
        started = super()._read_batch(tokens, layers)
        self.tokens_read += sum(map(len, tokens))
        return started


def n_tokens(texts):
    return sum(len(text) for text in texts)  # the tiny model reads bytes


def fetch(store, texts, llm, layer=2, max_length=512):
    return store.fetch(texts, llm, layer=layer, max_length=max_length, progress=False)


def streamed(store, texts, llm):
    """States that `stream` yields, in the order of the texts. Each row must be yielded once."""
    states = {}
    for rows, piece in store.stream(texts, llm, layer=2, max_length=512):
        assert rows.dtype == np.int64
        assert not states.keys() & set(rows.tolist())
        states |= zip(rows.tolist(), piece, strict=True)
    return [states[row] for row in range(len(texts))]


def forget_indexes():
    """Forget all that this process knows, as if another process opened the folder."""
    sklearn_relish.states.contents._cached.clear()


def reference(texts):
    """States of texts, read at once without a store."""
    llm = FrozenLLM(tiny_model(), device="cpu", dtype="float32")
    states = {}
    for rows, (batch,), _ in llm.read(list(texts), layers=[2], max_length=512):
        states |= dict(zip(rows.tolist(), batch, strict=True))
    return [states[row] for row in range(len(texts))]


def same(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


def rewrite(path, change):
    """Change a file's bytes; a new file takes its place, for the old one may be mapped."""
    data = bytearray(path.read_bytes())
    changed = change(data)
    path.unlink()
    path.write_bytes(data if changed is None else changed)


def flip(place):
    def change(data):
        data[place(data)] ^= 1

    return change


def header(data):
    return int.from_bytes(data[:8], "little")


DAMAGES = {
    "cut short": lambda data: data[:-100],
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "foreign": lambda data: b"not a shard" * 100,
    "header's length": flip(lambda data: 1),
    "header": flip(lambda data: 8 + header(data) // 2),
    "metadata": flip(lambda data: bytes(data).index(b"_checksum") + 15),
    "label": flip(lambda data: bytes(data).index(b"max_length") + 14),
    "lengths": flip(lambda data: 8 + header(data) + 100),
    "states": flip(lambda data: (8 + header(data) + len(data)) // 2),
    "keys": flip(lambda data: len(data) - 1),
}


def kept_in_memory(store):
    contents = store._contents
    indexes = contents.indexes.values()
    held = sum(s.n_bytes for index in indexes for s in index.shards if s.path is None)
    assert held == contents.memory_bytes
    return held + contents.recent.n_bytes

"""Helpers of the tests in this folder."""


def read(llm, texts, layer, max_length=512, windows=False):
    """States of each text, in order, and the lengths before the cut."""
    states, full_lengths = [None] * len(texts), [None] * len(texts)
    reading = llm.read(texts, layers=[layer], max_length=max_length, windows=windows)
    for rows, (batch,), lengths in reading:
        for row, text, length in zip(rows, batch, lengths, strict=True):
            assert states[row] is None  # each text once
            states[row], full_lengths[row] = text.clone(), length
    return states, full_lengths


def record_batches(llm, monkeypatch):
    """A list that grows by the lengths of the texts in each batch."""
    read_batch, batches = llm._read_batch, []

    def recording(tokens, layers):
        batches.append([len(ids) for ids in tokens])
        return read_batch(tokens, layers)

    monkeypatch.setattr(llm, "_read_batch", recording)
    return batches

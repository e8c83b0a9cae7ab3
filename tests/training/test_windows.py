"""Training sets larger than memory: windows of texts, read from files."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tasks import CPU, task, train

from sklearn_relish.head.losses import HuberLoss
from sklearn_relish.states.index import gather
from sklearn_relish.states.quantization import QUANTIZERS
from sklearn_relish.states.shard import KEY_BYTES, MemoryStates, Shard
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.training import windows
from sklearn_relish.training.batching import BatchLoader
from sklearn_relish.training.inference import pool_states, predict_batches
from sklearn_relish.training.stacking import fit_ensemble
from sklearn_relish.training.trainer import Examples, new_head
from sklearn_relish.training.windows import Windows, window_size

LABEL = {"model": "m", "layer": "1", "dtype": "float32", "max_length": "9"}
N_FILES, IN_FILE, SIZE = 12, 40, 12


def make_entries(folder, bits=None):
    """The texts of files; each file's texts are of one length, as after sorting by length."""
    generator = torch.Generator().manual_seed(0)
    entries = []
    for number in range(N_FILES):
        lengths = torch.full((IN_FILE,), number % 8 + 1)
        states = torch.randn(int(lengths.sum()), SIZE, generator=generator)
        keys = torch.zeros(IN_FILE, KEY_BYTES, dtype=torch.uint8)
        kept = states if bits is None else QUANTIZERS[bits].quantize_texts(states, lengths)
        vectors = torch.empty(IN_FILE, 0, SIZE)
        matches = torch.randint(0, int(lengths[0]), (int(lengths.sum()), 1), generator=generator)
        matches = matches.int()
        shard = Shard(kept, vectors, matches, lengths, lengths.clone(), keys, LABEL)
        saved = shard.save(folder / f"{number}.safetensors", map_small=True)
        entries += [entry for _, entry in saved.entries()]
    order = torch.randperm(len(entries), generator=generator).tolist()
    return [entries[i] for i in order]


@pytest.fixture
def entries(tmp_path):
    return make_entries(tmp_path)


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(windows, "MIN_MEMORY", 0)
    monkeypatch.setattr(windows, "UNIT_BYTES", 1_000)


def same(states, rows, others):
    found = states[rows], others[rows]
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_states_within_the_memory_are_one_window_that_is_not_copied(entries):
    states = gather(entries)
    assert window_size(states.n_bytes, states.n_bytes) == math.inf
    (rows,) = Windows(states, math.inf).shuffled(torch.Generator())
    assert rows.tolist() == list(range(len(states)))
    assert Windows(states, math.inf).load(rows) is states


def test_larger_states_are_in_windows_of_half_the_memory():
    assert window_size(101 * 2**20, 100 * 2**20) == 50 * 2**20
    assert window_size(101 * 2**20, 0) == windows.MIN_MEMORY / 2


@pytest.mark.parametrize("shuffled", [False, True])
def test_windows_have_each_text_once_within_their_bytes(entries, small_windows, shuffled):
    states = gather(entries)
    generator = torch.Generator().manual_seed(0)
    chosen = Windows(states, 20_000)
    found = chosen.shuffled(generator) if shuffled else chosen.in_order()
    assert torch.equal(torch.cat(found).sort().values, torch.arange(len(states)))
    assert len(found) > 4
    assert all(states[rows].n_bytes <= 20_000 for rows in found)
    n_files = [len(states.array_index[rows].unique()) for rows in found]
    if shuffled:  # of many files, whose texts differ in length
        assert min(n_files) >= 6
        assert min(len(states.lengths[rows].unique()) for rows in found) >= 4
        again = chosen.shuffled(generator)
        assert [rows.tolist() for rows in again] != [rows.tolist() for rows in found]
    else:
        assert max(n_files) <= 4


def test_a_window_has_the_states_of_its_texts(entries, tmp_path):
    entries = entries[::3] + entries[:20]  # with gaps, and some twice
    in_memory = MemoryStates(
        torch.randn(9, SIZE), torch.empty(1, 0, SIZE), torch.zeros(9, 1, dtype=torch.int32)
    )
    place = {"holder": in_memory, "number": 0, "first_token": 0, "start": 0}
    entries += [entry._replace(**place) for entry in entries[:2]]
    expected = gather(entries)
    (tmp_path / "3.safetensors").unlink()  # merged or evicted meanwhile
    chosen = Windows(gather(entries), 2**20)
    for rows in (torch.arange(len(entries)), torch.tensor([5, 5, 1]), torch.tensor([0])):
        chosen.read_ahead(rows)
        assert same(chosen.load(rows), rows, expected)
    chosen.release()


def test_a_window_has_the_states_in_the_other_order(entries, small_windows):
    states, others = gather(entries), gather(entries[::-1])
    lengths, generator = states.lengths, torch.Generator().manual_seed(0)
    numbers = torch.randint(9, (int(lengths.sum()), 1), generator=generator).int()
    counterparts = TokenStates.from_lengths(numbers, lengths)
    chosen = Windows(replace(states, others=others, counterparts=counterparts), 20_000)
    found = chosen.in_order()
    assert len(found) > 8
    for rows in found:
        chosen.read_ahead(rows)
        loaded = chosen.load(rows)
        assert states[rows].n_bytes <= 10_000  # the other half is that of the other order
        assert same(loaded, rows, states)
        assert same(loaded.others, rows, others)
        assert same(loaded.counterparts, rows, counterparts)
    chosen.release()


@pytest.mark.parametrize("bits", QUANTIZERS)
def test_windows_hold_quantized_states_as_they_are_in_the_files(tmp_path, small_windows, bits):
    states = gather(make_entries(tmp_path, bits))
    chosen = Windows(states, 3_000)
    found = chosen.in_order()
    assert len(found) > 4
    assert all(states[rows].n_bytes <= 3_000 for rows in found)
    for rows in found:
        loaded = chosen.load(rows)
        assert loaded.arrays[0].dtype == QUANTIZERS[bits].dtype
        assert same(loaded, rows, states)
    chosen.release()


def test_an_epoch_reads_each_state_once_and_touches_no_map(entries, small_windows, monkeypatch):
    read = []
    read_part = windows._read

    def logged(file, states):
        read.append(states.nbytes)
        return read_part(file, states)

    monkeypatch.setattr(windows, "_read", logged)
    states = gather(entries)
    for array in states.arrays:
        array.fill_(math.nan)  # private maps: the files stay as they are
    loader = BatchLoader(states, CPU, torch.float32, 20_000)
    for batches in (
        loader.training_batches(7, torch.Generator().manual_seed(0)),
        loader.prediction_batches(),
    ):
        read.clear()
        assert all(loader.load(batch)[0].isfinite().all() for batch in batches)
        assert sum(read) == states.n_bytes


def test_training_batches_are_full_and_mix_files(entries, small_windows):
    states = gather(entries)
    loader = BatchLoader(states, CPU, torch.float32, 20_000)
    batches, n_padded = [], 0
    for batch in loader.training_batches(7, torch.Generator().manual_seed(0)):
        padded, mask, matches = loader.load(batch)
        assert same(states, batch, states)
        for text, state, real in zip(states[batch], padded, mask, strict=True):
            assert torch.equal(state[real], text)
        for of_text, found, real in zip(states[batch].matches, matches, mask, strict=True):
            assert torch.equal(found[real], of_text[:, 0].long())
        batches.append(batch)
        n_padded += mask.numel()
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(len(states)))
    n_full, rest = divmod(len(states), 7)
    assert sorted(map(len, batches)) == [rest, *[7] * n_full]
    assert n_padded < 1.5 * int(states.lengths.sum())


def test_a_batch_larger_than_a_window_is_filled_from_several(entries, small_windows):
    loader = BatchLoader(gather(entries), CPU, torch.float32, 10_000)
    batches = []
    for batch in loader.training_batches(200, torch.Generator().manual_seed(0)):
        loader.load(batch)
        batches.append(batch)
    assert [len(batch) for batch in batches] == [200, 200, 80]


def test_predictions_and_pooled_states_do_not_depend_on_windows(entries, small_windows):
    states = gather(entries)
    head = new_head(0, input_size=SIZE, latent_size=16, n_heads=2).double()
    with torch.inference_mode():
        whole, parts = (
            predict_batches(head.forward_zero_padded, BatchLoader(states, CPU, torch.float64, size))
            for size in (math.inf, 20_000)
        )
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)
    for pooling in ("mean", "last"):
        assert torch.equal(
            pool_states(states, pooling, "rms", 20_000), pool_states(states, pooling, "rms")
        )


def test_a_file_that_was_cut_gives_an_error(entries, tmp_path):
    path = tmp_path / "3.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    chosen = Windows(gather(entries), 2**20)
    with pytest.raises(OSError, match=r"3\.safetensors of token states has become shorter"):
        chosen.load(torch.arange(len(entries)))


def test_an_ensemble_learns_from_windows_and_is_the_same_again(small_windows, tmp_path):
    examples = task(600)
    shard = Shard(
        states=examples.states.arrays[0],
        vectors=torch.empty(600, 0, examples.states.hidden_size),
        matches=torch.empty(0, 1, dtype=torch.int32),
        lengths=examples.states.lengths,
        full_lengths=examples.states.lengths.clone(),
        keys=torch.zeros(600, KEY_BYTES, dtype=torch.uint8),
        label=LABEL,
    ).save(tmp_path / "shard.safetensors", map_small=True)
    on_disk = gather([entry for _, entry in shard.entries()])
    on_disk = Examples(on_disk, examples.y, examples.weight)
    held_out = np.arange(0, 600, 5)

    def r2(examples, max_memory):
        fitted = fit_ensemble(
            examples,
            np.arange(600),
            [held_out],
            make_head=lambda number, seed: new_head(
                seed, input_size=12, latent_size=32, n_heads=4, n_iterations=2, state_norm=None
            ),
            linear_path=True,
            loss_fn=HuberLoss(),
            random=np.random.RandomState(0),
            device=CPU,
            max_memory=max_memory,
            learning_rate=3e-3,
            weight_decay=0.01,
            batch_size=16,
            max_epochs=8,
            n_iter_no_change=8,
            progress=False,
        )
        return [epoch["validation_r2"] for epoch in fitted.trainings[0].history]

    whole = r2(examples, math.inf)
    assert r2(on_disk, on_disk.states.n_bytes) == whole  # they fit: as in memory
    parts = r2(on_disk, 40_000)
    assert parts == r2(on_disk, 40_000)
    assert parts != whole
    assert max(parts) > 0.5
    assert abs(max(parts) - max(whole)) < 0.15


def test_a_training_without_validation_uses_windows(small_windows, monkeypatch):
    examples = task(300)
    sizes = []
    load = Windows.load
    monkeypatch.setattr(
        Windows, "load", lambda self, rows: sizes.append(len(rows)) or load(self, rows)
    )
    _, training = train(examples, max_epochs=1, max_memory=20_000)
    assert len(sizes) > 3
    assert np.isfinite(training.history[0]["train_loss"])

"""Damaged, crafted and foreign files of a store's folder."""

import errno
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from store_helpers import (
    DAMAGES,
    TEXTS,
    fetch,
    forget_indexes,
    n_tokens,
    reference,
    rewrite,
    same,
    streamed,
)

from sklearn_relish import StateStore, TokenStates
from sklearn_relish.states.quantization import QUANTIZERS
from sklearn_relish.states.shard import Shard


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_reported_and_its_texts_are_read_again(llm, tmp_path, damage):
    first = fetch(StateStore(tmp_path), TEXTS, llm)
    (shard,) = tmp_path.rglob("*.safetensors")
    rewrite(shard, DAMAGES[damage])
    forget_indexes()
    with pytest.warns(
        UserWarning, match="1 files .* could not be used: .* read again by the model"
    ) as caught:
        again = fetch(StateStore(tmp_path), TEXTS, llm)
    assert len(caught) == 1
    assert same(again, first)
    assert llm.tokens_read == 2 * n_tokens(TEXTS)
    assert not shard.exists()
    forget_indexes()
    assert same(fetch(StateStore(tmp_path), TEXTS, llm), first)  # and no warning
    assert llm.tokens_read == 2 * n_tokens(TEXTS)


def test_damaged_leases_and_unfinished_files_are_ignored(llm, tmp_path):
    first = fetch(StateStore(tmp_path), TEXTS[:10], llm)
    (shard,) = tmp_path.rglob("*.safetensors")
    (shard.parent / "leases" / "0.lease").write_bytes(b"odd")
    partial = shard.parent / f".{'0' * 32}.partial"
    partial.mkdir()
    (partial / f"{'0' * 32}.safetensors").write_bytes(shard.read_bytes()[:99])
    forget_indexes()
    again = fetch(StateStore(tmp_path), TEXTS, llm)
    assert same(again[torch.arange(10)], first)
    assert llm.tokens_read == n_tokens(TEXTS)
    assert not list(tmp_path.rglob("*.lease"))


def test_other_files_in_the_folder_are_left_alone(llm, tmp_path):
    theirs = tmp_path / "models" / "mine" / "model.safetensors"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"precious")
    (tmp_path / ("0" * 32) / "layer2-of-mine").mkdir(parents=True)
    store = StateStore(tmp_path)
    fetch(store, TEXTS, llm)
    assert len(store.info()) == 1
    store.clear()
    assert theirs.read_bytes() == b"precious"
    assert list(tmp_path.rglob("*.safetensors")) == [theirs]


def test_nothing_in_the_folder_is_unpickled(llm, tmp_path, monkeypatch):
    fetch(StateStore(tmp_path), TEXTS, llm)
    (shard,) = tmp_path.rglob("*.safetensors")
    for suffix in (".pkl", ".pt", ".joblib", ".safetensors"):
        shard.with_name("f" * 32 + suffix).write_bytes(pickle.dumps(Bomb()))
    forget_indexes()
    with pytest.warns(UserWarning, match="1 files .* could not be used"):
        fetch(StateStore(tmp_path), TEXTS, llm)
    StateStore(tmp_path).info()
    assert llm.tokens_read == n_tokens(TEXTS)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was read",)


def test_an_unwritable_folder_gives_a_warning_and_memory_is_used(llm, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    store = StateStore(blocked)
    with pytest.warns(UserWarning, match="could not be written to .* they stay in memory"):
        first = fetch(store, TEXTS, llm)
    assert same(fetch(store, TEXTS, llm), first)
    assert llm.tokens_read == n_tokens(TEXTS)


def test_damaged_states_are_not_merged(llm, tmp_path):
    texts = [f"question {i}" for i in range(31)]
    for text in texts:
        fetch(StateStore(tmp_path), [text], llm)
    damaged = sorted(tmp_path.rglob("*.safetensors"))[7]
    rewrite(damaged, DAMAGES["states"])
    forget_indexes()
    fetch(StateStore(tmp_path), ["one more"], llm)  # enough to merge
    assert damaged.exists()
    before = llm.tokens_read
    with pytest.warns(UserWarning, match="1 files .* could not be used"):
        fetch(StateStore(tmp_path), texts, llm)
    assert llm.tokens_read - before in {len(text) for text in texts}


def test_texts_stored_twice_are_counted_once_and_all_cleared(llm, tmp_path):
    fetch(StateStore(tmp_path), TEXTS, llm)
    (file,) = tmp_path.rglob("*.safetensors")
    for name in ("0", "f"):  # as a process leaves it that is killed while it merges
        file.with_name(f"{name * 32}.safetensors").write_bytes(file.read_bytes())
    forget_indexes()
    store = StateStore(tmp_path)
    assert store.info()[0]["n_texts"] == len(TEXTS)
    assert same(fetch(store, TEXTS, llm), reference(TEXTS))
    store.clear()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_text_stored_twice_is_found_after_one_file_is_removed(llm, tmp_path):
    store = StateStore(tmp_path)
    fetch(store, TEXTS, llm)
    (file,) = tmp_path.rglob("*.safetensors")
    other = file.with_name(f"{'f' * 32}.safetensors")  # looked at after the first one
    other.write_bytes(file.read_bytes())
    assert store.info()[0]["n_texts"] == len(TEXTS)
    other.unlink()
    for i in range(40):  # enough to merge
        fetch(store, [f"question {i}"], llm)
    before = llm.tokens_read
    assert same(fetch(store, TEXTS, llm), reference(TEXTS))
    forget_indexes()
    assert same(fetch(store, TEXTS, llm), reference(TEXTS))
    assert llm.tokens_read == before


def test_a_file_that_appears_during_a_call_is_checked(llm, tmp_path, monkeypatch):
    store = StateStore(tmp_path)
    fetch(store, TEXTS[:10], llm)
    (file,) = tmp_path.rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    DAMAGES["states"](data)
    read = llm.read

    def meanwhile(*args, **kwargs):
        if data:
            file.with_name(f"{'f' * 32}.safetensors").write_bytes(data)
            data.clear()
        yield from read(*args, **kwargs)

    monkeypatch.setattr(llm, "read", meanwhile)
    with pytest.warns(UserWarning, match="1 files .* could not be used"):
        states = fetch(store, TEXTS, llm)
    assert same(states, reference(TEXTS))


def test_a_file_that_is_removed_while_it_is_opened_gives_no_warning(llm, tmp_path, monkeypatch):
    fetch(StateStore(tmp_path), TEXTS, llm)
    forget_indexes()

    def gone(path, framework):
        Path(path).unlink()
        return safe_open(path, framework)

    monkeypatch.setattr("sklearn_relish.states.shard.safe_open", gone)
    store = StateStore(tmp_path)
    assert store.info() == []
    monkeypatch.undo()
    assert same(fetch(store, TEXTS, llm), reference(TEXTS))


def test_old_unfinished_files_are_removed(llm, tmp_path):
    fetch(StateStore(tmp_path), TEXTS, llm)
    (file,) = tmp_path.rglob("*.safetensors")
    old, new = (file.with_name(f".{letter * 32}.partial") for letter in "ab")
    for partial in (old, new):
        partial.mkdir()
        (partial / ".tmp").write_bytes(b"unfinished")
    os.utime(old, (1e9, 1e9))
    for i in range(40):
        fetch(StateStore(tmp_path), [f"question {i}"], llm)
    assert not old.exists()
    assert new.exists()


def crafted(shard, change):
    """Change a shard and save it with correct checksums."""
    made = Shard.open(shard)
    change(made)
    shard.unlink()
    made.save(shard)


def set_lengths(made):
    made.lengths = made.lengths.clone()
    made.lengths[:3] = torch.tensor([2**62, 2**62, 2**62])


CRAFTED = {
    "width": lambda made: setattr(made, "states", made.states[:, :-1].contiguous()),
    "dtype": lambda made: setattr(made, "states", made.states.half()),
    "lengths": set_lengths,
    "not finite": lambda made: setattr(made, "states", made.states / 0),
    "zeros": lambda made: setattr(made, "states", made.states * 0),
    "layer": lambda made: made.label.update(layer="no number"),
    "max_length": lambda made: made.label.update(max_length="9"),
}


@pytest.mark.parametrize("what", CRAFTED)
@pytest.mark.parametrize("how", [fetch, streamed])
def test_a_crafted_file_counts_as_damaged(llm, tmp_path, monkeypatch, what, how):
    fetch(StateStore(tmp_path), TEXTS, llm)
    (shard,) = tmp_path.rglob("*.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr("sklearn_relish.states.shard._fits", lambda *args, **kwargs: True)
        crafted(shard, CRAFTED[what])
    forget_indexes()
    with pytest.warns(UserWarning, match="1 files .* could not be used") as caught:
        states = how(StateStore(tmp_path), TEXTS, llm)
    assert len(caught) == 1
    assert same(states, reference(TEXTS))
    assert not shard.exists()


@pytest.mark.parametrize("form", QUANTIZERS.values(), ids=lambda form: f"{form.bits} bits")
@pytest.mark.parametrize("token", [0, -1])
def test_quantized_states_that_are_not_finite_count_as_damaged(
    llm, tmp_path, monkeypatch, form, token
):
    monkeypatch.setattr("sklearn_relish.states.shard.CHECK_BYTES", 500)  # many parts
    store = StateStore(tmp_path, bits=form.bits)
    first = fetch(store, TEXTS, llm)
    forget_indexes()
    assert same(fetch(store, TEXTS, llm), first)  # and no warning

    def make_infinite(made):
        texts = [text.clone() for text in TokenStates.from_lengths(made.states, made.lengths)]
        max(texts[-9:], key=len)[token, 0] = torch.inf
        made.states = form.quantize_texts(torch.cat(texts), made.lengths)

    (shard,) = tmp_path.rglob("*.safetensors")
    crafted(shard, make_infinite)
    forget_indexes()
    with pytest.warns(UserWarning, match="1 files .* could not be used"):
        assert same(fetch(store, TEXTS, llm), first)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize("what", ["pipe", "link", "sparse", "folder"])
def test_pipes_links_sparse_files_and_folders_are_refused(llm, tmp_path, what):
    store = StateStore(tmp_path / "states")
    fetch(store, TEXTS[:5], llm)
    (shard,) = tmp_path.rglob("*.safetensors")
    precious = tmp_path / "precious"
    precious.write_bytes(shard.read_bytes())
    odd = shard.with_name("f" * 32 + ".safetensors")
    if what == "pipe":
        os.mkfifo(odd)
    elif what == "link":
        odd.symlink_to(precious)
    elif what == "folder":
        odd.mkdir()
    else:
        with odd.open("wb") as file:
            file.truncate(2**40)
    with pytest.warns(UserWarning, match="1 files .* could not be used"):
        assert same(fetch(store, TEXTS, llm), reference(TEXTS))
    assert llm.tokens_read == n_tokens(TEXTS)
    store.clear()
    assert precious.exists()


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
@pytest.mark.parametrize("depth", ["model", "layer", "leases"])
def test_a_linked_folder_inside_the_store_is_left_alone(llm, tmp_path, depth):
    fetch(StateStore(tmp_path / "states"), TEXTS, llm)
    (shard,) = tmp_path.rglob("*.safetensors")
    place = {"model": shard.parent.parent, "layer": shard.parent}.get(depth)
    place = shard.parent / "leases" if place is None else place
    outside = tmp_path / "outside"
    place.rename(outside)
    (outside / "0.lease").write_bytes(b"theirs")
    place.symlink_to(outside)
    files = sorted(outside.rglob("*"))
    forget_indexes()
    store = StateStore(tmp_path / "states")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert same(fetch(store, [*TEXTS, "new"], llm), reference([*TEXTS, "new"]))
        streamed(store, ["other"], llm)
        store.clear()
    assert sorted(outside.rglob("*")) == files
    said = [str(warning.message) for warning in caught]
    assert any("symbolic link" in message for message in said) == (depth != "leases")


@pytest.mark.parametrize("how", ["info", "clear", "fetch"])
def test_an_unreadable_folder_gives_a_clear_message(llm, tmp_path, monkeypatch, how):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    store = StateStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("sklearn_relish.states.store.os.scandir", denied)
        if how == "fetch":
            with pytest.warns(UserWarning, match="can't be read .*Pass the path") as caught:
                states = fetch(store, TEXTS, llm)
            assert len(caught) == 1
            assert same(states, reference(TEXTS))
        else:
            with pytest.raises(PermissionError, match=r"can't be read .*Pass the path"):
                getattr(store, how)()

"""The contract of a storage backend: every backend passes these tests.

To test another backend, add a `Place` to `PLACES`.
"""

import pytest
import torch

from sklearn_relish.states.backend import Backend, FolderBackend, MemoryBackend
from sklearn_relish.states.contents import Call, Contents
from sklearn_relish.states.index import gather, text_key
from sklearn_relish.states.retention import Retention
from sklearn_relish.states.shard import DamagedShardError, Shard
from sklearn_relish.states.vectors import N_VECTORS

SIZE = 8
COLLECTION = f"{'0' * 32}/layer2-float32-512"
OTHER = f"{'0' * 32}/layer3-float32-512-windows"
NAME = "a" * 32


class MemoryPlace:
    """A backend in memory, which another user of the same place shares as an object."""

    def __init__(self, folder):
        self.backend = MemoryBackend()

    def open(self) -> Backend:
        return self.backend

    def damage(self, name):
        self.backend.load(COLLECTION, name).states_checksum = "00000000"


class FolderPlace:
    """A folder, which another user of the same place opens anew."""

    def __init__(self, folder):
        self.folder = folder

    def open(self) -> Backend:
        return FolderBackend(self.folder)

    def damage(self, name):
        path = self.folder / COLLECTION / f"{name}.safetensors"
        data = bytearray(path.read_bytes())
        header = int.from_bytes(data[:8], "little")
        data[(8 + header + len(data)) // 2] ^= 1  # within the states
        path.unlink()
        path.write_bytes(data)


PLACES = {"memory": MemoryPlace, "folder": FolderPlace}


@pytest.fixture(params=PLACES)
def place(request, tmp_path):
    return PLACES[request.param](tmp_path / "states")


@pytest.fixture
def backend(place):
    return place.open()


def make_shard(texts, seed=0, collection=COLLECTION):
    """Random states of texts, as many tokens of each as it has characters."""
    lengths = torch.tensor([len(text) for text in texts])
    states = torch.randn(int(lengths.sum()), SIZE, generator=torch.Generator().manual_seed(seed))
    keys = b"".join(text_key(collection, text) for text in texts)
    return Shard(
        states=states,
        vectors=torch.randn(len(texts), N_VECTORS, SIZE),
        matches=torch.empty(0, 1, dtype=torch.int32),
        lengths=lengths,
        full_lengths=lengths + 1,
        keys=torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(len(texts), -1),
        label={"model": "m", "layer": collection[38], "dtype": "float32", "max_length": "512"},
    )


def open_index(contents, collection=COLLECTION):
    index = contents.index(collection)
    assert index.refresh() == []
    return index


def states_of(index, texts):
    return list(gather([index.entries[text_key(index.collection, text)] for text in texts]))


def same(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_a_saved_shard_is_listed_and_loaded_bit_equal(place, backend):
    shard = make_shard(["one", "seven"])
    saved = backend.save(COLLECTION, NAME, shard)
    for user in (backend, place.open()):
        assert user.collections() == [COLLECTION]
        assert user.names(COLLECTION) == {NAME}
        for stored in (saved, user.load(COLLECTION, NAME)):
            assert stored.is_intact()
            assert stored.label == shard.label
            for name in ("states", "lengths", "full_lengths", "keys"):
                assert torch.equal(getattr(stored, name), getattr(shard, name))


def test_an_empty_place_has_no_collections_and_no_names(backend):
    assert backend.collections() == []
    assert backend.names(COLLECTION) == set()
    with pytest.raises(FileNotFoundError):
        backend.load(COLLECTION, NAME)


def test_collections_are_separate(backend):
    backend.save(COLLECTION, NAME, make_shard(["one"]))
    backend.save(OTHER, "b" * 32, make_shard(["two"], collection=OTHER))
    assert sorted(backend.collections()) == [COLLECTION, OTHER]
    backend.remove(COLLECTION, "b" * 32)
    backend.remove(OTHER, NAME)
    assert (backend.names(COLLECTION), backend.names(OTHER)) == ({NAME}, {"b" * 32})


def test_a_removed_shard_is_gone_and_may_be_removed_again(place, backend):
    backend.save(COLLECTION, NAME, make_shard(["one"]))
    for _ in range(2):
        backend.remove(COLLECTION, NAME)
        assert place.open().names(COLLECTION) == set()
        with pytest.raises(FileNotFoundError):
            backend.load(COLLECTION, NAME)


def test_a_location_names_the_collection_and_the_shard(backend):
    assert COLLECTION in backend.location(COLLECTION).replace("\\", "/")
    assert NAME in backend.location(COLLECTION, NAME)
    assert NAME not in backend.location(COLLECTION)


def test_an_index_gives_states_in_the_order_asked_for(place, backend):
    first, second = make_shard(["one", "three"], 1), make_shard(["seven", "ten"], 2)
    index = open_index(Contents(backend))
    for shard in (first, second):
        index.save(shard)
    expected = [*second.states.split([5, 3]), *first.states.split([3, 5])]
    texts = ["seven", "ten", "one", "three"]
    for _ in range(2):
        assert same(states_of(index, texts), expected)
        assert same(states_of(index, texts[::-1]), expected[::-1])
        index = open_index(Contents(place.open()))  # as another user finds them
    assert index.verify(list(index.entries)) == []


def test_an_index_follows_what_others_save_and_remove(place, backend):
    early, late = Contents(backend).index(COLLECTION), Contents(place.open()).index(COLLECTION)
    shard = late.save(make_shard(["one"]))
    assert early.refresh() == []
    assert early.entries.keys() == {text_key(COLLECTION, "one")}
    late.remove(shard)
    assert early.refresh() == []
    assert not early.entries
    assert not early.shards
    assert early.n_bytes == early.memory_bytes == 0


def test_a_text_stored_twice_is_found_once_and_again_when_one_shard_goes(place, backend):
    index = open_index(Contents(backend))
    older, newer = make_shard(["one", "two"], 1), make_shard(["two", "four"], 2)
    index.save(older)
    saved = index.save(newer)
    assert len(index.entries) == 3
    assert same(states_of(index, ["two"]), [newer.states[:3]])
    index.remove(saved)
    assert same(states_of(index, ["one", "two"]), older.states.split([3, 3]))


def test_a_shard_without_a_text_of_its_own_is_merged_away(place, backend):
    index = open_index(Contents(backend))
    for seed in range(40):
        index.save(make_shard(["one"], seed))
        index.merge_small()
    assert len(backend.names(COLLECTION)) < 33
    assert same(states_of(index, ["one"]), [make_shard(["one"], 39).states])


def test_many_small_shards_are_merged_bit_equal(place, backend):
    texts = [f"text {i}" for i in range(40)]
    shards = [make_shard([text], seed) for seed, text in enumerate(texts)]
    index = open_index(Contents(backend))
    for shard in shards:
        index.save(shard)
    assert index.merge_small() == []
    assert len(backend.names(COLLECTION)) == len(index.shards) == 1
    for user in (index, open_index(Contents(place.open()))):
        assert same(states_of(user, texts), [shard.states for shard in shards])


def test_damage_is_reported_once_and_removed(place):
    texts = ["one", "three"]
    for name, seed in ((NAME, 1), ("b" * 32, 2)):
        place.open().save(COLLECTION, name, make_shard([f"{text}{seed}" for text in texts], seed))
    place.damage(NAME)
    contents = Contents(place.open())
    index = open_index(contents)
    keys = [text_key(COLLECTION, f"{text}{seed}") for text in texts for seed in (1, 2)]
    problems = index.verify(keys)
    assert len(problems) == 1
    assert "do not agree with their checksum" in problems[0]
    assert index.verify(keys) == index.refresh() == []
    assert index.entries.keys() == {text_key(COLLECTION, f"{text}2") for text in texts}
    assert contents.backend.names(COLLECTION) == {"b" * 32}


def test_states_of_another_collection_are_refused(place, backend):
    backend.save(COLLECTION, NAME, make_shard(["one"], collection=OTHER))
    index = Contents(backend).index(COLLECTION)
    (problem,) = index.refresh()
    assert backend.location(COLLECTION, NAME) in problem
    assert index.refresh() == []
    assert not index.entries
    assert backend.names(COLLECTION) == set()


def test_states_of_another_size_are_refused(backend):
    index = Contents(backend).index(COLLECTION)
    index.save(make_shard(["one"]))
    assert index.require_sizes({SIZE}) == []
    assert len(index.require_sizes({SIZE + 1})) == 1
    assert backend.names(COLLECTION) == set()
    with pytest.raises(DamagedShardError, match="8 numbers instead of"):
        index._check(make_shard(["one"]))


def test_a_lease_shows_to_other_processes_until_it_is_given_back(place, backend):
    keys = [text_key(COLLECTION, text) for text in ("one", "two")]
    # No other process can use a backend in memory: there is nothing to lease.
    expected = set() if backend.in_memory else set(keys)
    other = place.open()
    with backend.lock(COLLECTION):
        lease = backend.lease(COLLECTION, keys)
        lease.__enter__()
    assert other.leased(COLLECTION) == backend.leased(COLLECTION) == expected
    assert other.leased(OTHER) == set()
    lease.__exit__(None, None, None)
    with other.lock(COLLECTION):
        assert other.leased(COLLECTION) == set()


def test_a_bound_of_bytes_evicts_what_was_used_least_recently(backend):
    contents, call = Contents(backend), Call()
    index = open_index(contents)
    size = make_shard(["text0"]).n_bytes
    retention = Retention(contents, max_memory=2**30, max_bytes=2 * size)
    for i in range(3):
        shard = make_shard([f"text{i}"], i)
        shard.last_used = [3e9, 1e9, 2e9][i]
        retention.keep(index, shard, call)
    retention.evict(set())
    found = [text_key(COLLECTION, f"text{i}") in index.entries for i in range(3)]
    assert found == [True, False, True]
    assert index.n_bytes == 2 * size
    assert len(backend.names(COLLECTION)) == 2


def test_a_bound_of_memory_holds_and_no_states_are_lost(backend):
    contents, call = Contents(backend), Call()
    index = open_index(contents)
    shards = [make_shard([f"text {i}"], i) for i in range(30)]
    bound = 5 * shards[0].n_bytes
    retention = Retention(contents, max_memory=bound, max_bytes=None)
    for shard in shards:
        retention.keep(index, shard, call)
        assert contents.memory_bytes <= bound
    assert same(states_of(index, [f"text {i}" for i in range(30)]), [s.states for s in shards])
    held = [backend.load(COLLECTION, name) for name in backend.names(COLLECTION)]
    in_memory = sum(shard.n_bytes for shard in held if shard.path is None)
    assert in_memory == contents.memory_bytes  # what the index has dropped is not held either


def test_texts_of_a_call_outlive_their_eviction(backend):
    contents, shard = Contents(backend), make_shard(["one", "two"])
    index = open_index(contents)
    retention = Retention(contents, max_memory=2**30, max_bytes=0)
    call = Call(wanted={text_key(COLLECTION, "one")})
    with contents.calling(call):
        retention.keep(index, shard, call)
        retention.evict(set())
        assert not index.entries
        (states,) = gather(list(call.held.values()))
        assert torch.equal(states, shard.states[:3])
    assert not contents.calls

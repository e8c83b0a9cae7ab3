"""Reading: the states of missing texts, piece by piece, shared among threads and processes."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sklearn_relish.states.contents import Call, Contents
from sklearn_relish.states.index import ShardIndex, text_key
from sklearn_relish.states.pairs import PairTemplate
from sklearn_relish.states.quantization import QUANTIZERS, kept_dtype_name, n_rows
from sklearn_relish.states.reader import TokenStateReader, read_batches, read_spans
from sklearn_relish.states.retention import Retention
from sklearn_relish.states.shard import KEY_BYTES, Entry, MemoryStates, Shard
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.states.vectors import layers_to_read, lower_layer, text_vectors
from sklearn_relish.utils.messages import warn
from sklearn_relish.utils.progress import ProgressBar

PIECE_TEXTS = 256  # texts of the first piece that a thread takes
PIECE_SECONDS = 5.0  # a piece that takes less is followed by one of twice as many texts
STREAM_BYTES = 16 * 2**20  # bytes of states after which a piece of a stream is complete
STREAM_TEXTS = 1024  # number of texts after which a piece of a stream is complete
POLL_SECONDS = 0.2  # between checks for what other processes have read
PATIENCE_SECONDS = 600.0  # after which a wait gives a warning

Entries = dict[bytes, Entry[Shard | MemoryStates]]  # by text key


class Reading:
    """How one call finds and reads texts.

    Parameters
    ----------
    call : Call
    contents : Contents
    retention : Retention
    llm : TokenStateReader
    max_length, windows
        As of `TokenStateReader.read`.
    pair : PairTemplate or None
        The template of the texts if each is a pair. None: they are not pairs.
    bits : {4, 8, None}
        A number quantizes the states that are read, see `quantization`.
    progress : bool
        Whether a bar counts the texts.

    Attributes
    ----------
    n_read, n_tokens : int
        Number of texts that this thread had to read, and of their tokens.
    """

    def __init__(
        self,
        call: Call,
        contents: Contents,
        retention: Retention,
        llm: TokenStateReader,
        *,
        max_length: int,
        windows: bool,
        pair: PairTemplate | None,
        bits: int | None,
        progress: bool,
    ) -> None:
        self.call = call
        self.contents = contents
        self.retention = retention
        self.llm = llm
        self.max_length = max_length
        self.windows = windows
        self.pair = pair
        self.bits = bits
        self.progress = progress
        self.n_read = self.n_tokens = 0

    @property
    def dtype_name(self) -> str:
        """The dtype in which states are kept."""
        return kept_dtype_name(self.llm.torch_dtype, self.bits)

    def collection(self, layer: int) -> str:
        """Name of the collection of the model's states at a layer, see `Backend`."""
        suffix = "-windows" if self.windows else ""
        suffix += "" if self.pair is None else f"-{self.pair.name}"
        return f"{self.llm.fingerprint}/layer{layer}-{self.dtype_name}-{self.max_length}{suffix}"

    def index(self, layer: int) -> ShardIndex:
        """The index of a layer's states; it accepts only states of the model's size."""
        index = self.contents.index(self.collection(layer))
        warn_unusable(index.require_sizes(set(self.llm.state_sizes(layer))))
        return index

    def refresh(self, index: ShardIndex, wanted: Collection[bytes]) -> None:
        """Find what is new in the backend, and drop what is damaged of the wanted texts."""
        try:
            problems = index.refresh()
        except OSError as error:
            problems = []
            location = index.backend.location(index.collection)
            if location not in self.call.warned:
                self.call.warned.add(location)
                warn(unreadable(location, error))
        warn_unusable(problems + index.verify(wanted))

    def read(self, missing: dict[bytes, str], layers: list[int]) -> None:
        """Wait until all missing texts are kept, and read those that no other thread reads.

        Parameters
        ----------
        missing : dict of bytes to str
            Texts by their keys in the collection of the first layer.
        layers : list of int
            The first is the one that the call wants; the others are kept too.
        """
        if (
            self.contents.backend.in_memory
            and multiprocessing.current_process().name != "MainProcess"
        ):
            warn(
                f"This worker process reads {len(missing)} texts that other processes may read too,"
                " or have read: pass memory= a folder, and they share what they read.",
            )
        contents, held = self.contents, self.call.held
        index = contents.index(self.collection(layers[0]))
        missing = _longest_first(missing)
        n_piece, wait = PIECE_TEXTS, _Wait()
        n_characters = sum(map(len, missing.values()))
        counted: set[bytes] = set()
        with ProgressBar(len(missing), "Reading", "text", self.progress, n_characters) as bar:
            while True:
                wait.begin()
                before = missing
                self.refresh(index, missing)
                with contents.lock:
                    found = index.entries.keys() | held.keys() if held else index.entries
                    missing = {k: text for k, text in before.items() if k not in found}
                kept = [before[key] for key in before.keys() - missing.keys() - counted]
                bar.update(len(kept), cost=sum(map(len, kept)))
                if not missing:
                    return
                with ExitStack() as stack:
                    mine = self._take(index, missing, n_piece, stack)
                    took = bool(mine)  # `mine` shrinks as texts are read
                    if took:
                        began = time.monotonic()
                        piece = {key: text for key, text in missing.items() if key in mine}
                        counted |= piece.keys()
                        self._read_piece(piece, mine, layers, bar)
                        if time.monotonic() - began < PIECE_SECONDS:
                            n_piece *= 2
                if took or len(missing) < len(before):
                    wait.progressed()
                else:
                    wait.wait(contents, len(missing))

    def stream(self, texts: dict[bytes, str], layer: int) -> Iterator[Entries]:
        """Entries of all texts, piece by piece: first of kept texts, then of missing ones.

        Parameters
        ----------
        texts : dict of bytes to str
            Texts by key.
        layer : int

        Yields
        ------
        dict of bytes to Entry
        """
        contents, index = self.contents, self.index(layer)
        rest = _longest_first(texts)
        n_piece, wait = PIECE_TEXTS, _Wait()
        while rest:
            wait.begin()
            self.refresh(index, rest)
            n_before = len(rest)
            for entries in self._kept(index, list(rest)):
                for key in entries:
                    del rest[key]
                with contents.lock:
                    contents.hits += len(entries)
                yield entries
            if len(rest) < n_before:
                wait.progressed()
            if not rest:
                return
            with ExitStack() as stack:
                mine = self._take(index, rest, n_piece, stack, for_prediction=True)
                took = bool(mine)  # `mine` shrinks as texts are read
                if took:
                    began, seconds = time.monotonic(), 0.0
                    for entries in self._read_recent(mine, rest, layer):
                        seconds += time.monotonic() - began
                        yield entries
                        began = time.monotonic()
                    if seconds < PIECE_SECONDS:
                        n_piece *= 2
                    wait.progressed()
            if not took:
                wait.wait(contents, len(rest))

    def _take(
        self,
        index: ShardIndex,
        missing: dict[bytes, str],
        n_texts: int,
        stack: ExitStack,
        for_prediction: bool = False,
    ) -> set[bytes]:
        """Take the next texts to read, which no other thread reads until `stack` is closed.

        Texts that are read for a fit are leased from other processes too. What is read for a
        prediction is not saved, so other processes need not wait for it.
        """
        contents, backend, collection = self.contents, self.contents.backend, index.collection

        def take(leased: Collection[bytes]) -> set[bytes]:
            with contents.lock:
                free = (
                    key
                    for key in missing
                    if key not in leased
                    and key not in contents.reserved
                    and key not in index.entries
                    and not (for_prediction and key in contents.recent)
                )
                return stack.enter_context(contents.reserve(islice(free, n_texts)))

        try:
            if for_prediction:
                leased = backend.leased(collection)
                warn_unusable(index.refresh())
                return take(leased)
            with backend.lock(collection):
                leased = backend.leased(collection)
                # Only now: a process saves the states before it gives up a lease.
                warn_unusable(index.refresh())
                mine = take(leased)
                if mine:
                    stack.enter_context(backend.lease(collection, list(mine)))
                return mine
        except OSError:  # no writing or no locks here: each process reads for itself
            return take(())

    def _read_piece(
        self, piece: dict[bytes, str], mine: set[bytes], layers: list[int], bar: ProgressBar
    ) -> None:
        """Read texts and keep their states, shard by shard. If interrupted, keep what was read.

        States of recently predicted texts are taken from memory.
        """
        contents = self.contents
        names = {layer: self.collection(layer) for layer in layers}
        indexes = {layers[0]: contents.index(names[layers[0]])}
        for layer in layers[1:]:
            indexes[layer] = self.index(layer)
            self.refresh(indexes[layer], ())
        gathered = _Gathered(indexes)
        try:
            unread: list[str] = []
            for first_key, text in piece.items():
                keys = [first_key, *(text_key(names[layer], text) for layer in layers[1:])]
                with contents.lock:
                    entries = [
                        contents.find(indexes[layer], key)
                        for layer, key in zip(layers, keys, strict=True)
                    ]
                    if not all(entries):
                        unread.append(text)
                        continue
                    for layer, key in zip(layers, keys, strict=True):
                        recent = contents.recent.pop(key)
                        if recent is not None:
                            gathered.add(layer, _batch_of_one(key, recent))
                bar.update(cost=len(text))
                if gathered.n_bytes >= self.retention.shard_bytes:
                    self._keep(gathered, mine)
            for rows, batches in self._read_texts(unread, layers):
                for layer, batch in zip(layers, batches, strict=True):
                    gathered.add(layer, batch)
                n_tokens = int(batches[0].lengths.sum())
                n_characters = sum(len(unread[row]) for row in rows)
                bar.update(len(rows), cost=n_characters, n_tokens=n_tokens)
                if gathered.n_bytes >= self.retention.shard_bytes:
                    self._keep(gathered, mine)
        finally:
            self._keep(gathered, mine)

    def _read_texts(
        self, texts: list[str], layers: list[int]
    ) -> Iterator[tuple[np.ndarray, list[_Batch]]]:
        """Read texts, and yield their rows with what is to be kept of them at each layer."""
        names = [self.collection(layer) for layer in layers]
        numbers = layers_to_read(layers)
        for rows, states_of_layers, full_lengths in read_batches(
            self.llm, texts, layers=numbers, max_length=self.max_length, windows=self.windows
        ):
            read = dict(zip(numbers, states_of_layers, strict=True))
            parts = self._parts([texts[row] for row in rows], states_of_layers[0].lengths)
            batches = []
            for name, layer in zip(names, layers, strict=True):
                states, lower = read[layer], lower_layer(layer)
                keys = [text_key(name, texts[row]) for row in rows]
                lower_states = None if lower is None else read[lower]
                vectors, matches = text_vectors(states, lower_states, parts)
                holder = MemoryStates(self._kept_values(states), vectors, matches)
                batches.append(_Batch(keys, holder, states.lengths, full_lengths))
            self.n_read += len(rows)
            self.n_tokens += int(batches[0].lengths.sum())
            yield rows, batches

    def _parts(
        self, texts: list[str], lengths: Tensor
    ) -> list[tuple[np.ndarray, np.ndarray]] | None:
        """The tokens of the two parts of each text; None if they are not pairs.

        Also None if the model does not know which part of a text its tokens are.
        """
        if self.pair is None:
            return None
        spans = read_spans(
            self.llm, texts, lengths, max_length=self.max_length, windows=self.windows
        )
        if spans is None:
            return None
        return list(map(self.pair.tokens_of_parts, texts, spans))

    def _keep(self, gathered: _Gathered, mine: set[bytes]) -> None:
        """Keep the gathered states of each layer as a shard, and release their texts."""
        for layer in reversed(gathered.batches):  # the first layer's are the ones waited for
            batches = gathered.take(layer)
            model = self.llm.model
            label = {
                "model": os.path.abspath(model) if os.path.exists(model) else model,
                "layer": str(layer),
                "dtype": self.dtype_name,
                "max_length": str(self.max_length),
            }
            for shard in _shards(batches, label):
                self.retention.keep(gathered.indexes[layer], shard, self.call)
            if batches:
                self.contents.release(mine, [key for batch in batches for key in batch.keys])

    def _kept(self, index: ShardIndex, keys: list[bytes]) -> Iterator[Entries]:
        """Entries of the texts that the store has, in pieces of some MiB."""
        marked: set[Shard] = set()
        for start in range(0, len(keys), STREAM_TEXTS):
            with self.contents.lock:
                found = {
                    key: self.contents.find(index, key)
                    for key in keys[start : start + STREAM_TEXTS]
                }
            piece: Entries = {}
            n_bytes = 0
            for key, entry in found.items():
                if entry is None:
                    continue
                if isinstance(entry.holder, Shard) and entry.holder not in marked:
                    marked.add(entry.holder)
                    entry.holder.mark_used()
                piece[key] = entry
                states = entry.holder.states
                n_bytes += n_rows(states, entry.length) * states[0].nbytes
                if n_bytes >= STREAM_BYTES:
                    yield piece
                    piece, n_bytes = {}, 0
            if piece:
                yield piece

    def _read_recent(
        self, mine: set[bytes], rest: dict[bytes, str], layer: int
    ) -> Iterator[Entries]:
        """Read the texts that this thread has taken, and keep in memory what fits there.

        Each text is removed from `rest`. While a piece is with the caller, who may take any time,
        other threads can take the texts that are not read yet.
        """
        contents = self.contents
        keys = [key for key in rest if key in mine]
        texts = [rest[key] for key in keys]
        piece: Entries = {}
        unread, n_bytes = set(keys), 0
        for rows, (batch,) in self._read_texts(texts, [layer]):
            entries = batch.entries()
            with contents.lock:
                contents.misses += len(rows)
                bound = self.retention.recent_bytes
                for key, entry in entries.items():
                    piece[key] = entry
                    contents.recent.put(key, entry, bound)
                    del rest[key]
                    unread.discard(key)
                contents.release(mine, entries)
            n_bytes += batch.holder.n_bytes
            if n_bytes >= STREAM_BYTES or len(piece) >= STREAM_TEXTS:
                contents.release(mine, unread)
                yield piece
                contents.reserve_again(mine, unread)
                piece, n_bytes = {}, 0
        if piece:
            yield piece

    def _kept_values(self, states: TokenStates) -> Tensor:
        """States of a batch, in the form in which they are kept."""
        (values,) = states.arrays
        if self.bits is None:
            return values
        return QUANTIZERS[self.bits].quantize_texts(values, states.lengths)


def warn_unusable(problems: list[str]) -> None:
    """Warn of files that can't be used, once for all of them."""
    if problems:
        warn(
            f"{len(problems)} files of the store could not be used: their texts are read again by"
            " the model. Damaged files were removed where that was possible. The first is"
            f" {problems[0]}.",
        )


def unreadable(place: str | os.PathLike[str], error: OSError) -> str:
    """The message about a folder that can't be read."""
    return (
        f"The store's folder {place} can't be read ({error.strerror or error}): its states are not"
        " used. Pass the path of a folder that you may read and write."
    )


class _Wait:
    """Waits for other threads and processes, and warns once if that takes long."""

    def __init__(self) -> None:
        self._progressed = self._began = time.monotonic()
        self._warned = False

    def begin(self) -> None:
        """A check for new states begins. The wait after it lasts at least as long as the check."""
        self._began = time.monotonic()

    def progressed(self) -> None:
        """Texts were read or found."""
        self._progressed = time.monotonic()

    def wait(self, contents: Contents, n_texts: int) -> None:
        """Wait until a thread of this process has read something, or the next check is due."""
        with contents.changed:
            contents.changed.wait(max(POLL_SECONDS, time.monotonic() - self._began))
        if not self._warned and time.monotonic() - self._progressed >= PATIENCE_SECONDS:
            self._warned = True
            warn(
                f"Another process has been reading the last {n_texts} texts for"
                f" {PATIENCE_SECONDS:.0f} seconds. If it hangs, end it: this process then reads"
                " the texts itself.",
            )


class _Batch(NamedTuple):
    """Texts that a model has read at once; see `Shard`."""

    keys: list[bytes]
    holder: MemoryStates
    lengths: Tensor
    full_lengths: np.ndarray

    def entries(self) -> dict[bytes, Entry[MemoryStates]]:
        """Where the states of each text lie."""
        first_tokens = self.lengths.cumsum(0) - self.lengths
        starts = TokenStates.from_lengths(self.holder.states, self.lengths).starts
        columns = first_tokens, starts, self.lengths, self.full_lengths
        entries = zip(self.keys, *(column.tolist() for column in columns), strict=True)
        return {key: Entry(self.holder, i, *place) for i, (key, *place) in enumerate(entries)}


class _Gathered:
    """States that are not yet in a shard, by layer."""

    def __init__(self, indexes: dict[int, ShardIndex]) -> None:
        self.indexes = indexes
        self.batches: dict[int, list[_Batch]] = {layer: [] for layer in indexes}
        self.n_bytes = 0

    def add(self, layer: int, batch: _Batch) -> None:
        """Add a batch, unless the store has all of its texts."""
        if not all(key in self.indexes[layer].entries for key in batch.keys):
            self.batches[layer].append(batch)
            self.n_bytes += batch.holder.n_bytes

    def take(self, layer: int) -> list[_Batch]:
        """Remove and return the batches of a layer."""
        batches, self.batches[layer] = self.batches[layer], []
        self.n_bytes -= sum(batch.holder.n_bytes for batch in batches)
        return batches


def _longest_first(texts: dict[bytes, str]) -> dict[bytes, str]:
    """Sort texts by length, so that texts of similar length are read together."""
    return dict(sorted(texts.items(), key=lambda item: -len(item[1])))


def _batch_of_one(key: bytes, entry: Entry[MemoryStates]) -> _Batch:
    """A recently predicted text as a batch."""
    lengths = torch.tensor([entry.length])
    full_lengths = np.array([entry.full_length])
    return _Batch([key], entry.holder, lengths, full_lengths)


def _shards(batches: list[_Batch], label: dict[str, str]) -> Iterator[Shard]:
    """A shard for each kind of batches, see `MemoryStates.kind`.

    There is more than one kind if the model could not map tokens to pieces of the text for a while.
    """
    kinds = defaultdict(list)
    for batch in batches:
        kinds[batch.holder.kind].append(batch)
    for of_kind in kinds.values():
        keys = b"".join(key for batch in of_kind for key in batch.keys)
        yield Shard(
            states=torch.cat([batch.holder.states for batch in of_kind]),
            vectors=torch.cat([batch.holder.vectors for batch in of_kind]),
            matches=torch.cat([batch.holder.matches for batch in of_kind]),
            lengths=torch.cat([batch.lengths for batch in of_kind]),
            full_lengths=torch.from_numpy(np.concatenate([b.full_lengths for b in of_kind])),
            keys=torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(-1, KEY_BYTES),
            label=label,
        )

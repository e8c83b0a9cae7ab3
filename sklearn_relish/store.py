"""The store of token states: each text is read once, whatever asks for it again.

A text's states are kept under the text and all that changes them (model, layer, dtype, length),
never under the array that the text came in. They lie in this process, or in a folder that other
processes and later days share.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sklearn_relish.backbone import FrozenLLM
from sklearn_relish.shards import KEY_BYTES, Shard
from sklearn_relish.shelf import Shelf
from sklearn_relish.states import TokenStates, pack_states
from sklearn_relish.temporary import temporary_folder

STATES_VERSION = 1  # goes up when this package makes other states of the same text
MAX_MEMORY = 2 * 2**30
PIECE_TEXTS = 256  # texts that a process claims at first, and twice as many each time while they
PIECE_SECONDS = 5.0  # are read in less than this
POLL_SECONDS = 0.2  # between looks at what other processes are reading
PATIENCE_SECONDS = 600.0  # after which a user is told of a wait
SHARD_BYTES = 64 * 2**20  # states gathered before a shard is made
SHELVES = "[0-9a-f]" * 32 + "/layer*-*-*/"


@dataclass
class _Contents:
    """What this process knows of one folder's states, or holds without a folder."""

    shelves: dict[str, Shelf] = field(default_factory=dict)
    hits: int = 0
    misses: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)  # for all of the above
    reading: threading.Lock = field(default_factory=threading.Lock)


_known: dict[Path | None, _Contents] = {}
_known_lock = threading.Lock()


class StateStore:
    """Token states of texts, read once by a model and found again by text.

    It says where states are kept and how many, and can be given as `memory` to the estimators.
    All stores of one folder within a process share what they know, and so do all without a folder.

    Parameters
    ----------
    folder : str, path or joblib.Memory, default=None
        Where states are kept, for other processes and later days; of a `joblib.Memory`, a folder
        in its location. None: in this process, and in a temporary folder that goes with it.
    max_memory : number, default=2 * 2**30
        Bytes of states that the process holds where there is no folder, 2 GiB. What comes after
        is written to the temporary folder. States in files are mapped, not held.
    max_bytes : number, default=None
        Bytes of states that are kept in all. After a call that added some, the least recently
        used are removed, file by file, until the rest is within the bound; during the call there
        may be more by what it adds. None: no bound for a folder; where there is none,
        `max_memory` and half of what the disk of the temporary folder had free.
    bits : {8, None}, default=None
        8 keeps states in float8 (e4m3, with a scale a token): half the bytes, to be read anew
        where there are some in the model's own dtype, which is what None keeps.

    Raises
    ------
    ValueError
        If a bound is no number of bytes, or `bits` another number.

    Examples
    --------
    >>> import tempfile
    >>> from sklearn_relish import RelishRegressor, StateStore
    >>> store = StateStore(tempfile.mkdtemp(), max_bytes=50 * 2**30)
    >>> regressor = RelishRegressor(memory=store)
    >>> store.info()
    []
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | joblib.Memory | None = None,
        *,
        max_memory: float = MAX_MEMORY,
        max_bytes: float | None = None,
        bits: int | None = None,
    ) -> None:
        if isinstance(folder, joblib.Memory):
            folder = folder.location and Path(folder.location, "sklearn_relish")
        if folder is not None:
            if not os.fspath(folder):
                raise ValueError("The folder of a StateStore has an empty name: pass '.', or None.")
            folder = Path(folder).expanduser().absolute()
        self.folder = folder
        self.max_memory = _check_bytes("max_memory", max_memory)
        self.max_bytes = None if max_bytes is None else _check_bytes("max_bytes", max_bytes)
        if bits not in (8, None):
            raise ValueError(f"bits must be 8, or None for the model's own dtype, got {bits!r}.")
        self.bits = bits

    def __getstate__(self) -> dict[str, Any]:
        folder = None if self.folder is None else os.fspath(self.folder)
        return {
            "folder": folder,
            "max_memory": self.max_memory,
            "max_bytes": self.max_bytes,
            "bits": self.bits,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __repr__(self) -> str:
        given = [] if self.folder is None else [repr(os.fspath(self.folder))]
        given += [f"max_memory={self.max_memory}"] if self.max_memory != MAX_MEMORY else []
        given += [f"max_bytes={self.max_bytes}"] if self.max_bytes is not None else []
        given += [f"bits={self.bits}"] if self.bits is not None else []
        return f"StateStore({', '.join(given)})"

    @property
    def hits(self) -> int:
        """Texts that this process found here; equal ones of one call count once."""
        return self._contents.hits

    @property
    def misses(self) -> int:
        """Texts that this process had to read."""
        return self._contents.misses

    def fetch(
        self,
        texts: list[str],
        llm: FrozenLLM,
        *,
        layer: int,
        also: Sequence[int] = (),
        max_length: int,
        windows: bool = False,
        progress: bool,
    ) -> TokenStates:
        """States of texts, in their order; what the store lacks is read by the model and kept.

        Of several processes that lack the same texts of a folder, each reads a part of them.

        Parameters
        ----------
        texts : list of str
        llm : FrozenLLM
            Loaded only if the store lacks a text.
        layer : int
            From 1 to the model's number of layers.
        also : sequence of int, default=()
            Layers whose states are kept too, of the texts that are read now: the same pass gives
            them.
        max_length : int
            Tokens of a text that are read.
        windows : bool, default=False
            Whether longer texts are read in windows of so many tokens instead of being cut.
        progress : bool
            Whether a bar counts the texts that are read.

        Returns
        -------
        TokenStates
            In the model's dtype, or packed in 8 bits; on the CPU.

        Raises
        ------
        OSError, FloatingPointError
            If the model can't be loaded, or overflows. What was read until then is kept.

        Warns
        -----
        UserWarning
            If texts were cut; if files of the store were damaged, or states could not be written,
            after either of which the work goes on; if a worker process reads texts that it can't
            share.
        """
        reading = _Reading(llm, max_length, windows)
        name = self._name(reading, layer)
        keys = [_key(name, text) for text in texts]
        wanted = dict(zip(keys, texts, strict=True))
        contents = self._contents
        n_read = 0
        while True:
            with contents.lock:  # what is here is had even while another thread reads
                shelf = self._shelf(name)
                missing = self._lacking(shelf, wanted)
                if not missing:
                    states = shelf.states(keys)
                    full_lengths = np.array([shelf.entries[key].full_length for key in keys])
                    used = {shelf.entries[key].shard for key in keys}
                    used |= self._shards_of(texts, [self._name(reading, n) for n in also])
                    _mark_used(used)
                    contents.hits += max(0, len(wanted) - n_read)
                    contents.misses += n_read
                    if n_read:
                        self._warn_damaged(shelf.merge_small())
                        self._evict(used)
                    break
            with contents.reading:
                n_read += self._read(shelf, missing, reading, [layer, *also], progress)
        cut = full_lengths > states.lengths.numpy()
        if cut.any():
            warnings.warn(
                f"{cut.sum()} of {len(texts)} texts are longer than max_length={max_length} tokens"
                f" or the model's window and were cut; the longest has {full_lengths.max()}.",
                UserWarning,
                stacklevel=4,
            )
        return states

    def stream(
        self,
        texts: list[str],
        llm: FrozenLLM,
        *,
        layer: int,
        max_length: int,
        windows: bool = False,
        progress: bool = False,
    ) -> Iterator[tuple[np.ndarray, TokenStates]]:
        """States of texts in pieces: which rows they are of, int64, and the states."""
        settings = {"layer": layer, "max_length": max_length, "windows": windows}
        yield np.arange(len(texts)), self.fetch(texts, llm, **settings, progress=progress)

    def info(self) -> list[dict[str, Any]]:
        """What the store holds: a dict for each model, layer, dtype and way to read long texts.

        Returns
        -------
        list of dict
            With the keys ``model``, ``layer``, ``dtype``, ``max_length``, ``long_text``,
            ``n_texts``, ``n_bytes`` and ``fingerprint``, which tells apart models of one name.
        """
        rows = []
        with self._contents.lock:
            for name, shelf in self._all_shelves().items():
                if shelf.shards:
                    label = next(iter(shelf.shards)).label
                    rows.append(
                        {
                            "model": label["model"],
                            "layer": int(label["layer"]),
                            "dtype": label["dtype"],
                            "max_length": int(label["max_length"]),
                            "long_text": "window" if name.endswith("-windows") else "truncate",
                            "n_texts": len(shelf.entries),
                            "n_bytes": shelf.n_bytes,
                            "fingerprint": name.partition("/")[0],
                        }
                    )
        return rows

    def clear(self, model: str | os.PathLike[str] | FrozenLLM | None = None) -> None:
        """Remove the states of one model, or all.

        Parameters
        ----------
        model : str, path or FrozenLLM, default=None
            The name or path by which the model was read, or the model itself, whose other
            revisions stay. None: all models.
        """
        with self._contents.lock:
            for name, shelf in self._all_shelves().items():
                for shard in list(shelf.shards):
                    if model is None:
                        chosen = True
                    elif isinstance(model, FrozenLLM):
                        chosen = name.startswith(model.fingerprint)
                    else:
                        names = os.fspath(model), os.path.abspath(model)
                        chosen = shard.label["model"] in names
                    if chosen:
                        shelf.remove(shard)

    def _name(self, reading: _Reading, layer: int) -> str:
        """Of the shelf of a model's states at a layer."""
        length = f"{reading.max_length}{'-windows' if reading.windows else ''}"
        dtype = self._dtype_name(reading.llm)
        return f"{reading.llm.fingerprint}/layer{layer}-{dtype}-{length}"

    def _dtype_name(self, llm: FrozenLLM) -> str:
        name = str(llm.torch_dtype).removeprefix("torch.")
        return name if self.bits is None else f"{name}-{self.bits}bit"

    @property
    def _contents(self) -> _Contents:
        with _known_lock:
            return _known.setdefault(self.folder, _Contents())

    def _shelf(self, name: str) -> Shelf:
        shelves = self._contents.shelves
        if name not in shelves:
            shelves[name] = Shelf(None if self.folder is None else self.folder / name)
        return shelves[name]

    def _all_shelves(self) -> dict[str, Shelf]:
        """Those included that other processes have made; new files are found."""
        if self.folder is not None:
            for path in sorted(self.folder.glob(SHELVES)):
                self._warn_damaged(self._shelf(os.fspath(path.relative_to(self.folder))).look())
        return self._contents.shelves

    def _shards_of(self, texts: list[str], names: list[str]) -> set[Shard]:
        """Shards of other shelves that have states of these texts."""
        shards = set()
        for name in names:
            entries = self._shelf(name).entries
            keys = (_key(name, text) for text in texts)
            shards |= {entries[key].shard for key in keys if key in entries}
        return shards

    def _lacking(self, shelf: Shelf, wanted: dict[bytes, str]) -> dict[bytes, str]:
        """What a shelf lacks of texts by key, once what is new is found and what is broken gone."""
        self._warn_damaged(shelf.look() + shelf.verify(wanted))
        return {key: text for key, text in wanted.items() if key not in shelf.entries}

    def _read(
        self,
        shelf: Shelf,
        missing: dict[bytes, str],
        reading: _Reading,
        layers: list[int],
        progress: bool,
    ) -> int:
        """See that a shelf has all texts; how many of them this process had to read.

        Piece by piece: those that other processes are reading meanwhile are left to them.
        """
        if self.folder is None and multiprocessing.current_process().name != "MainProcess":
            warnings.warn(
                f"This worker process reads {len(missing)} texts that others may read too, or have"
                " read: pass memory= a folder, and they share what they read.",
                UserWarning,
                stacklevel=5,
            )
        # Texts of like length are read together, the longest first.
        missing = dict(sorted(missing.items(), key=lambda item: -len(item[1])))
        n_all, n_read, n_piece = len(missing), 0, PIECE_TEXTS
        lock = self._contents.lock
        progressed, told = time.monotonic(), False
        with tqdm(total=n_all, desc="Reading texts", unit="text", disable=not progress) as bar:
            while True:
                began = time.monotonic()
                n_before = len(missing)
                with lock:
                    missing = self._lacking(shelf, missing)
                bar.update(n_all - len(missing) - bar.n)
                if not missing:
                    return n_read
                with ExitStack() as claim:
                    with lock:
                        piece = self._claim(shelf, missing, n_piece, claim)
                    if piece:
                        began = time.monotonic()
                        self._read_piece(piece, reading, layers, bar)
                        n_read += len(piece)
                        if time.monotonic() - began < PIECE_SECONDS:
                            n_piece = min(2 * n_piece, n_all)
                if piece or len(missing) < n_before:
                    progressed = time.monotonic()
                    continue
                time.sleep(max(POLL_SECONDS, time.monotonic() - began))
                if not told and time.monotonic() - progressed > PATIENCE_SECONDS:
                    told = True
                    warnings.warn(
                        f"Another process has been reading the last {len(missing)} texts for"
                        f" {PATIENCE_SECONDS:.0f} seconds. If it hangs, end it: this one goes on"
                        " then.",
                        UserWarning,
                        stacklevel=5,
                    )

    def _claim(
        self, shelf: Shelf, missing: dict[bytes, str], n_texts: int, claim: ExitStack
    ) -> dict[bytes, str]:
        """The next texts for this process to read, claimed until `claim` is closed."""
        if shelf.claims is None:
            return missing
        try:
            with shelf.claims.lock():
                taken = shelf.claims.taken()
                # After that: whoever has let go of a claim had written the states before.
                self._warn_damaged(shelf.look())
                free = (key for key in missing if key not in taken and key not in shelf.entries)
                piece = list(islice(free, n_texts))
                if piece:
                    claim.enter_context(shelf.claims.claim(piece))
        except OSError:  # no writing or no locks here: each for itself
            piece = list(missing)
        return {key: missing[key] for key in piece}

    def _read_piece(
        self,
        piece: dict[bytes, str],
        reading: _Reading,
        layers: list[int],
        bar: tqdm,
    ) -> None:
        """Read texts and keep them, a shard at a time, and what was read when it is stopped."""
        texts = list(piece.values())
        names = {layer: self._name(reading, layer) for layer in layers}
        keys = {layer: [_key(name, text) for text in texts] for layer, name in names.items()}
        pending: dict[int, list[_Batch]] = {layer: [] for layer in layers}
        with self._contents.lock:
            shelves = {layer: self._shelf(name) for layer, name in names.items()}
            for layer in layers[1:]:
                self._warn_damaged(shelves[layer].look())
        try:
            batches = reading.llm.read(
                texts, layers=layers, max_length=reading.max_length, windows=reading.windows
            )
            for rows, states, full in batches:
                for layer, some in zip(layers, states, strict=True):
                    if all(keys[layer][row] in shelves[layer].entries for row in rows):
                        continue  # of a layer that is kept along, and was there
                    (values,) = some.arrays
                    if self.bits == 8:
                        values = pack_states(values)
                    pending[layer].append(
                        _Batch([keys[layer][row] for row in rows], values, some.lengths, full)
                    )
                bar.update(len(rows))
                n_bytes = sum(batch.values.nbytes for some in pending.values() for batch in some)
                if n_bytes >= self._shard_bytes:
                    self._keep_batches(pending, shelves, reading)
        finally:
            self._keep_batches(pending, shelves, reading)

    def _keep_batches(
        self,
        pending: dict[int, list[_Batch]],
        shelves: dict[int, Shelf],
        reading: _Reading,
    ) -> None:
        """Put what was read of each layer onto its shelf."""
        for layer in reversed(pending):  # the one that is looked for last: then all are there
            if pending[layer]:
                gathered, pending[layer] = pending[layer], []
                model = reading.llm.model
                label = {
                    "model": os.path.abspath(model) if os.path.exists(model) else model,
                    "layer": str(layer),
                    "dtype": self._dtype_name(reading.llm),
                    "max_length": str(reading.max_length),
                }
                self._keep(shelves[layer], _shard(gathered, label))

    def _keep(self, shelf: Shelf, shard: Shard) -> None:
        """Put a shard into the folder; without one, or if it can't be written, into memory."""
        with self._contents.lock:  # from before the file is there, or a look would find it too
            if shelf.folder is not None:
                try:
                    shard = shard.save(shelf.folder)
                except OSError as error:
                    self._warn_unwritable(error, shelf.folder)
            shelf.add(shard)
            self._spill()

    def _spill(self) -> None:
        """Move the least recently used from memory to temporary files until the rest fits."""
        shelves = self._contents.shelves.values()
        excess = sum(shelf.memory_bytes for shelf in shelves) - self.max_memory
        if excess <= 0:
            return
        held = [(s, shelf) for shelf in shelves for s in shelf.shards if s.path is None]
        held.sort(key=lambda pair: pair[0].last_used, reverse=True)
        try:
            folder = temporary_folder().path
            while held and excess > 0:
                group, n_bytes = [], 0
                shelf = held[-1][1]
                while held and held[-1][1] is shelf and n_bytes < self._shard_bytes:
                    group.append(held.pop()[0])
                    n_bytes += group[-1].n_bytes
                # It takes the place of the group.
                shelf.add(Shard.merged(group).save(folder, map_small=True))
                excess -= n_bytes
        except OSError as error:
            self._warn_unwritable(error, tempfile.gettempdir())

    @property
    def _shard_bytes(self) -> float:
        """States gathered before a shard is made: less than SHARD_BYTES if little may be held."""
        return SHARD_BYTES if self.folder else min(SHARD_BYTES, max(self.max_memory / 4, 2**20))

    def _evict(self, used: set[Shard]) -> None:
        """Remove the least recently used shards beyond the bound, those of this call last."""
        bound = self.max_bytes
        shelves = self._contents.shelves if bound is None else self._all_shelves()
        n_bytes = sum(shelf.n_bytes for shelf in shelves.values())
        if bound is None:
            if self.folder is not None or n_bytes <= self.max_memory:
                return
            try:
                bound = self.max_memory + temporary_folder().max_bytes
            except OSError:  # all is in memory, and that has been said
                return
        if n_bytes <= bound:
            return
        shards = []
        for shelf in shelves.values():
            for shard in shelf.shards:
                last_used = shard.last_used
                if shard.path is not None:  # another process may have used it since
                    with suppress(OSError):
                        last_used = shard.path.stat().st_mtime
                shards.append((shard in used, last_used, shelf, shard))
        removed = set()
        for _, _, shelf, shard in sorted(shards, key=lambda found: found[:2]):
            if n_bytes <= bound:
                break
            shelf.remove(shard)
            removed.add(shard)
            n_bytes -= shard.n_bytes
        if removed & used:
            warnings.warn(
                f"The store's bound of {bound} bytes is less than one call's states take: some are"
                " removed now, and their texts are read again next time.",
                UserWarning,
                stacklevel=5,
            )

    @staticmethod
    def _warn_damaged(troubles: list[str]) -> None:
        if troubles:
            warnings.warn(
                f"{len(troubles)} damaged files of the store were left out, and removed where that"
                f" was possible: their texts are read again by the model. The first is"
                f" {troubles[0]}.",
                UserWarning,
                stacklevel=5,
            )

    @staticmethod
    def _warn_unwritable(error: OSError, folder: str | os.PathLike[str]) -> None:
        warnings.warn(
            f"Token states could not be written to {os.fspath(folder)} ({error.strerror or error}):"
            " they stay in memory, and are lost with this process.",
            UserWarning,
            stacklevel=7,
        )


def open_store(memory: str | os.PathLike[str] | joblib.Memory | StateStore | None) -> StateStore:
    """The store that an estimator's `memory` stands for."""
    return memory if isinstance(memory, StateStore) else StateStore(memory)


def _check_bytes(name: str, value: float) -> float:
    if not isinstance(value, Real) or not value >= 0:
        raise ValueError(f"{name} must be a number of bytes, 0 or more, got {value!r}.")
    return value


def _mark_used(shards: set[Shard]) -> None:
    for shard in shards:
        shard.last_used = time.time()
        if shard.path is not None:
            with suppress(OSError):  # gone, or not ours to touch
                os.utime(shard.path)


class _Reading(NamedTuple):
    """How texts are read: by which model, and what becomes of long ones."""

    llm: FrozenLLM
    max_length: int
    windows: bool


class _Batch(NamedTuple):
    """What a model has read at once."""

    keys: list[bytes]
    values: Tensor
    lengths: Tensor
    full_lengths: np.ndarray


def _shard(batches: list[_Batch], label: dict[str, str]) -> Shard:
    keys = b"".join(key for batch in batches for key in batch.keys)
    return Shard(
        states=torch.cat([batch.values for batch in batches]),
        lengths=torch.cat([batch.lengths for batch in batches]),
        full_lengths=torch.from_numpy(np.concatenate([b.full_lengths for b in batches])),
        keys=torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(-1, KEY_BYTES),
        label=label,
    )


def _key(name: str, text: str) -> bytes:
    text = f"{STATES_VERSION}/{name}/{text}"
    return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).digest()

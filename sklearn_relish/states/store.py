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
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
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

from sklearn_relish.llm.frozen import FrozenLLM
from sklearn_relish.states.index import SHELF_NAME, Shelf, gather
from sklearn_relish.states.recent import RecentStates, RecentText
from sklearn_relish.states.shard import KEY_BYTES, Entry, Shard
from sklearn_relish.states.temporary import made_temporary_folder, temporary_folder
from sklearn_relish.states.token_states import TokenStates, pack_states
from sklearn_relish.utils.locks import ForkSafeLock, renew_in_forked_child
from sklearn_relish.utils.messages import warn

STATES_VERSION = 1  # goes up when this package makes other states of the same text
MAX_MEMORY = 2 * 2**30
RECENT_SHARE = 0.25  # of max_memory, for the states of texts that were predicted lately
PIECE_TEXTS = 256  # texts that a thread claims at first, and twice as many each time while they
PIECE_SECONDS = 5.0  # are read in less than this
STREAM_BYTES = 16 * 2**20  # states, and
STREAM_TEXTS = 1024  # texts that `stream` gives at once
MAX_FOLDERS = 16  # whose indexes are kept in memory
POLL_SECONDS = 0.2  # between looks at what other processes are reading
PATIENCE_SECONDS = 600.0  # after which a user is told of a wait
SHARD_BYTES = 64 * 2**20  # states gathered before a shard is made
SHELVES = "[0-9a-f]" * 32 + "/layer*-*-*/"


@dataclass(eq=False)
class _Call:
    """A call under way: what it wants, and what it has that the store had to let go of."""

    wanted: Collection[bytes] = ()
    held: dict[bytes, Entry] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)  # what is not said again


@dataclass(eq=False)
class _Contents:
    """What this process knows of one folder's states, or holds without a folder.

    All attributes are guarded by `lock`, which nobody holds while texts are read, files are read
    or written, or another process is waited for.
    """

    shelves: dict[str, Shelf] = field(default_factory=dict)
    recent: RecentStates = field(default_factory=RecentStates)
    hits: int = 0
    misses: int = 0
    calls: set[_Call] = field(default_factory=set)  # under way
    in_work: set[bytes] = field(default_factory=set)  # texts that a thread is reading

    def __post_init__(self) -> None:
        self._make_locks()
        renew_in_forked_child(self, _Contents._renew)

    def _make_locks(self) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)  # texts were read, or are free again
        self.spilling = threading.Lock()  # held while states are moved to temporary files

    def _renew(self) -> None:
        if not self.lock.acquire(blocking=False):  # a thread may have left it half changed
            self.shelves, self.recent = {}, RecentStates()
        self._make_locks()
        self.calls, self.in_work = set(), set()
        for shelf in self.shelves.values():
            shelf.lock, shelf.writing = self.lock, set()

    @property
    def memory_bytes(self) -> int:
        """Bytes of states that are kept in memory, without recent ones."""
        return sum(shelf.memory_bytes for shelf in self.shelves.values())

    def find(self, shelf: Shelf, key: bytes) -> Entry | None:
        """A text's entry among kept and recent states."""
        return shelf.entries.get(key) or self.recent.get(key)

    def drop(self, shelf: Shelf, shard: Shard) -> None:
        """Remove a shard for a bound; calls under way that want its texts hold it to their end."""
        for call in self.calls:
            if call.wanted:
                call.held |= {key: e for key, e in shard.entries() if key in call.wanted}
        shelf.remove(shard)

    @contextmanager
    def working(self, keys: Iterable[bytes]) -> Iterator[set[bytes]]:
        """Keep other threads from reading these texts, as long as they are in the set given."""
        mine = set(keys)
        with self.lock:
            self.in_work |= mine
        try:
            yield mine
        finally:
            self.release(mine, mine.copy())

    def release(self, mine: set[bytes], keys: Iterable[bytes]) -> None:
        """Let other threads have texts that are read, or will be read later."""
        with self.lock:
            keys = mine.intersection(keys)
            self.in_work -= keys
            mine -= keys
            self.changed.notify_all()

    def resume(self, mine: set[bytes], keys: Iterable[bytes]) -> None:
        """Take texts again after `release`, if no other thread has taken them."""
        with self.lock:
            keys = set(keys) - self.in_work
            self.in_work |= keys
            mine |= keys


_known: dict[Path | None, _Contents] = {}  # the most recently used last
_known_lock = ForkSafeLock()


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
        Bytes of states that the process holds in memory between calls, 2 GiB: those that are kept
        where there is no folder or it can't be written, and in up to a quarter of it those of
        texts that were predicted lately, which are in no file. Of the kept ones, what comes after
        is written to the temporary folder, or dropped if that can't be written. A call itself may
        hold all states that it asked for. States in files are mapped, not held.
    max_bytes : number, default=None
        Bytes of states that are kept in all, without those of texts that were predicted lately,
        which take as many more at most. After a call that added some, the least recently
        used are removed, file by file, until the rest is within the bound; during the call there
        may be more by what it adds. None: no bound for a folder; what is not in one is bounded by
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
            try:
                folder = Path(folder).expanduser().absolute()
            except RuntimeError:
                raise ValueError(
                    f"The folder {os.fspath(folder)!r} of a StateStore has no meaning here: there"
                    " is no home folder of that user. Pass the folder's full path."
                ) from None
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
        """Texts that this process found here; equal ones of one call count once.

        Counting begins anew for a folder whose index the process no longer remembers, which is so
        once it has used many other folders.
        """
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
        call = _Call(wanted)
        n_read, lacked = 0, False
        with self._calling(call) as contents:
            shelf = self._shelf(contents, name)
            self._expect(shelf, reading, layer, call)
            while True:
                self._refresh(shelf, wanted, call)
                with contents.lock:
                    entries = [shelf.entries.get(key) or call.held.get(key) for key in keys]
                if all(entries):
                    break
                lacked = True
                missing = {k: wanted[k] for k, e in zip(keys, entries, strict=True) if not e}
                n_read += self._read(shelf, missing, reading, [layer, *also], progress, call)
            with contents.lock:
                contents.hits += max(0, len(wanted) - n_read)
                contents.misses += n_read
            used = {entry.shard for entry in entries}
            used |= self._shards_of(contents, texts, [self._name(reading, n) for n in also])
            _mark_used(used)
            if lacked:
                self._warn_damaged(shelf.merge_small(), call)
                self._evict(used, call)
        states = gather(entries)
        full_lengths = np.array([entry.full_length for entry in entries])
        n_cut = int((full_lengths > states.lengths.numpy()).sum())
        _warn_cut(n_cut, len(texts), max_length, full_lengths.max(initial=0))
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
        """States of texts in pieces of some MiB, for predictions; nothing is written to a file.

        What the store lacks is read by the model. The states of texts that were read lately stay in
        memory, where `fetch` finds them too: they take up to a quarter of `max_memory`, and less
        where kept states need the room. A search therefore reads each text once in a process while
        the states of a fold fit this bound; beyond it, a text is read for a prediction and again
        for a fit. Other processes do not see these states: each reads for itself what it predicts
        before any process has read it for a fit.

        Parameters
        ----------
        texts : list of str
        llm : FrozenLLM
            Loaded only if the store lacks a text.
        layer : int
            From 1 to the model's number of layers.
        max_length : int
            Tokens of a text that are read.
        windows : bool, default=False
            Whether longer texts are read in windows of so many tokens instead of being cut.
        progress : bool, default=False
            Whether a bar counts the texts that are read.

        Yields
        ------
        rows : int64 ndarray of shape (n_piece,)
            Which texts the piece holds, in no particular order. Each row is in one piece.
        states : TokenStates
            Their states, as `fetch` returns them.

        Raises
        ------
        OSError, FloatingPointError
            If the model can't be loaded, or overflows.

        Warns
        -----
        UserWarning
            After the last piece if texts were cut; if files of the store were damaged.
        """
        reading = _Reading(llm, max_length, windows)
        name = self._name(reading, layer)
        rows_of: dict[bytes, list[int]] = {}
        for row, text in enumerate(texts):
            rows_of.setdefault(_key(name, text), []).append(row)
        rest = {key: texts[rows[0]] for key, rows in rows_of.items()}
        # Texts of like length are read together, the longest first.
        rest = dict(sorted(rest.items(), key=lambda item: -len(item[1])))
        call = _Call()
        n_cut, longest = 0, 0
        with self._calling(call) as contents, _Bar(len(rest), progress) as bar:
            shelf = self._shelf(contents, name)
            self._expect(shelf, reading, layer, call)
            for entries in self._pieces(contents, shelf, rest, reading, layer, bar, call):
                rows = [row for key in entries for row in rows_of[key]]
                repeated = [entry for key, entry in entries.items() for _ in rows_of[key]]
                n_cut += sum(entry.full_length > entry.length for entry in repeated)
                longest = max(longest, *(entry.full_length for entry in repeated))
                yield np.array(rows), gather(repeated)
        _warn_cut(n_cut, len(texts), max_length, longest)

    def info(self) -> list[dict[str, Any]]:
        """What the store holds: a dict for each model, layer, dtype and way to read long texts.

        Returns
        -------
        list of dict
            With the keys ``model``, ``layer``, ``dtype``, ``max_length``, ``long_text``,
            ``n_texts``, ``n_bytes`` and ``fingerprint``, which tells apart models of one name.

        Raises
        ------
        OSError
            If the folder can't be read.
        """
        rows = []
        contents = self._contents
        shelves = self._all_shelves(contents)
        with contents.lock:
            for name, shelf in shelves.items():
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
        contents = self._contents
        shelves = self._all_shelves(contents)
        with contents.lock:
            contents.recent.clear()
            for name, shelf in shelves.items():
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
            contents = _known.pop(self.folder, None)
            new = contents is None
            contents = _known[self.folder] = _Contents() if new else contents
            others = [folder for folder in _known if folder not in (None, self.folder)]
        if new and others:
            gone = [folder for folder in others if not os.path.exists(folder)]
            with _known_lock:
                for folder in [*gone, *(others[: -(MAX_FOLDERS - 1)])]:
                    if folder in _known and not _known[folder].calls:
                        del _known[folder]
        return contents

    @contextmanager
    def _calling(self, call: _Call) -> Iterator[_Contents]:
        contents = self._contents
        with contents.lock:
            contents.calls.add(call)
        try:
            yield contents
        finally:
            with contents.lock:
                contents.calls.discard(call)

    def _shelf(self, contents: _Contents, name: str) -> Shelf:
        with contents.lock:
            if name not in contents.shelves:
                folder = None if self.folder is None else self.folder / name
                contents.shelves[name] = Shelf(name, folder, contents.lock)
            return contents.shelves[name]

    def _all_shelves(self, contents: _Contents) -> dict[str, Shelf]:
        """Those included that other processes have made; new files are found."""
        if self.folder is not None:
            for path in self._shelf_folders():
                shelf = self._shelf(contents, path.relative_to(self.folder).as_posix())
                self._warn_damaged(shelf.look(), _Call())
        with contents.lock:
            return dict(contents.shelves)

    def _shelf_folders(self) -> list[Path]:
        try:
            with suppress(FileNotFoundError):
                os.scandir(self.folder).close()
            found = sorted(self.folder.glob(SHELVES))
            found = [path for path in found if SHELF_NAME.fullmatch(path.name)]
            return [path for path in found if not (path.is_symlink() or path.parent.is_symlink())]
        except OSError as error:
            raise type(error)(error.errno, _unreadable(self.folder, error)) from error

    def _shards_of(self, contents: _Contents, texts: list[str], names: list[str]) -> set[Shard]:
        """Shards of other shelves that have states of these texts."""
        shards = set()
        for name in names:
            entries = self._shelf(contents, name).entries
            keys = [_key(name, text) for text in texts]
            with contents.lock:
                shards |= {entries[key].shard for key in keys if key in entries}
        return shards

    def _expect(self, shelf: Shelf, reading: _Reading, layer: int, call: _Call) -> None:
        """Have a shelf accept states of the model's width alone."""
        llm = reading.llm
        widths = {llm.hidden_size}
        if layer == llm.n_layers:  # some models project the last layer's states
            widths.add(getattr(llm.config.get_text_config(), "word_embed_proj_dim", None))
        self._warn_damaged(shelf.expect(widths - {None}), call)

    def _refresh(self, shelf: Shelf, wanted: Collection[bytes], call: _Call) -> None:
        """Find what is new on a shelf; what is broken of these texts is gone after that."""
        try:
            troubles = shelf.look()
        except OSError as error:
            troubles = []
            if shelf.folder not in call.warned:
                call.warned.add(shelf.folder)
                warn(_unreadable(shelf.folder, error))
        self._warn_damaged(troubles + shelf.verify(wanted), call)

    def _pieces(
        self,
        contents: _Contents,
        shelf: Shelf,
        rest: dict[bytes, str],
        reading: _Reading,
        layer: int,
        bar: _Bar,
        call: _Call,
    ) -> Iterator[dict[bytes, Entry]]:
        """Entries of all texts: first what is there, then what is read, until none is left."""
        n_piece, wait = PIECE_TEXTS, _Wait()
        while rest:
            wait.begin()
            self._refresh(shelf, rest, call)
            n_before = len(rest)
            for entries in self._found(contents, shelf, list(rest)):
                for key in entries:
                    del rest[key]
                bar.update(len(entries))
                with contents.lock:
                    contents.hits += len(entries)
                yield entries
            if len(rest) < n_before:
                wait.progressed()
            if not rest:
                return
            with ExitStack() as stack:
                mine = self._take(contents, shelf, rest, n_piece, stack, recent=True)
                took = bool(mine)  # `mine` shrinks as texts are read
                if took:
                    began, seconds = time.monotonic(), 0.0
                    for entries in self._read_recent(contents, shelf, mine, rest, reading, layer):
                        seconds += time.monotonic() - began
                        bar.update(len(entries))
                        yield entries
                        began = time.monotonic()
                    if seconds < PIECE_SECONDS:
                        n_piece *= 2
                    wait.progressed()
            if not took:
                wait.wait(contents, len(rest))

    def _found(
        self, contents: _Contents, shelf: Shelf, keys: list[bytes]
    ) -> Iterator[dict[bytes, Entry]]:
        """Entries of those texts that are there, in pieces of some MiB."""
        marked: set[Shard] = set()
        for start in range(0, len(keys), STREAM_TEXTS):
            some = keys[start : start + STREAM_TEXTS]
            with contents.lock:
                found = {key: contents.find(shelf, key) for key in some}
            piece, n_bytes = {}, 0
            for key, entry in found.items():
                if entry is None:
                    continue
                if isinstance(entry.shard, Shard) and entry.shard not in marked:
                    marked.add(entry.shard)
                    _mark_used({entry.shard})
                piece[key] = entry
                n_bytes += entry.length * entry.shard.states[0].nbytes
                if n_bytes >= STREAM_BYTES:
                    yield piece
                    piece, n_bytes = {}, 0
            if piece:
                yield piece

    def _read_recent(
        self,
        contents: _Contents,
        shelf: Shelf,
        mine: set[bytes],
        rest: dict[bytes, str],
        reading: _Reading,
        layer: int,
    ) -> Iterator[dict[bytes, Entry]]:
        """Read texts that this thread has taken, and keep as many as may be in memory.

        Each is removed from `rest`. While a piece is with the caller, who may take any time, other
        threads can have the texts that are not read yet.
        """
        keys = [key for key in rest if key in mine]
        texts = [rest[key] for key in keys]
        unread, piece, n_bytes = set(keys), {}, 0
        for rows, (states,), full in reading.llm.read(
            texts, layers=[layer], max_length=reading.max_length, windows=reading.windows
        ):
            values = self._packed(states)
            read = [keys[row] for row in rows]
            batch = RecentText(values)
            with contents.lock:
                contents.misses += len(rows)
                bound = self._recent_bound(contents)
                places = states.starts.tolist(), states.lengths.tolist(), full.tolist()
                for key, start, length, full_length in zip(read, *places, strict=True):
                    piece[key] = Entry(batch, start, length, full_length)
                    contents.recent.put(key, values[start : start + length], full_length, bound)
                    del rest[key]
                    unread.discard(key)
                contents.release(mine, read)
            n_bytes += values.nbytes
            if n_bytes >= STREAM_BYTES or len(piece) >= STREAM_TEXTS:
                contents.release(mine, unread)
                yield piece
                contents.resume(mine, unread)
                piece, n_bytes = {}, 0
        if piece:
            yield piece

    def _packed(self, states: TokenStates) -> Tensor:
        """What is kept of the states that a model gives."""
        (values,) = states.arrays
        return pack_states(values) if self.bits == 8 else values

    def _recent_bound(self, contents: _Contents) -> float:
        """Bytes that the states of recently predicted texts may take now."""
        bound = min(RECENT_SHARE * self.max_memory, self.max_memory - contents.memory_bytes)
        return max(0, bound if self.max_bytes is None else min(bound, self.max_bytes))

    def _read(
        self,
        shelf: Shelf,
        missing: dict[bytes, str],
        reading: _Reading,
        layers: list[int],
        progress: bool,
        call: _Call,
    ) -> int:
        """See that the call has all texts; how many of them this thread had to read.

        Piece by piece: those that others are reading meanwhile are left to them.
        """
        if self.folder is None and multiprocessing.current_process().name != "MainProcess":
            warn(
                f"This worker process reads {len(missing)} texts that others may read too, or have"
                " read: pass memory= a folder, and they share what they read.",
            )
        contents = self._contents
        # Texts of like length are read together, the longest first.
        missing = dict(sorted(missing.items(), key=lambda item: -len(item[1])))
        n_read, n_piece, wait = 0, PIECE_TEXTS, _Wait()
        with _Bar(len(missing), progress) as bar:
            while True:
                wait.begin()
                n_before = len(missing)
                self._refresh(shelf, missing, call)
                with contents.lock:
                    have = shelf.entries.keys() | call.held.keys() if call.held else shelf.entries
                    missing = {k: text for k, text in missing.items() if k not in have}
                bar.update(n_before - len(missing))
                if not missing:
                    return n_read
                with ExitStack() as stack:
                    mine = self._take(contents, shelf, missing, n_piece, stack)
                    took = bool(mine)  # `mine` shrinks as texts are read
                    if took:
                        began = time.monotonic()
                        piece = {key: text for key, text in missing.items() if key in mine}
                        n_read += self._read_piece(contents, piece, mine, reading, layers, call)
                        if time.monotonic() - began < PIECE_SECONDS:
                            n_piece *= 2
                if took or len(missing) < n_before:
                    wait.progressed()
                else:
                    wait.wait(contents, len(missing))

    def _take(
        self,
        contents: _Contents,
        shelf: Shelf,
        missing: dict[bytes, str],
        n_texts: int,
        stack: ExitStack,
        recent: bool = False,
    ) -> set[bytes]:
        """The next texts for this thread to read, which no other reads until `stack` is closed.

        They are claimed among processes too, unless they are read for a prediction (`recent`) and
        not written.
        """

        def take(taken: Collection[bytes]) -> set[bytes]:
            with contents.lock:
                free = (
                    key
                    for key in missing
                    if key not in taken
                    and key not in contents.in_work
                    and key not in shelf.entries
                    and not (recent and key in contents.recent)
                )
                return stack.enter_context(contents.working(islice(free, n_texts)))

        if shelf.claims is None:
            return take(())
        try:
            if recent:
                taken = shelf.claims.taken()
                self._warn_damaged(shelf.look(), _Call())
                return take(taken)
            with shelf.claims.lock():
                taken = shelf.claims.taken()
                # After that: whoever has let go of a claim had written the states before.
                self._warn_damaged(shelf.look(), _Call())
                mine = take(taken)
                if mine:
                    stack.enter_context(shelf.claims.claim(list(mine)))
                return mine
        except OSError:  # no writing or no locks here: each for itself
            return take(())

    def _read_piece(
        self,
        contents: _Contents,
        piece: dict[bytes, str],
        mine: set[bytes],
        reading: _Reading,
        layers: list[int],
        call: _Call,
    ) -> int:
        """Have texts and keep them, a shard at a time, and what was read when it is stopped.

        Those that were predicted lately are at hand. Returned is how many were not.
        """
        names = {layer: self._name(reading, layer) for layer in layers}
        shelves = {layer: self._shelf(contents, name) for layer, name in names.items()}
        for layer in layers[1:]:
            self._expect(shelves[layer], reading, layer, call)
            self._refresh(shelves[layer], (), call)
        gathered = _Gathered(shelves)
        try:
            unread: list[str] = []
            for key, text in piece.items():
                keys = [key, *(_key(names[layer], text) for layer in layers[1:])]
                with contents.lock:
                    found = [
                        contents.find(shelves[layer], some)
                        for layer, some in zip(layers, keys, strict=True)
                    ]
                    if not all(found):
                        unread.append(text)
                        continue
                    for layer, some, entry in zip(layers, keys, found, strict=True):
                        if contents.recent.pop(some) is not None:
                            gathered.add(layer, _one_text(some, entry))
                if gathered.n_bytes >= self._shard_bytes:
                    self._keep_gathered(contents, gathered, reading, mine, call)
            keys_of = {layer: [_key(names[layer], text) for text in unread] for layer in layers}
            batches = reading.llm.read(
                unread, layers=layers, max_length=reading.max_length, windows=reading.windows
            )
            for rows, states, full in batches if unread else ():
                for layer, some in zip(layers, states, strict=True):
                    keys = [keys_of[layer][row] for row in rows]
                    gathered.add(layer, _Batch(keys, self._packed(some), some.lengths, full))
                if gathered.n_bytes >= self._shard_bytes:
                    self._keep_gathered(contents, gathered, reading, mine, call)
        finally:
            self._keep_gathered(contents, gathered, reading, mine, call)
        return len(unread)

    def _keep_gathered(
        self,
        contents: _Contents,
        gathered: _Gathered,
        reading: _Reading,
        mine: set[bytes],
        call: _Call,
    ) -> None:
        """Put what was read of each layer onto its shelf."""
        for layer in reversed(gathered.batches):  # the one that is looked for last
            batches = gathered.take(layer)
            if batches:
                model = reading.llm.model
                label = {
                    "model": os.path.abspath(model) if os.path.exists(model) else model,
                    "layer": str(layer),
                    "dtype": self._dtype_name(reading.llm),
                    "max_length": str(reading.max_length),
                }
                self._keep(contents, gathered.shelves[layer], _shard(batches, label), call)
                contents.release(mine, [key for batch in batches for key in batch.keys])

    def _keep(self, contents: _Contents, shelf: Shelf, shard: Shard, call: _Call) -> None:
        """Put a shard into the folder; without one, or if it can't be written, into memory."""
        if shelf.folder is not None:
            try:
                shelf.save(shard)
                return
            except OSError as error:
                self._warn_unwritable(
                    error,
                    shelf.folder,
                    "they stay in memory as far as max_memory allows, and are lost with this"
                    " process. Pass the path of a folder that you may write to, on a disk with"
                    " room",
                    call,
                )
        with contents.lock:
            shelf.add(shard)
            contents.recent.shrink(self._recent_bound(contents))
        self._spill(contents, call)

    def _spill(self, contents: _Contents, call: _Call) -> None:
        """Move the least recently used from memory to temporary files until the rest fits.

        What can't be written there is dropped.
        """
        with contents.spilling:
            while held := self._beyond_memory(contents):
                shelf, shards, n_bytes = held[0][0], [], 0
                for owner, shard in held:
                    if owner is not shelf or n_bytes >= self._shard_bytes:
                        break
                    shards.append(shard)
                    n_bytes += shard.n_bytes
                place = tempfile.gettempdir()
                try:
                    place = temporary_folder().path
                    path = shelf.new_file(place)
                    merged = Shard.merged(shards).save(path, map_small=True)
                except OSError as error:
                    self._drop_beyond_memory(contents)
                    self._warn_unwritable(
                        error,
                        place,
                        f"states beyond max_memory={self.max_memory} are dropped, and their texts"
                        " are read again when they are needed. Make room there, or raise"
                        " max_memory",
                        call,
                    )
                    return
                with contents.lock:
                    shelf.writing.discard(path.name)
                    if all(shard in shelf.shards for shard in shards):
                        shelf.add(merged)  # it takes the place of the group
                        continue
                with suppress(OSError):  # some were removed meanwhile: again without them
                    path.unlink()

    def _beyond_memory(self, contents: _Contents) -> list[tuple[Shelf, Shard]]:
        """What lies in memory, the least recently used first, if that is more than its bound."""
        with contents.lock:
            if contents.memory_bytes <= self.max_memory:
                return []
            shelves = contents.shelves.values()
            held = [(f, shard) for f in shelves for shard in f.shards if shard.path is None]
            return sorted(held, key=lambda pair: pair[1].last_used)

    def _drop_beyond_memory(self, contents: _Contents) -> None:
        with contents.lock:
            for shelf, shard in self._beyond_memory(contents):
                if contents.memory_bytes > self.max_memory:
                    contents.drop(shelf, shard)

    @property
    def _shard_bytes(self) -> float:
        """States gathered before a shard is made: less than SHARD_BYTES if little may be held."""
        return SHARD_BYTES if self.folder else min(SHARD_BYTES, max(self.max_memory / 4, 2**20))

    def _evict(self, used: set[Shard], call: _Call) -> None:
        """Remove the least recently used shards beyond the bounds, those of this call last."""
        contents = self._contents
        if self.max_bytes is not None:
            with suppress(OSError):  # what can't be read can't be removed either
                self._all_shelves(contents)
        temporary = made_temporary_folder()
        removed: set[Shard] = set()
        bound = None
        with contents.lock:
            shards = [(f, shard) for f in contents.shelves.values() for shard in f.shards]
            if self.max_bytes is not None:
                excess = sum(shard.n_bytes for _, shard in shards) - self.max_bytes
                if excess > 0:
                    bound = self.max_bytes
                    removed |= _drop_oldest(contents, shards, excess, used)
            if temporary is not None:
                with suppress(OSError):
                    excess = temporary.n_bytes - temporary.max_bytes
                    there = [
                        (f, shard)
                        for f, shard in shards
                        if shard.path is not None
                        and shard.path.parent == temporary.path
                        and shard not in removed
                    ]
                    if excess > 0:
                        bound = temporary.max_bytes if bound is None else bound
                        removed |= _drop_oldest(contents, there, excess, used)
        if removed & used:
            warn(
                f"The store's bound of {bound} bytes is less than one call's states take: some are"
                " removed now, and their texts are read again next time.",
            )

    @staticmethod
    def _warn_damaged(troubles: list[str], call: _Call) -> None:
        if troubles:
            warn(
                f"{len(troubles)} damaged files of the store were left out, and removed where that"
                f" was possible: their texts are read again by the model. The first is"
                f" {troubles[0]}.",
            )

    @staticmethod
    def _warn_unwritable(
        error: OSError, folder: str | os.PathLike[str], consequence: str, call: _Call
    ) -> None:
        if folder not in call.warned:
            call.warned.add(folder)
            warn(
                f"Token states could not be written to {os.fspath(folder)}"
                f" ({error.strerror or error}): {consequence}.",
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


def _drop_oldest(
    contents: _Contents, shards: list[tuple[Shelf, Shard]], n_bytes: float, used: set[Shard]
) -> set[Shard]:
    """Drop the least recently used of some shards, and of the used ones only what is left over."""

    def age(pair: tuple[Shelf, Shard]) -> tuple[bool, float]:
        shard = pair[1]
        if shard.path is not None:  # another process may have used it since
            with suppress(OSError):
                return shard in used, shard.path.lstat().st_mtime
        return shard in used, shard.last_used

    dropped = set()
    for shelf, shard in sorted(shards, key=age):
        if n_bytes <= 0:
            break
        contents.drop(shelf, shard)
        dropped.add(shard)
        n_bytes -= shard.n_bytes
    return dropped


def _unreadable(folder: Path, error: OSError) -> str:
    return (
        f"The store's folder {folder} can't be read ({error.strerror or error}): its states are not"
        " used. Pass the path of a folder that you may read and write."
    )


def _warn_cut(n_cut: int, n_texts: int, max_length: int, longest: int) -> None:
    if n_cut:
        warn(
            f"{n_cut} of {n_texts} texts are longer than max_length={max_length} tokens"
            f" or the model's window and were cut; the longest has {longest}.",
        )


class _Reading(NamedTuple):
    """How texts are read: by which model, and what becomes of long ones."""

    llm: FrozenLLM
    max_length: int
    windows: bool


class _Wait:
    """Waits for other threads and processes, and warns once if that takes long."""

    def __init__(self) -> None:
        self._progressed = self._began = time.monotonic()
        self._warned = False

    def begin(self) -> None:
        """A look begins, after which it may be waited for as long as that took."""
        self._began = time.monotonic()

    def progressed(self) -> None:
        """Texts were read or found."""
        self._progressed = time.monotonic()

    def wait(self, contents: _Contents, n_texts: int) -> None:
        """Until a thread of this process has read something, or the next look is due."""
        with contents.changed:
            contents.changed.wait(max(POLL_SECONDS, time.monotonic() - self._began))
        if not self._warned and time.monotonic() - self._progressed >= PATIENCE_SECONDS:
            self._warned = True
            warn(
                f"Another process has been reading the last {n_texts} texts for"
                f" {PATIENCE_SECONDS:.0f} seconds. If it hangs, end it: this one goes on then.",
            )


class _Bar:
    """A progress bar, or none: tqdm takes a lock even for a bar that is disabled."""

    def __init__(self, n_texts: int, progress: bool) -> None:
        self._bar = tqdm(total=n_texts, desc="Reading texts", unit="text") if progress else None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, n_texts: int) -> None:
        """So many more texts are there."""
        if self._bar is not None:
            self._bar.update(n_texts)


class _Gathered:
    """States by layer that are going to be a shard each."""

    def __init__(self, shelves: dict[int, Shelf]) -> None:
        self.shelves = shelves
        self.batches: dict[int, list[_Batch]] = {layer: [] for layer in shelves}
        self.n_bytes = 0

    def add(self, layer: int, batch: _Batch) -> None:
        """Take in what a model has read, unless all of it is on the shelf."""
        if not all(key in self.shelves[layer].entries for key in batch.keys):
            self.batches[layer].append(batch)
            self.n_bytes += batch.values.nbytes

    def take(self, layer: int) -> list[_Batch]:
        """What there is of a layer, which is gone from here then."""
        batches, self.batches[layer] = self.batches[layer], []
        self.n_bytes -= sum(batch.values.nbytes for batch in batches)
        return batches


class _Batch(NamedTuple):
    """What a model has read at once."""

    keys: list[bytes]
    values: Tensor
    lengths: Tensor
    full_lengths: np.ndarray


def _one_text(key: bytes, entry: Entry) -> _Batch:
    """A text that was predicted lately, as a batch of its own."""
    lengths = torch.tensor([entry.length])
    return _Batch([key], entry.shard.states, lengths, np.array([entry.full_length]))


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

"""The store of token states: each text is read once, whoever asks for it again.

A text's states are kept by the text and by what changes them (model, layer, dtype, length),
independently of the array that the text came in. They lie in this process, or in a folder that
other processes share and that stays.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from sklearn_relish.states.contents import Call, Contents, contents_of
from sklearn_relish.states.index import ShardIndex, gather, text_key
from sklearn_relish.states.reader import TokenStateReader
from sklearn_relish.states.reading import Reading, unreadable, warn_damaged
from sklearn_relish.states.retention import Retention
from sklearn_relish.states.shard import Shard
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.utils.messages import warn

MAX_MEMORY = 2 * 2**30


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
        llm: TokenStateReader,
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
        llm : TokenStateReader, such as a FrozenLLM
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
        contents, call = self._contents, Call()
        retention = Retention(contents, self.max_memory, self.max_bytes)
        reading = Reading(
            call,
            contents,
            retention,
            llm,
            max_length=max_length,
            windows=windows,
            bits=self.bits,
            progress=progress,
        )
        collection = reading.collection(layer)
        keys = [text_key(collection, text) for text in texts]
        call.wanted = wanted = dict(zip(keys, texts, strict=True))
        n_read, complete = 0, True
        with contents.calling(call):
            index = reading.index(layer)
            while True:
                reading.refresh(index, wanted)
                with contents.lock:
                    entries = [index.entries.get(key) or call.held.get(key) for key in keys]
                if all(entries):
                    break
                complete = False
                missing = {k: wanted[k] for k, e in zip(keys, entries, strict=True) if not e}
                n_read += reading.read(missing, [layer, *also])
            with contents.lock:
                contents.hits += max(0, len(wanted) - n_read)
                contents.misses += n_read
            used = {entry.shard for entry in entries}
            for other_layer in also:
                used |= _shards_of(contents, texts, reading.collection(other_layer))
            for shard in used:
                shard.mark_used()
            if not complete:
                warn_damaged(index.merge_small())
                if self.max_bytes is not None:
                    with suppress(OSError):  # what can't be read can't be removed either
                        self._all_indexes(contents)
                retention.evict(used)
        states = gather(entries)
        full_lengths = np.array([entry.full_length for entry in entries])
        n_cut = int((full_lengths > states.lengths.numpy()).sum())
        _warn_cut(n_cut, len(texts), max_length, full_lengths.max(initial=0))
        return states

    def stream(
        self,
        texts: list[str],
        llm: TokenStateReader,
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
        llm : TokenStateReader, such as a FrozenLLM
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
        contents, call = self._contents, Call()
        reading = Reading(
            call,
            contents,
            Retention(contents, self.max_memory, self.max_bytes),
            llm,
            max_length=max_length,
            windows=windows,
            bits=self.bits,
            progress=progress,
        )
        collection = reading.collection(layer)
        rows_of: dict[bytes, list[int]] = {}
        for row, text in enumerate(texts):
            rows_of.setdefault(text_key(collection, text), []).append(row)
        distinct = {key: texts[rows[0]] for key, rows in rows_of.items()}
        # Texts of similar length are read together, the longest first.
        distinct = dict(sorted(distinct.items(), key=lambda item: -len(item[1])))
        n_cut, longest = 0, 0
        with contents.calling(call):
            for entries in reading.stream(distinct, layer):
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
        indexes = self._all_indexes(contents)
        with contents.lock:
            for collection, index in indexes.items():
                if index.shards:
                    label = next(iter(index.shards)).label
                    rows.append(
                        {
                            "model": label["model"],
                            "layer": int(label["layer"]),
                            "dtype": label["dtype"],
                            "max_length": int(label["max_length"]),
                            "long_text": (
                                "window" if collection.endswith("-windows") else "truncate"
                            ),
                            "n_texts": len(index.entries),
                            "n_bytes": index.n_bytes,
                            "fingerprint": collection.partition("/")[0],
                        }
                    )
        return rows

    def clear(self, model: str | os.PathLike[str] | TokenStateReader | None = None) -> None:
        """Remove the states of one model, or all.

        Parameters
        ----------
        model : str, path or TokenStateReader, default=None
            The name or path by which the model was read, which stands for all its revisions; or
            the reader itself, such as a `FrozenLLM`, which stands for its own revision. None: all
            models.
        """
        contents = self._contents
        indexes = self._all_indexes(contents)
        with contents.lock:
            contents.recent.clear()
            for collection, index in indexes.items():
                for shard in list(index.shards):
                    if model is None:
                        chosen = True
                    elif isinstance(model, (str, os.PathLike)):
                        names = os.fspath(model), os.path.abspath(model)
                        chosen = shard.label["model"] in names
                    else:
                        chosen = collection.partition("/")[0] == model.fingerprint
                    if chosen:
                        index.remove(shard)

    @property
    def _contents(self) -> Contents:
        return contents_of(self.folder)

    def _all_indexes(self, contents: Contents) -> dict[str, ShardIndex]:
        """All collections' indexes, refreshed, including those that other processes have made."""
        try:
            collections = contents.backend.collections()
        except OSError as error:
            raise type(error)(error.errno, unreadable(self.folder, error)) from error
        for collection in collections:
            warn_damaged(contents.index(collection).refresh())
        with contents.lock:
            return dict(contents.indexes)


def open_store(memory: str | os.PathLike[str] | joblib.Memory | StateStore | None) -> StateStore:
    """The store for an estimator's parameter `memory`."""
    return memory if isinstance(memory, StateStore) else StateStore(memory)


def _check_bytes(name: str, value: float) -> float:
    if not isinstance(value, Real) or not value >= 0:
        raise ValueError(f"{name} must be a number of bytes, 0 or more, got {value!r}.")
    return value


def _shards_of(contents: Contents, texts: list[str], collection: str) -> set[Shard]:
    """Shards of a collection that hold states of these texts."""
    entries = contents.index(collection).entries
    keys = [text_key(collection, text) for text in texts]
    with contents.lock:
        return {entries[key].shard for key in keys if key in entries}


def _warn_cut(n_cut: int, n_texts: int, max_length: int, longest: int) -> None:
    if n_cut:
        warn(
            f"{n_cut} of {n_texts} texts are longer than max_length={max_length} tokens"
            f" or the model's window and were cut; the longest has {longest}.",
        )

"""The store of token states: each text is read once, whoever asks for it again.

A text's states are kept by the text and by what changes them (model, layer, dtype, length, and
whether it is made of two), independently of the array that the text came in. They lie in this
process, or are kept in a folder that other processes share.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from sklearn_relish.states.contents import Call, Contents, contents_of
from sklearn_relish.states.index import ShardIndex, gather, text_key
from sklearn_relish.states.pairs import PairTemplate
from sklearn_relish.states.quantization import QUANTIZERS
from sklearn_relish.states.reader import TokenStateReader
from sklearn_relish.states.reading import Reading, unreadable, warn_unusable
from sklearn_relish.states.retention import Retention
from sklearn_relish.states.shard import Shard
from sklearn_relish.states.token_states import TokenStates
from sklearn_relish.utils.messages import warn
from sklearn_relish.utils.progress import ProgressBar, log

logger = logging.getLogger(__name__)

MAX_MEMORY = 2 * 2**30
BLOCK_TEXTS = 2**16  # texts of a stream whose keys are in memory together


class CutTexts:
    """Counts texts that were cut, for one warning.

    Parameters
    ----------
    max_length : int
        Number of tokens after which texts are cut.

    Examples
    --------
    >>> cut = CutTexts(max_length=512)
    >>> cut.add(np.array([512, 20]), np.array([600, 20]))
    >>> cut.n_cut, cut.n_texts, cut.longest
    (1, 2, 600)
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.n_cut = self.n_texts = self.longest = 0

    def add(self, lengths: np.ndarray, full_lengths: np.ndarray) -> None:
        """Count texts, given their numbers of tokens after and before the cut."""
        self.n_cut += int(np.count_nonzero(full_lengths > lengths))
        self.n_texts += len(lengths)
        self.longest = max(self.longest, int(full_lengths.max(initial=0)))

    def warn(self) -> None:
        """Warn if texts were cut."""
        if self.n_cut:
            warn(
                f"{self.n_cut} of {self.n_texts} texts are longer than"
                f" max_length={self.max_length} tokens, or do not fit into the model's context"
                f" after the prefix, and were cut; the longest has {self.longest}. A larger"
                " max_length, or long_text='window', reads more of them.",
            )


class StateStore:
    """Token states of texts: a model reads each text once, later calls find its states by text.

    A store says where states are kept and how many. Pass it as `memory` to the estimators. All
    stores of one folder within a process share one index, and so do all stores without a folder.

    Parameters
    ----------
    folder : str, path or joblib.Memory, default=None
        Where states are kept for other processes and later sessions. A `joblib.Memory` stands for
        a folder in its location. None: states are kept in this process, and in a temporary folder
        that is removed when the process ends.
    max_memory : number, default=2 * 2**30
        Bytes of states that the process holds in memory between calls (2 GiB). These are the kept
        states if there is no folder or it can't be written to; and, in up to a quarter of the
        bound, the states of recently predicted texts, which are in no file. Kept states beyond the
        bound are written to the temporary folder, or dropped if that is not possible. A call may
        hold all states that it returns. States in files are mapped into memory and don't count. A
        fit on more states than `max_memory` reads them from the files in windows of half of that
        size, which are in addition. Its result then depends on `max_memory` and on the files.
    max_bytes : number, default=None
        Bytes of states that are kept in all. The states of recently predicted texts don't count;
        they take at most the same number of bytes again. After a call that added states, the least
        recently used files are removed until the rest is within the bound. During the call there
        may be more, by the states that it adds. None: a folder has no bound; without a folder,
        states are bounded by `max_memory` and half of the free space on the disk of the temporary
        folder.
    bits : {4, 8, None}, default=None
        Bits per value of a state. None: states are kept in the model's own dtype. 8: in float8
        (e4m3, with a scale of 4 bytes per token), in half the bytes of bfloat16. 4: in 16 levels
        of the randomly rotated state, except its 4 largest values (18 more bytes per token), in
        about a quarter of the bytes. In both, the state of a text's last token is kept in bfloat16;
        in 4 bits a text also has a scale for each value. The vectors of a lower layer, three for
        each text and seven for a pair of texts, are never quantized, and the matches of a pair's
        tokens come from states that are not. States that are kept in one form are read again for
        another.

    Raises
    ------
    ValueError
        If a bound is not a number of bytes, or `bits` is neither 8, 4 nor None.

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
                    f"The folder {os.fspath(folder)!r} of a StateStore can't be resolved: that user"
                    " has no home folder here. Pass the folder's full path."
                ) from None
        self.folder = folder
        self.max_memory = _check_bytes("max_memory", max_memory)
        self.max_bytes = None if max_bytes is None else _check_bytes("max_bytes", max_bytes)
        if not (bits is None or (isinstance(bits, int) and bits in QUANTIZERS)):
            raise ValueError(f"bits must be 8, 4, or None for the model's own dtype, got {bits!r}.")
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
        StateStore.__init__(self, **state)

    def __repr__(self) -> str:
        given = [] if self.folder is None else [repr(os.fspath(self.folder))]
        given += [f"max_memory={self.max_memory}"] if self.max_memory != MAX_MEMORY else []
        given += [f"max_bytes={self.max_bytes}"] if self.max_bytes is not None else []
        given += [f"bits={self.bits}"] if self.bits is not None else []
        return f"StateStore({', '.join(given)})"

    @property
    def hits(self) -> int:
        """Number of texts whose states this process found. Equal texts of a call count once.

        The count starts again at 0 after the process has used many other folders, since it then
        discards the folder's index.
        """
        return self._contents.hits

    @property
    def misses(self) -> int:
        """Number of texts that this process had to read."""
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
        pair: PairTemplate | None = None,
        progress: bool,
    ) -> TokenStates:
        """Return the states of texts. The model reads missing texts, and their states are kept.

        If several processes need the same missing texts of a folder, each reads a part of them.

        Parameters
        ----------
        texts : list of str
        llm : TokenStateReader, such as a FrozenLLM
            Loaded only if the store lacks a text.
        layer : int
            From 1 to the model's number of layers.
        also : sequence of int, default=()
            More layers whose states are kept, for the texts that are read in this call: one pass
            computes all layers.
        max_length : int
            Number of tokens after which a text is cut.
        windows : bool, default=False
            If True, longer texts are read completely, in windows of `max_length` tokens.
        pair : PairTemplate, default=None
            The template of the texts if each is a pair: its tokens' matches, and vectors that
            compare its parts, are kept in addition. The estimators pass it for two columns of
            texts; to read such rows ahead, call `LLMEncoder.fit_transform` with the same prompt.
        progress : bool
            Whether a bar counts the texts that are read.

        Returns
        -------
        TokenStates
            In the order of `texts`, in the model's dtype or quantized as `bits` says, on the CPU.

        Raises
        ------
        OSError, FloatingPointError
            If the model can't be loaded, or its states overflow. What was read before is kept.

        Warns
        -----
        UserWarning
            If texts were cut, if files of the store could not be used, if states could not be
            written, or if a worker process reads texts into a store that other processes can't use.

        Examples
        --------
        >>> from sklearn_relish import FrozenLLM, StateStore
        >>> llm, store = FrozenLLM("HuggingFaceTB/SmolLM2-135M"), StateStore()
        >>> texts = ["a text", "another one"]
        >>> states = store.fetch(texts, llm, layer=2, max_length=512, progress=False)
        >>> len(states)
        2
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
            pair=pair,
            bits=self.bits,
            progress=progress,
        )
        collection = reading.collection(layer)
        keys = [text_key(collection, text) for text in texts]
        call.wanted = wanted = dict(zip(keys, texts, strict=True))
        complete, began = True, time.monotonic()
        with contents.calling(call):
            index = reading.index(layer)
            while True:
                reading.refresh(index, wanted)
                with contents.lock:
                    found = call.held | {
                        key: index.entries[key] for key in wanted if key in index.entries
                    }
                if len(found) == len(wanted):
                    break
                complete = False
                missing = {key: text for key, text in wanted.items() if key not in found}
                reading.read(missing, [layer, *also])
            with contents.lock:
                contents.hits += max(0, len(wanted) - reading.n_read)
                contents.misses += reading.n_read
            entries = [found[key] for key in keys]
            used = {entry.holder for entry in entries}
            for other_layer in also:
                used |= _shards_of(contents, texts, reading.collection(other_layer))
            for shard in used:
                shard.mark_used()
            if not complete:
                warn_unusable(index.merge_small())
                if self.max_bytes is not None:
                    with suppress(OSError):  # what can't be read can't be removed either
                        self._all_indexes(contents)
                retention.evict(used)
        states = gather(entries)
        _log_reading(reading, len(wanted), layer, began)
        full_lengths = np.array([entry.full_length for entry in entries])
        cut = CutTexts(max_length)
        cut.add(states.lengths.numpy(), full_lengths)
        cut.warn()
        return states

    def stream(
        self,
        texts: list[str],
        llm: TokenStateReader,
        *,
        layer: int,
        max_length: int,
        windows: bool = False,
        pair: PairTemplate | None = None,
        progress: bool = False,
    ) -> Iterator[tuple[np.ndarray, TokenStates]]:
        """Yield the states of texts in pieces of some MiB, for predictions. No file is written.

        Memory does not grow with the number of texts, except for 8 bytes per text if the number is
        large and texts are repeated.

        The model reads missing texts. The most recently read states stay in memory, where `fetch`
        finds them too. They take up to a quarter of `max_memory`, and less if kept states need the
        memory. A search thus reads each text once per process if the states of a fold fit into
        this bound; otherwise, a text is read for a prediction and again for a fit. Other processes
        can't use these states: each process reads a text that it predicts, unless some process has
        read it for a fit before.

        Parameters
        ----------
        texts : list of str
        llm : TokenStateReader, such as a FrozenLLM
            Loaded only if the store lacks a text.
        layer : int
            From 1 to the model's number of layers.
        max_length : int
            Number of tokens after which a text is cut.
        windows : bool, default=False
            If True, longer texts are read completely, in windows of `max_length` tokens.
        pair : PairTemplate, default=None
            The template of the texts if each is a pair: its tokens' matches, and vectors that
            compare its parts, are kept in addition. The estimators pass it for two columns of
            texts; to read such rows ahead, call `LLMEncoder.fit_transform` with the same prompt.
        progress : bool, default=False
            Whether a bar counts the texts whose states were yielded.

        Yields
        ------
        rows : int64 ndarray of shape (n_piece,)
            Positions in `texts` of the texts of this piece, in no particular order. Each position
            is in one piece.
        states : TokenStates
            Their states, as `fetch` returns them.

        Raises
        ------
        OSError, FloatingPointError
            If the model can't be loaded, or its states overflow.

        Warns
        -----
        UserWarning
            If files of the store could not be used; after the last piece, if texts were cut.

        Examples
        --------
        >>> from sklearn_relish import FrozenLLM, StateStore
        >>> llm, store = FrozenLLM("HuggingFaceTB/SmolLM2-135M"), StateStore()
        >>> for rows, states in store.stream(["a text"], llm, layer=2, max_length=512):
        ...     rows.tolist(), len(states)
        ([0], 1)
        """
        cut = CutTexts(max_length)
        reading = {"max_length": max_length, "windows": windows, "pair": pair}
        yield from self._pieces(texts, llm, cut, layer=layer, progress=progress, **reading)
        cut.warn()

    def _pieces(
        self,
        texts: list[str],
        llm: TokenStateReader,
        cut: CutTexts,
        *,
        layer: int,
        progress: bool,
        **options: Any,
    ) -> Iterator[tuple[np.ndarray, TokenStates]]:
        """As `stream`, but cut texts are counted for a warning about several calls."""
        contents, call = self._contents, Call()
        reading = Reading(
            call,
            contents,
            Retention(contents, self.max_memory, self.max_bytes),
            llm,
            bits=self.bits,
            progress=progress,
            **options,
        )
        collection = reading.collection(layer)
        n_distinct, began = 0, time.monotonic()
        with (
            contents.calling(call),
            ProgressBar(len(texts), "Reading", "text", progress) as bar,
        ):
            for block in _blocks(texts):
                rows_of: dict[bytes, list[int]] = {}
                for row in block:
                    rows_of.setdefault(text_key(collection, texts[row]), []).append(row)
                distinct = {key: texts[rows[0]] for key, rows in rows_of.items()}
                n_distinct += len(distinct)
                for entries in reading.stream(distinct, layer):
                    rows = [row for key in entries for row in rows_of[key]]
                    repeated = [entry for key, entry in entries.items() for _ in rows_of[key]]
                    cut.add(
                        np.array([entry.length for entry in repeated]),
                        np.array([entry.full_length for entry in repeated]),
                    )
                    bar.update(len(rows))
                    yield np.array(rows), gather(repeated)
        _log_reading(reading, n_distinct, layer, began, logging.DEBUG)

    def info(self) -> list[dict[str, Any]]:
        """List what the store holds: a dict for each model, layer, dtype and way of reading.

        Returns
        -------
        list of dict
            With the keys ``model``, ``layer``, ``dtype``, ``max_length``, ``long_text``,
            ``pair``, whether the texts are made of two, ``n_texts``, ``n_bytes`` and
            ``fingerprint``, which differs between models of one name.

        Raises
        ------
        OSError
            If the folder can't be read.

        Examples
        --------
        >>> from sklearn_relish import LLMEncoder, StateStore
        >>> store = StateStore("states-of-encoder")
        >>> _ = LLMEncoder(memory=store).fit_transform(["a text", "another one"])
        >>> [(row["long_text"], row["n_texts"]) for row in store.info()]
        [('truncate', 2)]
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
                            "long_text": ("window" if "-windows" in collection else "truncate"),
                            "pair": "-pair" in collection,
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

        Examples
        --------
        >>> from sklearn_relish import LLMEncoder, StateStore
        >>> store = StateStore("states-to-clear")
        >>> _ = LLMEncoder(memory=store).fit_transform(["a text"])
        >>> store.clear()
        >>> store.info()
        []
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
            raise type(error)(error.errno, unreadable(str(self.folder), error)) from error
        for collection in collections:
            warn_unusable(contents.index(collection).refresh())
        with contents.lock:
            return dict(contents.indexes)


def open_store(memory: str | os.PathLike[str] | joblib.Memory | StateStore | None) -> StateStore:
    """The store for an estimator's parameter `memory`."""
    return memory if isinstance(memory, StateStore) else StateStore(memory)


def _blocks(texts: list[str]) -> Iterator[Sequence[int]]:
    """Rows of `texts` in blocks of `BLOCK_TEXTS`; rows of equal texts follow each other.

    So each text is read once, except for one on the border of two blocks.
    """
    if len(texts) <= BLOCK_TEXTS:
        yield range(len(texts))
        return
    order = _equal_texts_together(texts)
    for start in range(0, len(texts), BLOCK_TEXTS):
        end = min(start + BLOCK_TEXTS, len(texts))
        yield range(start, end) if order is None else order[start:end].tolist()


def _equal_texts_together(texts: list[str]) -> np.ndarray | None:
    """Rows in the order of each text's first row; None if all texts are distinct."""
    hashes = np.fromiter(map(hash, texts), dtype=np.int64, count=len(texts))
    by_hash = hashes.argsort(kind="stable")
    hashes = hashes[by_hash]
    is_first = np.append(True, hashes[1:] != hashes[:-1])
    if is_first.all():
        return None
    first_rows = by_hash[is_first][is_first.cumsum() - 1]
    return by_hash[first_rows.argsort(kind="stable")]


def _log_reading(
    reading: Reading, n_texts: int, layer: int, began: float, level: int = logging.INFO
) -> None:
    """Log what was read, and how many texts had kept states."""
    seconds, n_read = time.monotonic() - began, reading.n_read
    log(
        logger,
        level if n_read else logging.DEBUG,
        "Read %d texts, %d tokens, up to layer %d in %.1f s; the states of %d texts were kept",
        *(n_read, reading.n_tokens, layer, seconds, max(0, n_texts - n_read)),
    )


def _check_bytes(name: str, value: float) -> float:
    if not isinstance(value, Real) or not value >= 0:
        raise ValueError(f"{name} must be a number of bytes, 0 or more, got {value!r}.")
    return value


def _shards_of(contents: Contents, texts: list[str], collection: str) -> set[Shard]:
    """Shards of a collection that hold states of these texts."""
    entries = contents.index(collection).entries
    keys = [text_key(collection, text) for text in texts]
    with contents.lock:
        return {entries[key].holder for key in keys if key in entries}

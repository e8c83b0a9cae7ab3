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
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm

from sklearn_relish.backbone import FrozenLLM
from sklearn_relish.shards import KEY_BYTES, Shard
from sklearn_relish.shelf import SHARD_BYTES, Shelf
from sklearn_relish.states import TokenStates
from sklearn_relish.temporary import temporary_folder

MAX_MEMORY = 2 * 2**30
PIECE_TEXTS = 256  # texts that a process claims at first, and twice as many each time while they
PIECE_SECONDS = 5.0  # are read in less than this
POLL_SECONDS = 0.2  # between looks at what other processes are reading
SHELVES = "[0-9a-f]" * 32 + "/layer*-*-*/"


@dataclass
class _Contents:
    """What this process knows of one folder's states, or holds without a folder."""

    shelves: dict[str, Shelf] = field(default_factory=dict)
    hits: int = 0
    misses: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)


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
    max_memory : int, default=2 * 2**30
        Bytes of states that the process holds where there is no folder, 2 GiB. What comes after
        is written to the temporary folder. States in files are mapped, not held.
    max_bytes : int, default=None
        Bytes of states that are kept in all. After a call that added some, the least recently
        used are removed until the rest is within the bound; what a call uses is there until it
        ends. None: no bound for a folder; `max_memory`, and half of what the disk of the temporary
        folder had free, where there is none.

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
        max_memory: int = MAX_MEMORY,
        max_bytes: int | None = None,
    ) -> None:
        if isinstance(folder, joblib.Memory):
            folder = folder.location and Path(folder.location, "sklearn_relish")
        self.folder = None if folder is None else Path(os.path.abspath(folder))
        self.max_memory = max_memory
        self.max_bytes = max_bytes

    def __repr__(self) -> str:
        given = [] if self.folder is None else [repr(os.fspath(self.folder))]
        given += [f"max_memory={self.max_memory}"] if self.max_memory != MAX_MEMORY else []
        given += [f"max_bytes={self.max_bytes}"] if self.max_bytes is not None else []
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
        self, texts: list[str], llm: FrozenLLM, *, layer: int, max_length: int, progress: bool
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
        max_length : int
            Tokens of a text that are read.
        progress : bool
            Whether a bar counts the texts that are read.

        Returns
        -------
        TokenStates
            In the model's dtype, on the CPU.

        Warns
        -----
        UserWarning
            If texts were cut; if files of the store were damaged, or states could not be written,
            after either of which the work goes on; if a worker process reads texts that it can't
            share.
        """
        name = f"{llm.fingerprint}/layer{layer}-{_dtype_name(llm)}-{max_length}"
        keys = [_key(name, text) for text in texts]
        contents = self._contents
        with contents.lock:
            shelf = self._shelf(name)
            wanted = dict(zip(keys, texts, strict=True))
            missing = self._lacking(shelf, wanted)
            n_read = 0
            if missing:
                n_read = self._read(shelf, missing, llm, layer, max_length, progress)
            contents.hits += len(wanted) - n_read
            contents.misses += n_read
            states = shelf.states(keys)
            full_lengths = np.array([shelf.entries[key].full_length for key in keys])
            _mark_used({shelf.entries[key].shard for key in keys})
            if n_read:
                shelf.merge_small()
                self._evict()
        cut = full_lengths > states.lengths.numpy()
        if cut.any():
            warnings.warn(
                f"{cut.sum()} of {len(texts)} texts are longer than max_length={max_length} tokens"
                f" or the model's window and were cut; the longest has {full_lengths.max()}.",
                UserWarning,
                stacklevel=4,
            )
        return states

    def info(self) -> list[dict[str, Any]]:
        """What the store holds: a dict for each model, layer, dtype and `max_length`.

        Returns
        -------
        list of dict
            With the keys ``model``, ``layer``, ``dtype``, ``max_length``, ``n_texts``, ``n_bytes``
            and ``fingerprint``, which tells apart models of one name.
        """
        rows = []
        with self._contents.lock:
            for name, shelf in self._all_shelves().items():
                for shard in islice(shelf.shards, 1):
                    rows.append(
                        {
                            "model": shard.label["model"],
                            "layer": int(shard.label["layer"]),
                            "dtype": shard.label["dtype"],
                            "max_length": int(shard.label["max_length"]),
                            "n_texts": len(shelf.entries),
                            "n_bytes": sum(shard.n_bytes for shard in shelf.shards),
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
                        chosen = shard.label["model"] in (os.fspath(model), os.path.abspath(model))
                    if chosen:
                        shelf.remove(shard)

    @property
    def _contents(self) -> _Contents:
        with _known_lock:
            return _known.setdefault(self.folder, _Contents())

    def _shelf(self, name: str) -> Shelf:
        folder = None if self.folder is None else self.folder / name
        return self._contents.shelves.setdefault(name, Shelf(folder))

    def _all_shelves(self) -> dict[str, Shelf]:
        """Those included that other processes have made; new files are found."""
        if self.folder is not None:
            for path in sorted(self.folder.glob(SHELVES)):
                self._warn_damaged(self._shelf(os.fspath(path.relative_to(self.folder))).look())
        return self._contents.shelves

    def _lacking(self, shelf: Shelf, wanted: dict[bytes, str]) -> dict[bytes, str]:
        """What a shelf lacks of texts by key, once what is new is found and what is broken gone."""
        self._warn_damaged(shelf.look() + shelf.verify(wanted))
        return {key: text for key, text in wanted.items() if key not in shelf.entries}

    def _read(
        self,
        shelf: Shelf,
        missing: dict[bytes, str],
        llm: FrozenLLM,
        layer: int,
        max_length: int,
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
        with tqdm(total=n_all, desc="Reading texts", unit="text", disable=not progress) as bar:
            while missing:
                with ExitStack() as claim:
                    piece = self._claim(shelf, missing, n_piece, claim)
                    began = time.monotonic()
                    self._read_piece(shelf, piece, llm, layer, max_length, bar)
                    if time.monotonic() - began < PIECE_SECONDS:
                        n_piece *= 2
                    n_read += len(piece)
                n_before = len(missing)
                missing = self._lacking(shelf, missing)
                if len(missing) == n_before:
                    time.sleep(POLL_SECONDS)
                bar.update(n_all - len(missing) - bar.n)
        return n_read

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
        except (OSError, NotImplementedError):  # no writing or no locks here: each for itself
            return missing
        return {key: missing[key] for key in piece}

    def _read_piece(
        self,
        shelf: Shelf,
        piece: dict[bytes, str],
        llm: FrozenLLM,
        layer: int,
        max_length: int,
        bar: tqdm,
    ) -> None:
        """Read texts and keep them, a shard at a time, and what was read when it is stopped."""
        if not piece:
            return
        keys = list(piece)
        label = {
            "model": llm.model,
            "layer": str(layer),
            "dtype": _dtype_name(llm),
            "max_length": str(max_length),
        }
        pending: list[tuple[np.ndarray, TokenStates, np.ndarray]] = []
        n_bytes = 0
        try:
            for batch in llm.read(list(piece.values()), layer=layer, max_length=max_length):
                pending.append(batch)
                n_bytes += batch[1].arrays[0].nbytes
                bar.update(len(batch[0]))
                if n_bytes >= self._shard_bytes:
                    self._keep(shelf, _shard(keys, pending, label))
                    pending, n_bytes = [], 0
        finally:
            if pending:
                self._keep(shelf, _shard(keys, pending, label))

    def _keep(self, shelf: Shelf, shard: Shard) -> None:
        """Put a shard into the folder; without one, or if it can't be written, into memory."""
        if shelf.folder is not None:
            try:
                shard = shard.save(shelf.folder)
            except (OSError, SafetensorError) as error:
                self._warn_unwritable(error, shelf.folder)
        shelf.add(shard)
        self._spill(shelf)

    def _spill(self, shelf: Shelf) -> None:
        """Move the least recently used of a shelf from memory to files until the rest fits."""
        excess = sum(other.memory_bytes for other in self._contents.shelves.values())
        excess -= self.max_memory
        if excess <= 0:
            return
        held = [shard for shard in shelf.shards if shard.path is None]
        held.sort(key=lambda shard: shard.last_used, reverse=True)
        try:
            folder = temporary_folder().path
            while held and excess > 0:
                group = [held.pop()]
                while held and sum(shard.n_bytes for shard in group) < self._shard_bytes:
                    group.append(held.pop())
                merged = Shard.merged(group)
                shelf.add(merged.save(folder))  # which takes the place of the group
                excess -= merged.n_bytes
        except (OSError, SafetensorError) as error:
            self._warn_unwritable(error, tempfile.gettempdir())

    @property
    def _shard_bytes(self) -> int:
        """States gathered before a shard is made: less than SHARD_BYTES if little may be held."""
        return SHARD_BYTES if self.folder else min(SHARD_BYTES, max(self.max_memory // 4, 2**20))

    def _evict(self) -> None:
        """Remove the least recently used shards beyond the bound."""
        bound = self.max_bytes
        shelves = self._contents.shelves if bound is None else self._all_shelves()
        n_bytes = sum(shelf.n_bytes for shelf in shelves.values())
        if bound is None:
            if self.folder is not None or n_bytes <= self.max_memory:
                return
            bound = self.max_memory + temporary_folder().max_bytes
        if n_bytes <= bound:
            return
        shards = []
        for shelf in shelves.values():
            for shard in list(shelf.shards):
                try:
                    used = shard.last_used if shard.path is None else shard.path.stat().st_mtime
                except OSError:  # another process has removed it
                    shelf.remove(shard)
                    continue
                shards.append((used, shard, shelf))
        n_bytes = sum(shelf.n_bytes for shelf in shelves.values())
        for _, shard, shelf in sorted(shards, key=lambda found: found[0]):
            if n_bytes <= bound:
                break
            shelf.remove(shard)
            n_bytes -= shard.n_bytes

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
    def _warn_unwritable(error: Exception, folder: str | os.PathLike[str]) -> None:
        warnings.warn(
            f"Token states could not be written to {os.fspath(folder)} ({error}): they stay in"
            " memory, and are lost with this process.",
            UserWarning,
            stacklevel=6,
        )


def open_store(memory: str | os.PathLike[str] | joblib.Memory | StateStore | None) -> StateStore:
    """The store that an estimator's `memory` stands for."""
    return memory if isinstance(memory, StateStore) else StateStore(memory)


def _mark_used(shards: set[Shard]) -> None:
    for shard in shards:
        shard.last_used = time.time()
        if shard.path is not None:
            with suppress(OSError):  # gone, or not ours to touch
                os.utime(shard.path)


def _shard(
    keys: list[bytes], batches: list[tuple[np.ndarray, TokenStates, np.ndarray]], label: dict
) -> Shard:
    """What a model has read, as one shard."""
    return Shard(
        states=torch.cat([states.arrays[0] for _, states, _ in batches]),
        lengths=torch.cat([states.lengths for _, states, _ in batches]),
        full_lengths=torch.from_numpy(np.concatenate([full for _, _, full in batches])),
        keys=torch.frombuffer(
            bytearray(b"".join(keys[row] for rows, _, _ in batches for row in rows)),
            dtype=torch.uint8,
        ).view(-1, KEY_BYTES),
        label=label,
    )


def _dtype_name(llm: FrozenLLM) -> str:
    return str(llm.torch_dtype).removeprefix("torch.")


def _key(name: str, text: str) -> bytes:
    return hashlib.blake2b(f"{name}/{text}".encode(), digest_size=KEY_BYTES).digest()

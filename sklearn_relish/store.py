"""The store of token states: each text is read once, whatever asks for it again.

A text's states are kept under the text and all that changes them (model, layer, dtype, length),
never under the array that the text came in. Without a folder the states live in this process;
with one they also live on disk as shards, immutable safetensors files that other processes and
later days read by memory map.
"""

from __future__ import annotations

import hashlib
import os
import threading
import uuid
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from joblib import Memory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sklearn_relish.backbone import FrozenLLM
from sklearn_relish.states import TokenStates

SHARD_BYTES = 64 * 2**20  # states gathered before a shard is written
DIGEST_BYTES = 16

# What FrozenLLM.read yields: rows, their states, their lengths before the cut.
Batch = tuple[np.ndarray, TokenStates, np.ndarray]


class Entry(NamedTuple):
    """Where a text's states lie: a shard, the place in it, and the text's uncut length."""

    shard: int
    row: int
    full_length: int


class StateStore:
    """Token states of texts, read once by a model and found again by text.

    Parameters
    ----------
    folder : str or Path, default=None
        Where the states are kept on disk. None: in this process alone.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._lock = threading.RLock()
        self._shards: list[TokenStates] = []
        self._entries: dict[bytes, Entry] = {}
        self._seen_files: set[str] = set()

    def fetch(
        self, texts: list[str], llm: FrozenLLM, *, layer: int, max_length: int, progress: bool
    ) -> TokenStates:
        """States of texts, in their order; what the store lacks is read by the model and kept.

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
            Once, with their number, if texts were cut.
        """
        space = f"{llm.fingerprint}/layer{layer}-{dtype_name(llm.torch_dtype)}-{max_length}"
        keys = [_key(space, text) for text in texts]
        with self._lock:
            self._open_new_shards(space)
            missing = {
                key: text for key, text in zip(keys, texts, strict=True) if key not in self._entries
            }
            if missing:
                batches = llm.read(
                    list(missing.values()), layer=layer, max_length=max_length, progress=progress
                )
                self._add(space, list(missing), batches)
            entries = [self._entries[key] for key in keys]
            states = self._gather(entries)
        full_lengths = np.array([entry.full_length for entry in entries])
        cut = full_lengths > states.lengths.numpy()
        if cut.any():
            warnings.warn(
                f"{cut.sum()} of {len(texts)} texts are longer than max_length={max_length} tokens"
                f" or the model's window and were cut; the longest has {full_lengths.max()}.",
                UserWarning,
                stacklevel=4,
            )
        return states

    def _add(self, space: str, keys: list[bytes], batches: Iterator[Batch]) -> None:
        """Keep what a model reads, a shard at a time, and what it had read when it is stopped."""
        pending: list[Batch] = []
        size = 0
        try:
            for batch in batches:
                pending.append(batch)
                size += batch[1].values.nbytes
                if size >= SHARD_BYTES:
                    self._add_shard(space, keys, pending)
                    pending, size = [], 0
        finally:
            if pending:
                self._add_shard(space, keys, pending)

    def _add_shard(self, space: str, keys: list[bytes], batches: list[Batch]) -> None:
        shard = {
            "states": torch.cat([states.values for _, states, _ in batches]),
            "lengths": torch.cat([states.lengths for _, states, _ in batches]),
            "full_lengths": torch.from_numpy(np.concatenate([full for _, _, full in batches])),
            "keys": torch.frombuffer(
                bytearray(b"".join(keys[row] for rows, _, _ in batches for row in rows)),
                dtype=torch.uint8,
            ).view(-1, DIGEST_BYTES),
        }
        path = None if self.folder is None else self._write(space, shard)
        self._index(shard if path is None else self._open(path))  # a file needs no memory

    def _index(self, shard: dict[str, Tensor]) -> None:
        states = TokenStates.from_lengths(shard["states"], shard["lengths"])
        keys = shard["keys"].numpy().tobytes()
        for row, full_length in enumerate(shard["full_lengths"].tolist()):
            key = keys[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES]
            self._entries[key] = Entry(len(self._shards), row, full_length)
        self._shards.append(states)

    def _gather(self, entries: list[Entry]) -> TokenStates:
        """States of entries; copied, each text once, unless all lie in one shard."""
        shards = np.array([entry.shard for entry in entries])
        rows = torch.tensor([entry.row for entry in entries])
        first, *others = np.unique(shards).tolist()
        if not others:
            return self._shards[first][rows]
        parts, places, offset = [], torch.empty(len(entries), dtype=torch.int64), 0
        for shard in (first, *others):
            here = torch.from_numpy(np.flatnonzero(shards == shard))
            unique, place = rows[here].unique(return_inverse=True)
            parts.append(self._shards[shard][unique].compact())
            places[here] = offset + place
            offset += len(unique)
        values = torch.cat([part.values for part in parts])
        lengths = torch.cat([part.lengths for part in parts])
        return TokenStates.from_lengths(values, lengths)[places]

    @staticmethod
    def _open(path: Path) -> dict[str, Tensor]:
        """A shard as it lies on disk, by memory map."""
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def _write(self, space: str, shard: dict[str, Tensor]) -> Path | None:
        """Write a shard so that it is there whole or not at all; None if it can't be written."""
        folder = self.folder / space
        name = f"{uuid.uuid4().hex}.safetensors"
        partial = folder / f".{name}.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(shard, partial)
            partial.rename(folder / name)
            self._seen_files.add(name)
            return folder / name
        except (OSError, SafetensorError) as error:
            warnings.warn(
                f"Token states could not be written to {folder} ({error}): they stay in memory,"
                " and are lost with this process.",
                UserWarning,
                stacklevel=7,
            )
            with suppress(OSError):
                partial.unlink()
            return None

    def _open_new_shards(self, space: str) -> None:
        """Find the shards that other processes, or earlier days, have written."""
        if self.folder is None:
            return
        for path in sorted((self.folder / space).glob("*.safetensors")):
            if path.name in self._seen_files:
                continue
            self._seen_files.add(path.name)
            try:
                self._index(self._open(path))
            except (OSError, SafetensorError) as error:
                warnings.warn(
                    f"{path} can't be read ({error}): its texts are read again by the model. Remove"
                    " the file.",
                    UserWarning,
                    stacklevel=5,
                )


_stores: dict[str | None, StateStore] = {}
_stores_lock = threading.Lock()


def shared_store(memory: str | os.PathLike[str] | Memory | None) -> StateStore:
    """The process's one store of a folder, or of no folder.

    Parameters
    ----------
    memory : None, str, path or joblib.Memory
        A `joblib.Memory` stands for a folder within its location.
    """
    if isinstance(memory, Memory):
        memory = None if memory.location is None else Path(memory.location, "sklearn_relish")
    folder = None if memory is None else os.path.abspath(memory)
    with _stores_lock:
        return _stores.setdefault(folder, StateStore(folder))


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _key(space: str, text: str) -> bytes:
    return hashlib.blake2b(f"{space}/{text}".encode(), digest_size=DIGEST_BYTES).digest()

"""Shards: some texts' token states with their index, in memory or as one safetensors file.

A file is written whole under another name, takes its own by renaming, and never changes after; it
carries the checksums of its index, looked at when it is opened, and of its states, looked at when
they are first used. It is read by memory map. Measured against LMDB and against an index in SQLite
in `benchmarks/storage.py`; unlike those, it serves on a network folder too.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sklearn_relish.states.token_states import unpack_states
from sklearn_relish.utils.files import check_no_links, open_regular

KEY_BYTES = 16
HEADER_BYTES = 2**20  # a safetensors header of this package has less than a thousand
MAX_TEXTS = 2**23  # in a file: the index of more is not read into memory
CHECK_BYTES = 16 * 2**20  # states that are checked at once
SMALL_BYTES = 4 * 2**20  # files of less are read, not mapped
INDEX = ("keys", "lengths", "full_lengths")
LABEL = ("model", "layer", "dtype", "max_length")


class DamagedShardError(Exception):
    """A file that is not what was written."""


class Entry(NamedTuple):
    """Where a text's states lie, and how many tokens it had before it was cut."""

    shard: Shard
    start: int
    length: int
    full_length: int


@dataclass(eq=False)
class Shard:
    """Token states of some texts and what is needed to find them.

    Parameters
    ----------
    states : Tensor of shape (n_tokens, D)
        Text after text; or packed, see `pack_states`.
    lengths, full_lengths : int64 Tensor of shape (n_texts,)
        Tokens of each text, and what they were before the cut.
    keys : uint8 Tensor of shape (n_texts, KEY_BYTES)
    label : dict of str
        What the states are of, for people.
    path : Path, default=None
        The file that the tensors are mapped from. None: they lie in memory.
    states_checksum : str, default=None
        What the states must agree with; None once they have been seen to.
    file_bytes : int, default=0
        Size of the file.
    last_used : float, default=now
        Seconds since the epoch; of a file, its time of change.
    """

    states: Tensor
    lengths: Tensor
    full_lengths: Tensor
    keys: Tensor
    label: dict[str, str]
    path: Path | None = None
    states_checksum: str | None = None
    file_bytes: int = 0
    last_used: float = field(default_factory=time.time)

    @classmethod
    def open(cls, path: Path, *, map_small: bool = False) -> Shard:
        """A shard of a file, whose states are mapped.

        Those of a small file are read instead, for it may be merged away, and on a network its
        mapping would end with it; unless `map_small` says that it stays.

        Raises
        ------
        DamagedShardError
            If the file is no shard, or its index is not what was written.
        OSError
            If it can't be read.
        """
        try:
            _check_header(path)
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in ("states", *INDEX)}
        except SafetensorError as error:
            raise DamagedShardError(str(error)) from error
        except (RuntimeError, MemoryError) as error:  # torch opens the file a second time
            raise OSError(str(error)) from error
        index = {name: tensors[name].clone() for name in INDEX}  # small, and of constant use
        if metadata.pop("index_checksum", None) != checksum(index, metadata):
            raise DamagedShardError("its index does not agree with its checksum")
        states = tensors["states"]
        if not (metadata.keys() >= {"states_checksum", *LABEL} and _fits(states, **index)):
            raise DamagedShardError("it is not laid out as a shard")
        status = path.stat()
        return cls(
            **index,
            states=states if map_small or states.nbytes >= SMALL_BYTES else states.clone(),
            states_checksum=metadata.pop("states_checksum"),
            label=metadata,
            path=path,
            file_bytes=status.st_size,
            last_used=status.st_mtime,
        )

    def save(self, path: Path, *, map_small: bool = False) -> Shard:
        """The same shard in a file, which is complete or absent at any moment.

        It is opened as by `open`.

        Raises
        ------
        OSError
            If it can't be written; nothing is left of it then.
        """
        folder = path.parent
        index = {name: getattr(self, name) for name in INDEX}
        metadata = self.label | {"states_checksum": checksum({"states": self.states})}
        metadata["index_checksum"] = checksum(index, metadata)
        partial = folder / f".{path.stem}.partial"  # a folder, for save_file leaves files if killed
        check_no_links(folder, n_parents=1)
        try:
            partial.mkdir(parents=True)
            save_file(index | {"states": self.states}, partial / path.name, metadata)
            # It makes them its writer's alone: whoever may use the folder may use its files.
            os.chmod(partial / path.name, stat.S_IMODE(folder.stat().st_mode) & 0o666)
            os.utime(partial / path.name, (self.last_used, self.last_used))
            (partial / path.name).rename(path)
            saved = Shard.open(path, map_small=map_small)
        except (SafetensorError, DamagedShardError) as error:
            raise OSError(str(error)) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        saved.states_checksum = None  # these are the bytes that the checksum was made of
        return saved

    @classmethod
    def merged(cls, shards: list[Shard]) -> Shard:
        """One shard in memory with the texts of several."""
        tensors = {
            name: torch.cat([getattr(shard, name) for shard in shards])
            for name in ("states", *INDEX)
        }
        last_used = max(shard.last_used for shard in shards)
        return cls(**tensors, label=shards[0].label, last_used=last_used)

    @property
    def n_bytes(self) -> int:
        """Size of the states."""
        return self.states.nbytes

    def entries(self) -> Iterator[tuple[bytes, Entry]]:
        """Each text's key, and where its states lie."""
        starts = self.lengths.cumsum(0) - self.lengths
        places = (starts.tolist(), self.lengths.tolist(), self.full_lengths.tolist())
        for key, *place in zip(self.text_keys(), *places, strict=True):
            yield key, Entry(self, *place)

    def text_keys(self) -> list[bytes]:
        """The keys of the texts, in their order."""
        return split_keys(self.keys.numpy().tobytes())

    def is_whole(self) -> bool:
        """Whether the states are those that were written.

        Their checksum is looked at once, and the size of a file each time, since a mapped file
        that was cut short ends the process that reads on. States that are not finite, or zeros
        throughout as in a sparse file, are none that a model gave.

        Raises
        ------
        FileNotFoundError
            If the file is gone.
        """
        if self.path is not None:
            status = self.path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_size != self.file_bytes:
                return False
        expected = self.states_checksum
        if expected is not None:
            if not all(map(_is_plausible, self._parts())):
                return False
            if checksum({"states": self.states}) != expected:
                return False
            self.states_checksum = None
        return True

    def _parts(self) -> tuple[Tensor, ...]:
        """The states in parts of some MiB."""
        row_bytes = self.states.shape[1] * self.states.element_size()
        return self.states.split(max(1, CHECK_BYTES // row_bytes))


def _check_header(path: Path) -> None:
    """Refuse what is no regular file, or too large in places to be a shard, before it is mapped."""
    with open_regular(path) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        n_header = int.from_bytes(file.read(8), "little")
        if not 0 < n_header <= min(HEADER_BYTES, n_bytes - 8):
            raise DamagedShardError("its header is not that of a shard")
        try:
            header = json.loads(file.read(n_header))
            n_tokens, width = header["states"]["shape"]
            n_texts, _ = header["keys"]["shape"]
            fits = 0 < n_texts <= min(MAX_TEXTS, n_tokens) and width > 0
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedShardError("its header is not that of a shard") from error
    if not fits:
        raise DamagedShardError("it is not laid out as a shard")


def _is_plausible(states: Tensor) -> bool:
    """Whether states can be a model's: finite, and not zero throughout."""
    if not states.any():
        return False
    return bool((unpack_states(states) if states.dtype == torch.uint8 else states).isfinite().all())


def _fits(states: Tensor, keys: Tensor, lengths: Tensor, full_lengths: Tensor) -> bool:
    """Whether tensors can be a shard's."""
    return (
        states.ndim == 2
        and (states.is_floating_point() or (states.dtype == torch.uint8 and states.shape[1] > 4))
        and keys.dtype == torch.uint8
        and lengths.dtype == full_lengths.dtype == torch.int64
        and keys.shape == (len(lengths), KEY_BYTES)
        and lengths.shape == full_lengths.shape
        and bool(((lengths > 0) & (lengths <= len(states)) & (lengths <= full_lengths)).all())
        and int(lengths.sum()) == len(states)  # of lengths so small the sum can't overflow
    )


def split_keys(joined: bytes) -> list[bytes]:
    """Keys that lie one after the other."""
    return [joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES)]


def checksum(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """CRC-32 of tensors, with their names, shapes and dtypes, and of what is said of them."""
    value = zlib.crc32(repr(sorted((metadata or {}).items())).encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().reshape(-1), value)
    return f"{value:08x}"

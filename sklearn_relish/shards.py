"""Shards: some texts' token states with their index, in memory or as one safetensors file.

A file is written whole under another name, takes its own by renaming, and never changes after; it
carries the checksums of its index, looked at when it is opened, and of its states, looked at when
they are first used. It is read by memory map. Measured against LMDB and against an index in SQLite
in `benchmarks/storage.py`; unlike those, it serves on a network folder too.
"""

from __future__ import annotations

import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

KEY_BYTES = 16
INDEX = ("keys", "lengths", "full_lengths")
SUFFIX = ".safetensors"


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
        Text after text.
    lengths, full_lengths : int64 Tensor of shape (n_texts,)
        Tokens of each text, and what they were before the cut.
    keys : uint8 Tensor of shape (n_texts, KEY_BYTES)
    label : dict of str
        What the states are of, for people.
    path : Path, default=None
        The file that the tensors are mapped from. None: they lie in memory.
    states_checksum : str, default=None
        What the states must agree with; None once they have been seen to.
    """

    states: Tensor
    lengths: Tensor
    full_lengths: Tensor
    keys: Tensor
    label: dict[str, str]
    path: Path | None = None
    states_checksum: str | None = None
    last_used: float = field(default_factory=time.time)

    @classmethod
    def open(cls, path: Path) -> Shard:
        """A shard of a file.

        Raises
        ------
        DamagedShardError
            If the file is no shard, or its index is not what was written.
        OSError
            If it can't be read.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in ("states", *INDEX)}
        except SafetensorError as error:
            raise DamagedShardError(str(error)) from error
        index = {name: tensors[name].clone() for name in INDEX}  # small, and of constant use
        if metadata.pop("index_checksum", None) != checksum(index, metadata):
            raise DamagedShardError("its index does not agree with its checksum")
        return cls(
            **index,
            states=tensors["states"],
            states_checksum=metadata.pop("states_checksum"),
            label=metadata,
            path=path,
            last_used=path.stat().st_mtime,
        )

    def save(self, folder: Path) -> Shard:
        """The same shard in a file of a folder, where it is whole or absent at any moment.

        Raises
        ------
        OSError, safetensors.SafetensorError
            If it can't be written; nothing is left of it then.
        """
        index = {name: getattr(self, name) for name in INDEX}
        metadata = self.label | {"states_checksum": checksum({"states": self.states})}
        metadata["index_checksum"] = checksum(index, metadata)
        path = folder / f"{uuid.uuid4().hex}{SUFFIX}"
        partial = folder / f".{path.name}.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(index | {"states": self.states}, partial, metadata)
            partial.rename(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
        saved = Shard.open(path)
        saved.states_checksum = None  # these are the bytes that the checksum was made of
        return saved

    @classmethod
    def merged(cls, shards: list[Shard]) -> Shard:
        """One shard in memory with the texts of several."""
        tensors = {
            name: torch.cat([getattr(shard, name) for shard in shards])
            for name in ("states", *INDEX)
        }
        return cls(**tensors, label=shards[0].label)

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
        joined = self.keys.numpy().tobytes()
        return [joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES)]

    def is_whole(self) -> bool:
        """Whether the states are those that were written; looked at once."""
        if self.states_checksum is not None:
            if checksum({"states": self.states}) != self.states_checksum:
                return False
            self.states_checksum = None
        return True


def checksum(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """CRC-32 of tensors, with their names, shapes and dtypes, and of what is said of them."""
    value = zlib.crc32(repr(sorted((metadata or {}).items())).encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().reshape(-1), value)
    return f"{value:08x}"

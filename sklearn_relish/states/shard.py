"""Shards: token states of texts with their index, in memory or as one safetensors file.

A file is written under another name, renamed when it is complete, and never changed afterwards. The
checksum of the index is checked when the file is opened, the checksum of the states when they are
first used. A file is read by memory map. `benchmarks/storage.py` compares it with LMDB and
with an index in SQLite; unlike those, it also works on a network folder.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import starmap
from pathlib import Path
from typing import BinaryIO, Generic, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sklearn_relish.states.pairs import N_PAIR_VECTORS, NO_MATCH
from sklearn_relish.states.quantization import n_rows, quantizer_of, state_size
from sklearn_relish.states.vectors import N_VECTORS
from sklearn_relish.utils.files import check_no_links, open_regular

KEY_BYTES = 16
HEADER_BYTES = 2**20  # bound of a safetensors header; this package writes less than 1,000 bytes
MAX_TEXTS = 2**23  # bound of a file's texts, whose index is read into memory
CHECK_BYTES = 16 * 2**20  # states that are checked at once
SMALL_BYTES = 4 * 2**20  # smaller files are read, not mapped
VALUES = ("states", "vectors", "matches")
INDEX = ("keys", "lengths", "full_lengths")
LABEL = ("model", "layer", "dtype", "max_length")


class DamagedShardError(Exception):
    """A shard that is not what was written."""


class _Values:
    """What shards and states in memory have in common; see `Shard`."""

    states: Tensor
    vectors: Tensor
    matches: Tensor

    @property
    def n_bytes(self) -> int:
        """Size of states, vectors and matches."""
        return self.states.nbytes + self.vectors.nbytes + self.matches.nbytes

    @property
    def kind(self) -> tuple[int, bool]:
        """What merged texts must share: the number of vectors, and whether they are pairs."""
        return self.vectors.shape[1], len(self.matches) > 0


@dataclass(eq=False)
class MemoryStates(_Values):
    """Token states and vectors in memory that belong to no shard; see `Shard` for their shapes."""

    states: Tensor
    vectors: Tensor
    matches: Tensor


Holder = TypeVar("Holder", bound="Shard | MemoryStates", covariant=True)


class Entry(NamedTuple, Generic[Holder]):
    """Where a text's states lie, and how many tokens it had before it was cut.

    `number` is the position of the text among those of its holder, `first_token` that of its first
    token among the tokens of all of them.
    """

    holder: Holder
    number: int
    first_token: int
    start: int
    length: int
    full_length: int


@dataclass(eq=False)
class Shard(_Values):
    """Token states of texts, and the index that finds them.

    Parameters
    ----------
    states : Tensor of shape (n_tokens, D)
        Text after text; or quantized, see `quantization`.
    vectors : Tensor of shape (n_texts, n_vectors, D)
        Vectors of each text, see `vectors`; there may be none. They are never quantized.
    matches : int32 Tensor of shape (n_tokens, 1) or (0, 1)
        The match of each token, text after text, see `match_tokens`; none if the texts are not
        pairs.
    lengths, full_lengths : int64 Tensor of shape (n_texts,)
        Tokens of each text, and how many there were before the text was cut.
    keys : uint8 Tensor of shape (n_texts, KEY_BYTES)
    label : dict of str
        Model, layer, dtype and length of the states.
    path : Path, default=None
        The file that holds the states. None: they lie in memory.
    states_checksum : str, default=None
        Checksum that the states must have. None: they have been checked.
    file_bytes : int, default=0
        Size of the file.
    last_used : float, default=now
        When this process used the shard last, in seconds since the epoch; of a file that it has
        opened and not used, the file's modification time.
    """

    states: Tensor
    vectors: Tensor
    matches: Tensor
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
        """Open a file and map its states into memory.

        The states of a small file are read instead: merging may remove the file, and on a network
        folder its mapping would then fail. `map_small` maps them nevertheless.

        Raises
        ------
        DamagedShardError
            If the file is not a shard, or its index is not what was written.
        OSError
            If it can't be read.
        """
        try:
            _check_header(path)
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in (*VALUES, *INDEX)}
        except SafetensorError as error:
            raise DamagedShardError(str(error)) from error
        except (RuntimeError, MemoryError) as error:  # torch opens the file a second time
            raise OSError(str(error)) from error
        index = {name: tensors[name].clone() for name in INDEX}  # small, and often used
        if metadata.pop("index_checksum", None) != checksum(index, metadata):
            raise DamagedShardError("its index does not agree with its checksum")
        values = {name: tensors[name] for name in VALUES}
        if not (metadata.keys() >= {"states_checksum", *LABEL} and _fits(**values, **index)):
            raise DamagedShardError("it does not have the layout of a shard")
        if not map_small and tensors["states"].nbytes < SMALL_BYTES:
            values = {name: tensor.clone() for name, tensor in values.items()}
        status = path.stat()
        return cls(
            **values,
            **index,
            states_checksum=metadata.pop("states_checksum"),
            label=metadata,
            path=path,
            file_bytes=status.st_size,
            last_used=status.st_mtime,
        )

    def save(self, path: Path, *, map_small: bool = False) -> Shard:
        """Write the shard to a file and open it. The file appears complete or not at all.

        Raises
        ------
        OSError
            If it can't be written. Nothing is left of it then.
        """
        folder = path.parent
        index = {name: getattr(self, name) for name in INDEX}
        values = {name: getattr(self, name) for name in VALUES}
        metadata = self.label | {"states_checksum": checksum(values)}
        metadata["index_checksum"] = checksum(index, metadata)
        partial = folder / f".{path.stem}.partial"  # a folder: save_file leaves files if killed
        check_no_links(folder, n_parents=1)
        try:
            partial.mkdir(parents=True)
            save_file(index | values, partial / path.name, metadata)
            # save_file makes it the writer's alone, but all users of the folder may use its files.
            os.chmod(partial / path.name, stat.S_IMODE(folder.stat().st_mode) & 0o666)
            os.utime(partial / path.name, (self.last_used, self.last_used))
            (partial / path.name).rename(path)
            saved = Shard.open(path, map_small=map_small)
        except (SafetensorError, DamagedShardError) as error:
            raise OSError(str(error)) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        saved.states_checksum = None  # the states need no check: they were written just now
        return saved

    @classmethod
    def merged(cls, shards: list[Shard]) -> Shard:
        """One shard in memory with the texts of several shards."""
        return cls(
            states=torch.cat([shard.states for shard in shards]),
            vectors=torch.cat([shard.vectors for shard in shards]),
            matches=torch.cat([shard.matches for shard in shards]),
            lengths=torch.cat([shard.lengths for shard in shards]),
            full_lengths=torch.cat([shard.full_lengths for shard in shards]),
            keys=torch.cat([shard.keys for shard in shards]),
            label=shards[0].label,
            last_used=max(shard.last_used for shard in shards),
        )

    def entries(self) -> Iterator[tuple[bytes, Entry[Shard]]]:
        """Each text's key, and where its states lie."""
        rows = n_rows(self.states, self.lengths)
        columns = (
            self.lengths.cumsum(0) - self.lengths,
            rows.cumsum(0) - rows,
            self.lengths,
            self.full_lengths,
        )
        places = [column.tolist() for column in columns]
        for number, (key, *place) in enumerate(zip(self.text_keys(), *places, strict=True)):
            yield key, Entry(self, number, *place)

    def text_keys(self) -> list[bytes]:
        """The keys of the texts, in their order."""
        return split_keys(self.keys.numpy().tobytes())

    def mark_used(self) -> None:
        """Remember that the shard was used now, for other processes too."""
        self.last_used = time.time()
        if self.path is not None:
            with suppress(OSError):  # gone, or this process may not touch it
                os.utime(self.path)

    def used_at(self) -> float:
        """When this or another process used the shard last, in seconds since the epoch."""
        if self.path is not None:
            with suppress(OSError):
                return self.path.lstat().st_mtime
        return self.last_used

    def is_intact(self) -> bool:
        """Whether the states are those that were written.

        Their checksum is computed once. The size of a file is checked each time, since reading
        beyond the end of a mapped file ends the process. States that are not finite, or that are
        all zero as in a sparse file, can't be a model's, and neither can their vectors. A match is
        a token of the same text.

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
            if not (all(starmap(_is_plausible, self._parts())) and self.vectors.isfinite().all()):
                return False
            if len(self.matches):
                bounds = self.lengths.repeat_interleave(self.lengths)[:, None]
                if not ((self.matches >= NO_MATCH) & (self.matches < bounds)).all():
                    return False
            if checksum({name: getattr(self, name) for name in VALUES}) != expected:
                return False
            self.states_checksum = None
        return True

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The states in parts of some MiB, and the lengths of their texts."""
        rows = n_rows(self.states, self.lengths)
        row_bytes = self.states.shape[1] * self.states.element_size()
        numbers = (rows.cumsum(0) - 1) * row_bytes // CHECK_BYTES
        counts = numbers.unique_consecutive(return_counts=True)[1].tolist()
        sizes = [int(part.sum()) for part in rows.split(counts)]
        return zip(self.states.split(sizes), self.lengths.split(counts), strict=True)


def _check_header(path: Path) -> None:
    """Refuse a file that is not regular, or whose header can't be a shard's, before mapping it."""
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
        raise DamagedShardError("it does not have the layout of a shard")


def open_states(path: Path) -> tuple[BinaryIO, int]:
    """Open a shard's file, and find the position at which its states begin.

    Raises
    ------
    OSError
        If it can't be opened.
    """
    file = open_regular(path)
    n_header = int.from_bytes(file.read(8), "little")
    begin, _ = json.loads(file.read(n_header))["states"]["data_offsets"]
    return file, 8 + n_header + begin


def _is_plausible(states: Tensor, lengths: Tensor) -> bool:
    """Whether states can be a model's: they are finite, and not all zero."""
    if not states.any():
        return False
    form = quantizer_of(states)
    return bool(states.isfinite().all()) if form is None else form.is_finite(states, lengths)


def _fits(
    states: Tensor,
    vectors: Tensor,
    matches: Tensor,
    keys: Tensor,
    lengths: Tensor,
    full_lengths: Tensor,
) -> bool:
    """Whether tensors can be a shard's."""
    return (
        states.ndim == 2
        and (states.is_floating_point() or quantizer_of(states) is not None)
        and state_size(states) > 0
        and vectors.ndim == 3
        and vectors.shape[1] in (0, N_VECTORS, N_VECTORS + N_PAIR_VECTORS)
        and vectors.is_floating_point()
        and (len(vectors), vectors.shape[2]) == (len(lengths), state_size(states))
        and keys.dtype == torch.uint8
        and lengths.dtype == full_lengths.dtype == torch.int64
        and keys.shape == (len(lengths), KEY_BYTES)
        and lengths.shape == full_lengths.shape
        and bool(((lengths > 0) & (lengths <= len(states)) & (lengths <= full_lengths)).all())
        and int(n_rows(states, lengths).sum()) == len(states)  # no overflow, as each is small
        and matches.dtype == torch.int32
        and matches.shape in ((0, 1), (int(lengths.sum()), 1))
    )


def split_keys(joined: bytes) -> list[bytes]:
    """Split joined keys."""
    return [joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES)]


def checksum(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """CRC-32 of tensors with their names, shapes and dtypes, and of their metadata."""
    value = zlib.crc32(repr(sorted((metadata or {}).items())).encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().reshape(-1).data, value)
    return f"{value:08x}"

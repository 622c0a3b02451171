"""The file around the tensors: magic, version, a directory of names, shapes and checksums, then the tensors' bytes."""

from __future__ import annotations

import contextlib
import json
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lightning_compress.packing.stream import PackedFileError
from lightning_compress.packing.tensors import DTYPES, tensor_bytes

__all__ = ["Directory", "Entry", "open_packed", "write_head"]

MAGIC, VERSION = b"LCPK", 1
HEAD = struct.Struct("<4sBII")  # magic, version, bytes of the directory, their CRC-32
LARGEST_DIRECTORY = (
    1 << 24
)  # bytes of its text, which may take 25 times that in memory; enough for 100 thousand tensors
MOST_DIMENSIONS, MOST_LEVELS = 64, 64
LARGEST_DIMENSION = 2**63 - 1


@dataclass(frozen=True)
class Entry:
    """A tensor of the directory.

    Args:
        name: its key in the state dict.
        dtype: one of DTYPES.
        shape: of the whole tensor.
        sizes: bytes in the file, of each level.
        crcs: CRC-32 of the tensor's own bytes, little endian, of each level.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    crcs: tuple[int, ...]


@dataclass(frozen=True)
class Directory:
    """What a file says it has.

    Args:
        entries: the tensors, in the order of their bytes.
        same: further keys, and the tensor each is tied to.
    """

    entries: tuple[Entry, ...]
    same: dict[str, str]

    @property
    def levels(self) -> int:
        """Number of versions of the model."""
        return max((len(entry.sizes) for entry in self.entries), default=1)

    @property
    def claimed_bytes(self) -> int:
        """Bytes of all tensors once they are unpacked."""
        return sum(tensor_bytes(entry.dtype, entry.shape) for entry in self.entries)


def write_head(file: BinaryIO, directory: Directory) -> None:
    """Write all that stands before the tensors' bytes.

    Raises:
        ValueError: it is larger than `open_packed` reads.
    """
    rows = [[e.name, e.dtype, e.shape, e.sizes, e.crcs] for e in directory.entries]
    text = json.dumps([rows, directory.same], separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    if len(text) > LARGEST_DIRECTORY:
        raise ValueError(
            f"the names, shapes and checksums of {len(rows)} tensors take {len(text)} bytes, and a packed file has "
            f"{LARGEST_DIRECTORY} for them; write parts of the model to files of their own"
        )
    kept = zlib.compress(text, 9)
    file.write(HEAD.pack(MAGIC, VERSION, len(kept), zlib.crc32(kept)))
    file.write(kept)


@contextlib.contextmanager
def open_packed(path: str | Path) -> Iterator[tuple[Directory, BinaryIO]]:
    """Open a packed file at its first tensor, its directory read and checked: no memory is taken for a tensor yet.

    Raises:
        FileNotFoundError: nothing is at `path`.
        PackedFileError: no packed file, one of a newer version, cut, or with a directory that cannot be.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(HEAD.size)
        if len(head) < HEAD.size or head[:4] != MAGIC:
            raise PackedFileError(f"expected a packed file at {path}, got another kind; `pack` writes them")
        _, version, size, crc = HEAD.unpack(head)
        if version != VERSION:
            raise PackedFileError(
                f"{path} is of version {version}, and this package reads {VERSION}; update lightning-compress"
            )
        length = path.stat().st_size
        if size > min(LARGEST_DIRECTORY, length - HEAD.size):
            raise PackedFileError(f"{path} is cut within its directory, or changed; get it again")
        kept = file.read(size)
        if zlib.crc32(kept) != crc:
            raise PackedFileError(f"the directory of {path} has changed (its checksum differs); get it again")
        directory = _directory(kept, path)
        _check_length(directory, length - HEAD.size - size, path)
        yield directory, file


def _directory(kept: bytes, path: Path) -> Directory:
    try:
        inflating = zlib.decompressobj()
        text = inflating.decompress(kept, LARGEST_DIRECTORY)
        if not inflating.eof:
            raise PackedFileError(f"the directory of {path} does not end within {LARGEST_DIRECTORY} bytes")
        rows, same = json.loads(text)
        entries = tuple(Entry(*row) for row in rows)
        names = [_checked(entry).name for entry in entries]
        if len({len(entry.sizes) for entry in entries}) > 1:
            raise ValueError("tensors of different numbers of levels")
        tied = {str(key): str(name) for key, name in same.items()}
    except (zlib.error, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise PackedFileError(f"the directory of {path} cannot be read: {error}") from error
    if len({*names, *tied}) != len(names) + len(tied) or not set(tied.values()) <= set(names):
        raise PackedFileError(f"the directory of {path} names a tensor twice, or ties one to none")
    return Directory(
        tuple(Entry(e.name, e.dtype, tuple(e.shape), tuple(e.sizes), tuple(e.crcs)) for e in entries), tied
    )


def _checked(entry: Entry) -> Entry:
    whole = [*entry.shape, *entry.sizes, *entry.crcs]
    if len(entry.sizes) != len(entry.crcs) or not 1 <= len(entry.sizes) <= MOST_LEVELS:
        raise ValueError(f"no such levels: {entry}")
    if not isinstance(entry.name, str) or entry.dtype not in DTYPES or len(entry.shape) > MOST_DIMENSIONS:
        raise ValueError(f"no such tensor: {entry}")
    if (
        any(type(number) is not int or not 0 <= number <= LARGEST_DIMENSION for number in whole)
        or math.prod(entry.shape) >= 2**48
    ):
        raise ValueError(f"sizes that cannot be: {entry}")
    return entry


def _check_length(directory: Directory, left: int, path: Path) -> None:
    for entry in directory.entries:
        size = sum(entry.sizes)
        if size > left:
            raise PackedFileError(f"{path} is cut: '{entry.name}' has {left} of its {size} bytes; get it again")
        left -= size
    if left:
        raise PackedFileError(f"{path} has {left} bytes after its last tensor; it has changed, get it again")

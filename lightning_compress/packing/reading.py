"""Read a packed file back: all of it, tensor by tensor, into a module, or only what it says of itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor, nn

from lightning_compress.errors import CompressError
from lightning_compress.measure.entropy import entropy_bound_bytes
from lightning_compress.packing.layout import Directory, Entry, open_packed
from lightning_compress.packing.stream import PackedFileError
from lightning_compress.packing.tensors import Version, bits_of, checksum, ties_of, unpack_tensor, way_of

__all__ = ["PackedTensor", "load_packed", "packed_tensors", "unpack", "unpacked"]

_MOST_A_BYTE, _MOST_AT_LEAST = 1000, 1 << 30


def unpack(path: str | Path, level: int | None = None, most_bytes: int | None = None) -> dict[str, Tensor]:
    """Return the state dict of a packed file, on the CPU. Nothing is returned unless all of it is right.

    Args:
        path: the file.
        level: which version of the model, 0 the coarsest; None is the finest, or the only one.
        most_bytes: what all tensors together may take; None is 1 GiB and 1000 times the file.

    Raises:
        ImportError: a package of the `packed` extra is missing.
        FileNotFoundError: nothing is at `path`.
        ValueError: the file has no such level.
        PackedFileError: the file is cut, changed (with the tensor's name), newer, or claims too much.
    """
    return dict(unpacked(path, level, most_bytes))


def unpacked(path: str | Path, level: int | None = None, most_bytes: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a packed file one by one, as `unpack` has them; for models that fill the memory.

    Raises:
        ImportError, FileNotFoundError, ValueError, PackedFileError: as of `unpack`, but after the tensors before.
    """
    allowed = _MOST_AT_LEAST + _MOST_A_BYTE * Path(path).stat().st_size if most_bytes is None else most_bytes
    with open_packed(path) as (directory, file):
        if directory.claimed_bytes > allowed:
            raise PackedFileError(
                f"{path} claims {directory.claimed_bytes} bytes of tensors, and {allowed} are allowed; if you trust "
                f"it, pass most_bytes={directory.claimed_bytes}"
            )
        last = _last(directory, level, path)
        tied: dict[str, list[str]] = {}
        for name, holder in directory.same.items():
            tied.setdefault(holder, []).append(name)
        for entry in directory.entries:
            tensor = _read(entry, _pieces(entry, file), last, path)
            for name in (entry.name, *tied.get(entry.name, ())):
                yield name, tensor


def load_packed(module: nn.Module, path: str | Path, level: int | None = None) -> nn.Module:
    """Load a packed file into a module of the same architecture, and return it. It is left as it was if that fails.

    Args:
        module: of the file's keys and shapes.
        path: the file.
        level: as of `unpack`.

    Raises:
        FileNotFoundError: nothing is at `path`.
        ValueError: the file has no such level.
        CompressError: the file is of another architecture; named is the first key or shape that differs. Or weights
            that are tied in the module differ in it. Or one of `PackedFileError`, which is one.
    """
    own = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in module.state_dict().items()}
    with open_packed(path) as (directory, _):
        shapes = {entry.name: entry.shape for entry in directory.entries}
    shapes |= {name: shapes[holder] for name, holder in directory.same.items()}
    for name in [*own, *shapes]:
        if own.get(name) != shapes.get(name):
            raise CompressError(
                f"{path} is of another model than this {type(module).__name__}: '{name}' is {_said(shapes.get(name))} "
                f"in the file and {_said(own.get(name))} in the module"
            )
    state = unpack(path, level, directory.claimed_bytes)
    _check_ties(module, state, path)
    module.load_state_dict(state)
    return module


def _check_ties(module: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    for name, holder in ties_of(module.state_dict()).items():
        if not np.array_equal(bits_of(state[name]), bits_of(state[holder])):
            raise CompressError(
                f"'{name}' and '{holder}' are one tensor in this {type(module).__name__}, and differ in {path}, as "
                "when only one of their layers was rounded; untie them before loading: give one a Parameter of its own"
            )


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of a packed file.

    Args:
        name: its key.
        dtype: as safetensors names it.
        shape: of the whole.
        way: how it is kept, in the level that was asked for.
        size_bytes: in the file, up to that level.
        bound_bytes: the entropy of its values, each taken alone.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    way: str
    size_bytes: int
    bound_bytes: float


def packed_tensors(path: str | Path, level: int | None = None) -> list[PackedTensor]:
    """Say how each tensor of a packed file is kept. Reads all of it.

    Raises:
        FileNotFoundError, ValueError, PackedFileError: as of `unpack`.
    """
    found = []
    with open_packed(path) as (directory, file):
        last = _last(directory, level, path)
        for entry in directory.entries:
            pieces = _pieces(entry, file)
            bound = entropy_bound_bytes({entry.name: _read(entry, pieces, last, path)})
            size = sum(entry.sizes[: last + 1])
            found.append(PackedTensor(entry.name, entry.dtype, entry.shape, way_of(pieces[last]), size, bound))
    return found


def _last(directory: Directory, level: int | None, path: str | Path) -> int:
    if level is not None and not 0 <= level < directory.levels:
        raise ValueError(f"{path} has levels 0 to {directory.levels - 1}, got {level}")
    return directory.levels - 1 if level is None else level


def _said(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {shape}"


def _pieces(entry: Entry, file: BinaryIO) -> list[bytes]:
    return [file.read(size) for size in entry.sizes]


def _read(entry: Entry, pieces: list[bytes], last: int, path: str | Path) -> Tensor:
    version: Version | None = None
    for data, crc in zip(pieces[: last + 1], entry.crcs, strict=False):
        try:
            version = unpack_tensor(data, entry.dtype, entry.shape, version)
        except PackedFileError as error:
            raise PackedFileError(
                f"'{entry.name}' of {path} has changed or is cut: {error}; get the file again"
            ) from error
        if checksum(version[0]) != crc:
            raise PackedFileError(f"'{entry.name}' of {path} has changed (its checksum differs); get the file again")
    if version is None:
        raise PackedFileError(f"'{entry.name}' of {path} has no level")
    return version[0]

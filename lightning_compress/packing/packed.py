"""Pack a model into one file near the entropy of its weights, and read it back bit for bit."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressError
from lightning_compress.export.replacing import written_at_the_end
from lightning_compress.measure.entropy import entropy_bound_bytes
from lightning_compress.packing.grids import rounded_weights
from lightning_compress.packing.layout import Directory, Entry, open_packed, write_head
from lightning_compress.packing.stream import PackedFileError
from lightning_compress.packing.tensors import DTYPES, Codes, checksum, pack_tensor, unpack_tensor, way_of
from lightning_compress.quantization.outputs import Ranges
from lightning_compress.sharding import is_distributed

__all__ = ["PackedTensor", "load_packed", "pack", "packed_tensors", "unpack", "unpacked"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_A_BYTE, _MOST_AT_LEAST = 1000, 1 << 30


def pack(
    module: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    ranges: Ranges | None = None,
    signed_zeros: bool = False,
) -> Path:
    """Write a model's state into one file: zeros, shared weights and codes take the bytes that they are worth.

    Runs after training, tensor by tensor. Without `ranges` all comes back bit for bit, but for the sign of zeros: masks
    make -0.0 of negative weights, and these signs may be most of a sparse file. Few distinct values are kept as a
    codebook and codes, zeros by their places, floats by their bytes' places, each entropy coded, whatever is least.
    With `ranges` the weight of each named layer is kept as the codes and scales it was trained on, and comes back
    rounded as `fake_quantized` rounds it.

    Args:
        module: a module, or a state dict; any dtype of safetensors. Tied weights are kept once.
        path: the file to write; missing folders are made. It appears when it is whole.
        ranges: name of a layer -> its range, from `QuantizationAwareTraining.ranges()`; ranges of outputs and inputs
            are not kept, they belong to whoever runs the model.
        signed_zeros: keep -0.0 too.

    Raises:
        ImportError: a package of the `packed` extra is missing.
        TypeError: ranges with a state dict; they need the module.
        ValueError: a dtype that no file holds, a tensor on the meta device or sharded.
        AttributeError: a range names no layer of the module.
    """
    state = dict(module.state_dict() if isinstance(module, nn.Module) else module)
    if ranges and not isinstance(module, nn.Module):
        raise TypeError("ranges are of a module's layers, got a state dict beside them; give the module")
    grids = rounded_weights(module, ranges) if ranges and isinstance(module, nn.Module) else {}
    first: dict[object, str] = {}
    same: dict[str, str] = {}
    entries: list[Entry] = []
    with tempfile.TemporaryFile() as tensors, written_at_the_end(Path(path)) as unfinished:
        for name, tensor in state.items():
            _check(name, tensor)
            holder = first.setdefault(_place(tensor), name)
            if holder != name:
                same[name] = holder
                continue
            value, codes = grids.get(name, (tensor, None))
            entry, data = _packed(name, value if signed_zeros else _without_signs(value), codes)
            entries.append(entry)
            tensors.write(data)
        with unfinished.open("wb") as file:
            write_head(file, Directory(tuple(entries), same))
            tensors.seek(0)
            shutil.copyfileobj(tensors, file)
    return Path(path)


def unpack(path: str | Path, most_bytes: int | None = None) -> dict[str, Tensor]:
    """Return the state dict of a packed file, on the CPU. Nothing is returned unless all of it is right.

    Args:
        path: the file.
        most_bytes: what all tensors together may take; None is 1 GiB and 1000 times the file.

    Raises:
        ImportError: a package of the `packed` extra is missing.
        FileNotFoundError: nothing is at `path`.
        PackedFileError: the file is cut, changed (with the tensor's name), newer, or claims too much.
    """
    return dict(unpacked(path, most_bytes))


def unpacked(path: str | Path, most_bytes: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a packed file one by one, as `unpack` has them; for models that fill the memory.

    Raises:
        PackedFileError: as of `unpack`, but after the tensors before it.
    """
    allowed = _MOST_AT_LEAST + _MOST_A_BYTE * Path(path).stat().st_size if most_bytes is None else most_bytes
    with open_packed(path) as (directory, file):
        if directory.claimed_bytes > allowed:
            raise PackedFileError(
                f"{path} claims {directory.claimed_bytes} bytes of tensors, and {allowed} are allowed; if you trust "
                f"it, pass most_bytes={directory.claimed_bytes}"
            )
        tied: dict[str, list[str]] = {}
        for name, holder in directory.same.items():
            tied.setdefault(holder, []).append(name)
        for entry in directory.entries:
            tensor = _read(entry, file.read(entry.size), path)
            for name in (entry.name, *tied.get(entry.name, ())):
                yield name, tensor


def load_packed(module: nn.Module, path: str | Path) -> nn.Module:
    """Load a packed file into a module of the same architecture, and return it. It is left as it was if that fails.

    Raises:
        FileNotFoundError: nothing is at `path`.
        CompressError: the file is of another architecture; named is the first key or shape that differs. Or one of
            `PackedFileError`, which is one.
    """
    own = module.state_dict()
    with open_packed(path) as (directory, _):
        shapes = {entry.name: entry.shape for entry in directory.entries}
    shapes |= {name: shapes[holder] for name, holder in directory.same.items()}
    for name in [*own, *shapes]:
        wanted, got = (None if name not in state else tuple(state[name]) for state in
                       ({n: t.shape for n, t in own.items()}, shapes))  # fmt: skip
        if wanted != got:
            raise CompressError(
                f"{path} is of another model than this {type(module).__name__}: '{name}' is {_said(got)} in the file "
                f"and {_said(wanted)} in the module"
            )
    state = unpack(path, directory.claimed_bytes)
    module.load_state_dict(state)
    return module


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of a packed file.

    Args:
        name: its key.
        dtype: as safetensors names it.
        shape: of the whole.
        way: how it is kept.
        size_bytes: in the file.
        bound_bytes: the entropy of its values, of those of its codes where it has a grid.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    way: str
    size_bytes: int
    bound_bytes: float


def packed_tensors(path: str | Path) -> list[PackedTensor]:
    """Say how each tensor of a packed file is kept. Reads all of it.

    Raises:
        FileNotFoundError: nothing is at `path`.
        PackedFileError: the file is cut, changed or newer.
    """
    found = []
    with open_packed(path) as (directory, file):
        for entry in directory.entries:
            data = file.read(entry.size)
            tensor = _read(entry, data, path)
            bound = entropy_bound_bytes({entry.name: tensor})
            found.append(PackedTensor(entry.name, entry.dtype, entry.shape, way_of(data), entry.size, bound))
    return found


def _said(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {shape}"


def _place(tensor: Tensor) -> object:
    """What two keys of one tensor have in common; nothing but itself where there is no memory."""
    if not tensor.numel():
        return object()
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _check(name: str, tensor: Tensor) -> None:
    if tensor.is_meta or is_distributed(tensor):
        kind = "on the meta device, without values" if tensor.is_meta else "sharded among processes"
        raise ValueError(f"expected tensors that are whole and here, but '{name}' is {kind}; gather the weights first")
    if tensor.dtype not in _NAMES or tensor.layout is not torch.strided:
        raise ValueError(
            f"no file holds {tensor.layout} {tensor.dtype}, as '{name}' is; expected one of {list(DTYPES)}"
        )


def _without_signs(tensor: Tensor) -> Tensor:
    """The tensor with 0.0 for -0.0, every NaN as it is."""
    return torch.where(tensor == 0, torch.zeros_like(tensor), tensor) if tensor.is_floating_point() else tensor


def _packed(name: str, tensor: Tensor, codes: Codes | None) -> tuple[Entry, bytes]:
    data = pack_tensor(tensor, codes)
    return Entry(name, _NAMES[tensor.dtype], tuple(tensor.shape), len(data), checksum(tensor)), data


def _read(entry: Entry, data: bytes, path: str | Path) -> Tensor:
    try:
        tensor = unpack_tensor(data, entry.dtype, entry.shape)
    except PackedFileError as error:
        raise PackedFileError(f"'{entry.name}' of {path} has changed or is cut: {error}; get the file again") from error
    if checksum(tensor) != entry.crc:
        raise PackedFileError(f"'{entry.name}' of {path} has changed (its checksum differs); get the file again")
    return tensor

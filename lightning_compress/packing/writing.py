"""Pack a model, or several versions of one, into a file near the entropy of its weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from lightning_compress.export.replacing import written_at_the_end
from lightning_compress.packing.grids import rounded_weights
from lightning_compress.packing.layout import MOST_LEVELS, Directory, Entry, write_head
from lightning_compress.packing.tensors import (
    DTYPES,
    Codes,
    Version,
    bits_of,
    checksum,
    pack_tensor,
    tensor_of,
    ties_of,
)
from lightning_compress.quantization.outputs import Ranges
from lightning_compress.sharding import is_distributed

__all__ = ["pack", "pack_levels"]

Model = nn.Module | Mapping[str, Tensor]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def pack(
    module: Model,
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
        TypeError: ranges with a state dict; they need the module. Or an entry of the state that is no tensor.
        ValueError: a dtype that no file holds, a tensor on the meta device or sharded.
        AttributeError: a range names no layer of the module.
    """
    return pack_levels([module], path, [ranges], signed_zeros)


def pack_levels(
    modules: Sequence[Model],
    path: str | Path,
    ranges: Sequence[Ranges | None] | None = None,
    signed_zeros: bool = False,
) -> Path:
    """Write versions of one model into one file, the coarsest first, each as what the one before lacks.

    Runs after training. `unpack(path, level=0)` gives the first. 95 % zeros within 80 % cost the weights that 80 % has
    more, 4 bits within 8 the rest of each code; versions that have little in common cost what they cost alone.

    Args:
        modules: of one architecture: the same keys, shapes and dtypes.
        path: as of `pack`.
        ranges: one for each version, or None; as of `pack`.
        signed_zeros: as of `pack`.

    Raises:
        ValueError: no versions, too many, other numbers of ranges, keys, shapes or dtypes; and as of `pack`.
        ImportError, TypeError, AttributeError: as of `pack`.
    """
    given = [None] * len(modules) if ranges is None else list(ranges)
    if len(given) != len(modules) or not 1 <= len(modules) <= MOST_LEVELS:
        raise ValueError(
            f"expected 1 to {MOST_LEVELS} versions and as many ranges, got {len(modules)} and {len(given)}"
        )
    levels = [_level(module, own, signed_zeros) for module, own in zip(modules, given, strict=True)]
    _check_alike([level.state for level in levels])
    same = _ties(levels)
    with tempfile.TemporaryFile() as tensors, written_at_the_end(Path(path)) as unfinished:
        names = [name for name in levels[0].state if name not in same]
        entries = [_written(name, [level.version(name) for level in levels], tensors) for name in names]
        with unfinished.open("wb") as file:
            write_head(file, Directory(tuple(entries), same))
            tensors.seek(0)
            shutil.copyfileobj(tensors, file)
    return Path(path)


@dataclass(frozen=True)
class _Level:
    """One version of the model. Its tensors are rounded one at a time, when they are written."""

    state: Mapping[str, Tensor]
    rounded: Mapping[str, Callable[[], Version]]
    signed_zeros: bool

    def version(self, name: str) -> Version:
        """Return a tensor as it is to come back, with its codes."""
        version = self.rounded[name]() if name in self.rounded else (self.state[name], None)
        return version if self.signed_zeros else _without_signs(*version)


def _level(module: Model, ranges: Ranges | None, signed_zeros: bool) -> _Level:
    state = dict(module.state_dict() if isinstance(module, nn.Module) else module)
    if ranges and not isinstance(module, nn.Module):
        raise TypeError("ranges are of a module's layers, got a state dict beside them; give the module")
    for name, tensor in state.items():
        _check(name, tensor)
    rounded = rounded_weights(module, ranges) if ranges and isinstance(module, nn.Module) else {}
    return _Level(state, rounded, signed_zeros)


def _check(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"expected a state dict of tensors, but '{name}' is a {type(tensor).__name__}; leave it out and keep it "
            "beside the file"
        )
    if tensor.is_meta or is_distributed(tensor):
        kind = "on the meta device, without values" if tensor.is_meta else "sharded among processes"
        raise ValueError(f"expected tensors that are whole and here, but '{name}' is {kind}; gather the weights first")
    if tensor.dtype not in _NAMES or tensor.layout is not torch.strided:
        raise ValueError(
            f"no file holds {tensor.layout} {tensor.dtype}, as '{name}' is; expected one of {list(DTYPES)}"
        )


def _check_alike(states: Sequence[Mapping[str, Tensor]]) -> None:
    for level, state in enumerate(states[1:], 1):
        for name in [*states[0], *state]:
            first, own = (None if name not in of else (tuple(of[name].shape), of[name].dtype) for of in
                          (states[0], state))  # fmt: skip
            if first != own:
                raise ValueError(
                    f"versions of one model have the same tensors, but '{name}' is {first} in the first and {own} in "
                    f"version {level}"
                )


def _ties(levels: Sequence[_Level]) -> dict[str, str]:
    """Keys whose tensor is another key's in every version: one of them alone may be rounded, which parts them."""
    found = [ties_of(level.state) for level in levels]

    def alike(name: str, holder: str) -> bool:
        pairs = ((level.version(name)[0], level.version(holder)[0]) for level in levels)
        return all(np.array_equal(bits_of(own), bits_of(other)) for own, other in pairs)

    shared = {name: holder for name, holder in found[0].items() if all(other.get(name) == holder for other in found)}
    return {name: holder for name, holder in shared.items() if alike(name, holder)}


def _without_signs(tensor: Tensor, codes: Codes | None) -> Version:
    """The tensor with 0.0 for -0.0, every NaN as it is; itself if it has none.

    Codes go with it where they give -0.0: a scale that a half-precision float has no number for makes them.
    """
    if not tensor.is_floating_point():
        return tensor, codes
    bits = bits_of(tensor)
    negative = bits == 1 << (8 * tensor.element_size() - 1)  # the sign bit alone
    if not negative.any():
        return tensor, codes
    return tensor_of(np.where(negative, bits.dtype.type(0), bits), _NAMES[tensor.dtype]).reshape(tensor.shape), None


def _written(name: str, versions: Sequence[Version], file: BinaryIO) -> Entry:
    """Write all versions of one tensor, one after the other."""
    sizes, before = [], None
    for version in versions:
        data = pack_tensor(*version, before)
        file.write(data)
        sizes.append(len(data))
        before = version
    tensor = versions[0][0]
    crcs = tuple(checksum(own) for own, _ in versions)
    return Entry(name, _NAMES[tensor.dtype], tuple(tensor.shape), tuple(sizes), crcs)

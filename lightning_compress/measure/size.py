"""How big: bytes of files, bytes after zip, and non-zero weights, each counted and never estimated."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_compress.sharding import all_reduce_sum, clean_name, local, parts_of

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto

__all__ = [
    "Count",
    "LayerRow",
    "count_nonzero",
    "count_nonzero_in_parts",
    "count_nonzero_onnx",
    "file_bytes",
    "layer_row",
    "packed_bits",
    "per_layer",
    "per_layer_onnx",
    "zipped_bytes",
]

_NO_WEIGHTS = ("bool", "int32", "int64", "uint32", "uint64")  # types of an ONNX file's indices, masks and shapes


@dataclass(frozen=True)
class Count:
    """How many of `total` numbers are not zero."""

    nonzero: int
    total: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in [0, 1]; 0 where nothing was counted."""
        return 1.0 - self.nonzero / self.total if self.total else 0.0


@dataclass(frozen=True)
class LayerRow:
    """One parameter of a model: `sparsity` is its fraction of zeros, `bits` the width of one element."""

    name: str
    shape: tuple[int, ...]
    total: int
    nonzero: int
    sparsity: float
    bits: int

    @classmethod
    def counted(cls, name: str, shape: Sequence[int], count: Count, bits: int) -> LayerRow:
        """Return the row of a parameter whose non-zeros were counted."""
        return cls(name, tuple(shape), count.total, count.nonzero, count.sparsity, bits)


def packed_bits(count: Count, bits: int) -> int:
    """Return what a tensor takes in the smaller of two ways: all elements, or its non-zeros and a bit an element.

    >>> packed_bits(Count(8, 80), bits=8), packed_bits(Count(80, 80), bits=8)
    (144, 640)
    """
    return min(count.total * bits, count.total + count.nonzero * bits)


def file_bytes(path: str | Path) -> int:
    """Bytes of a file, or of all files below a folder (an ONNX file with external data, a saved HF model).

    Raises:
        FileNotFoundError: Nothing is at `path`.
    """
    return sum(file.stat().st_size for file, _ in _files(Path(path)))


def zipped_bytes(path: str | Path) -> int:
    """Bytes of a zip archive (deflate, level 9) that holds the file, or all files below the folder.

    The archive is written through a temporary file on disk in pieces, so memory stays small. It is a plain
    stand-in for what a download costs, the same for every model: deflate finds zeros and repeated codes.

    Raises:
        FileNotFoundError: Nothing is at `path`.
    """
    with tempfile.TemporaryFile() as sink:
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED, compresslevel=9, strict_timestamps=False) as archive:
            for file, name in _files(Path(path)):
                archive.write(file, name)
        return sink.seek(0, 2)


def _files(path: Path) -> list[tuple[Path, str]]:
    """Every file at or below `path` with its name in an archive, in a fixed order."""
    if path.is_dir():
        below = sorted(file for file in path.rglob("*") if file.is_file())
        return [(file, file.relative_to(path).as_posix()) for file in below]
    if not path.exists():
        raise FileNotFoundError(f"expected a file or a folder to measure, got '{path}', where nothing is")
    return [(path, path.name)]


def count_nonzero(model: nn.Module | Mapping[str, Tensor]) -> Count:
    """Count the numbers of a model that are not zero; NaN is one, -0.0 is not.

    Of a module: its parameters (no buffers). Of a mapping, such as a `state_dict`: every tensor in it, so
    leave buffers out yourself. A tensor that is there twice (tied weights) counts once.

    >>> count_nonzero({"weight": torch.tensor([[1.0, 0.0], [0.0, -0.0]])})
    Count(nonzero=1, total=4)
    """
    tensors = model.parameters() if isinstance(model, nn.Module) else model.values()
    once = list({_place(tensor): tensor for tensor in tensors}.values())
    return Count(sum(_nonzero(tensor) for tensor in once), sum(tensor.numel() for tensor in once))


@torch.no_grad()
def count_nonzero_in_parts(root: nn.Module, module: nn.Module) -> Count:
    """Count as `count_nonzero` does, where each process has a part of the parameters: every process calls it.

    Args:
        root: the model as the strategy has wrapped it.
        module: whose parameters are counted.
    """
    parameters = {clean_name(name): parameter for name, parameter in module.named_parameters()}
    parts = parts_of(root, parameters)
    own = [local(parameter) for name, parameter in parameters.items() if parts[name].counted]
    device = next(iter(parameters.values())).device
    counts = torch.tensor([sum(map(_nonzero, own)), sum(piece.numel() for piece in own)], device=device)
    nonzero, total = all_reduce_sum(counts).tolist()
    return Count(nonzero, total)


def per_layer(
    module: nn.Module, names: Iterable[str] | None = None, bits: Mapping[str, int] | None = None
) -> list[LayerRow]:
    """One row for each parameter, in registration order.

    Args:
        module: The model; a tied parameter has one row, under its first name.
        names: Which parameters, as `named_parameters` spells them; None is all.
        bits: Width of the grid a parameter is rounded to, where it isn't the width of its dtype.

    Raises:
        ValueError: A name that the module does not have.

    >>> per_layer(nn.Linear(3, 2), ["bias"], bits={"bias": 8})[0].shape
    (2,)
    """
    everything = dict(module.named_parameters(remove_duplicate=names is None))
    for name in (*(names := list(everything) if names is None else list(names)), *(bits or {})):
        if name not in everything:
            raise ValueError(
                f"expected names of parameters of {type(module).__name__}, got '{name}'; "
                "take them from named_parameters(), for example 'encoder.layers.0.weight'"
            )
    return [layer_row(name, everything[name], (bits or {}).get(name)) for name in names]


def layer_row(name: str, tensor: Tensor, bits: int | None = None) -> LayerRow:
    """Count one tensor; without `bits` its width is that of its dtype.

    >>> layer_row("weight", torch.tensor([0.0, 2.0]))
    LayerRow(name='weight', shape=(2,), total=2, nonzero=1, sparsity=0.5, bits=32)
    """
    width = tensor.element_size() * 8 if bits is None else bits
    return LayerRow.counted(name, tensor.shape, Count(_nonzero(tensor), tensor.numel()), width)


def _nonzero(tensor: Tensor) -> int:
    return int(torch.count_nonzero(tensor.detach()))


def _place(tensor: Tensor) -> tuple[object, ...]:
    """What two tensors share only when they are the same numbers in memory, not merely equal ones."""
    if tensor.data_ptr() == 0:  # no memory of its own (empty, fake): identity is all there is
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def count_nonzero_onnx(path: str | Path, min_dims: int = 2) -> Count:
    """Count the weights of an ONNX file that do not stand for zero.

    Weights are initializers of at least `min_dims` dimensions: biases, scales and zero points have fewer. Indices and
    masks, integers of 32 bits or more and bool, are none. A weight that a DequantizeLinear reads is zero where it
    equals its zero point.

    Raises:
        ImportError: onnx is not installed.
        FileNotFoundError: Nothing is at `path`.
    """
    rows = per_layer_onnx(path, min_dims)
    return Count(sum(row.nonzero for row in rows), sum(row.total for row in rows))


def per_layer_onnx(path: str | Path, min_dims: int = 2) -> list[LayerRow]:
    """One row for each weight of an ONNX file, as `count_nonzero_onnx` counts them, in the file's order.

    Names are the file's. What `export_onnx` adds to the name of integers is left out, so that a weight has the same
    name in its float32 and its int8 file. `bits` is the width of the type it is stored as.

    Raises:
        ImportError: onnx is not installed.
        FileNotFoundError: Nothing is at `path`.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError('to count an ONNX file needs onnx: pip install "lightning-compress[onnx]"') from error
    model = onnx.load(str(path))
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    zeros, rows = _zero_points(model, values), list[LayerRow]()
    for name, value in values.items():
        if value.ndim >= min_dims and value.dtype.name not in _NO_WEIGHTS:
            count = Count(int((value != zeros.get(name, 0)).sum()), value.size)
            # 4-bit types come as arrays of ml_dtypes, one to a byte; their names say how wide they are.
            bits = 4 if value.dtype.name in ("int4", "uint4") else value.dtype.itemsize * 8
            shown = name.removesuffix(":int")
            rows.append(LayerRow.counted(shown, value.shape, count, bits))
    return rows


def _zero_points(model: ModelProto, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Zero point of each dequantized initializer, shaped to broadcast against it."""
    found: dict[str, np.ndarray] = {}
    for node in model.graph.node:
        weight, zero_point = _dequantized(node.op_type, node.input, values)
        if weight is None or zero_point is None:
            continue
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        shape = [1] * weight.ndim
        if zero_point.ndim == 1:
            shape[axis] = zero_point.size
        found[node.input[0]] = zero_point.reshape(shape)
    return found


def _dequantized(
    op_type: str, inputs: Sequence[str], values: Mapping[str, np.ndarray]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The stored weight and zero point of a DequantizeLinear node, where it has both."""
    if op_type != "DequantizeLinear" or len(inputs) < 3:
        return None, None
    return values.get(inputs[0]), values.get(inputs[2])

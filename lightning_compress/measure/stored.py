"""Model files as they lie on disk: the weights in them, read without running any code of theirs."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_compress.measure.entropy import entropy_bound_bytes, entropy_bound_bytes_onnx
from lightning_compress.measure.measurement import Measurement
from lightning_compress.measure.size import LayerRow, file_bytes, layer_row, per_layer_onnx, zipped_bytes
from lightning_compress.sharding import clean_name

__all__ = ["KINDS", "measure_file", "stored_layers", "stored_tensors"]

CHECKPOINTS = (".ckpt", ".pt", ".pth", ".bin")
PACKED = ".packed"
KINDS = (".onnx", ".safetensors", PACKED, *CHECKPOINTS)
# What bytes that were never a checkpoint make of torch's reader, which follows them as if they were one.
_UNREADABLE = (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, ValueError, TypeError, AttributeError)
_WEIGHT_TYPES = (torch.int8, torch.uint8)  # besides all floating ones; wider integers are counters and indices


def measure_file(path: str | Path, name: str) -> Measurement:
    """Measure what a file alone can tell: bytes, zipped, entropy bound and zeros. Runs no model.

    Args:
        path: an ONNX file, a checkpoint (`state_dict` is read where it has one), a safetensors or a packed file.
        name: what the column is called.

    Raises:
        FileNotFoundError: nothing is at `path`.
        ValueError: it is no model file, or holds no weights.
        ImportError: the package that reads it is not installed.
    """
    rows = stored_layers(path)
    if Path(path).suffix.lower() == ".onnx":
        entropy = entropy_bound_bytes_onnx(path)
    else:
        entropy = entropy_bound_bytes(stored_tensors(path))
    nonzero, total = (sum(getattr(row, what) for row in rows) for what in ("nonzero", "total"))
    return Measurement(
        name,
        size_bytes=file_bytes(path),
        zipped_bytes=zipped_bytes(path),
        nonzero=nonzero,
        total=total,
        entropy_bytes=entropy,
    )


def stored_layers(path: str | Path) -> list[LayerRow]:
    """One row for each weight of a file: tensors of two or more dimensions, of a floating type or 8-bit integers.

    Biases, scales and the statistics of norms have fewer dimensions, so that an ONNX file and a checkpoint of the
    same model count the same weights. Arguments and errors are those of `measure_file`.
    """
    path = _checked(path)
    if path.suffix.lower() == ".onnx":
        rows = _onnx_rows(path)
    else:
        rows = [layer_row(name, tensor) for name, tensor in stored_tensors(path).items() if _is_weight(tensor)]
    if not rows:
        raise ValueError(f"expected weights of two or more dimensions in '{path}', found none; is it the model's file?")
    return rows


def stored_tensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint, safetensors or packed file by name, on the CPU; no object but tensors is made.

    Arguments and errors are those of `measure_file`.
    """
    path = _checked(path)
    readers: dict[str, Callable[[Path], Any]] = {".safetensors": _safetensors, PACKED: _packed}
    content = readers.get(path.suffix.lower(), _checkpoint)(path)
    named = content.get("state_dict", content) if isinstance(content, Mapping) else None
    tensors = {clean_name(str(name)): value for name, value in (named or {}).items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"expected a state_dict, or a checkpoint that holds one, in '{path}', got {type(content).__name__} without "
            "tensors; write it with torch.save(model.state_dict(), path)"
        )
    return tensors


def _checked(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a model file at '{path}', where there is none; check the path")
    if path.suffix.lower() not in KINDS:
        raise ValueError(f"expected a model file, one of {', '.join(KINDS)}, got '{path}'; convert or rename it")
    return path


def _onnx_rows(path: Path) -> list[LayerRow]:
    try:
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ImportError('ONNX files need onnx: pip install "lightning-compress[onnx]"') from error
    try:
        return per_layer_onnx(path)
    except DecodeError as error:
        raise ValueError(f"expected an ONNX file, but '{path}' is none ({error}); write it with export_onnx") from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError("safetensors files need safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"expected a safetensors file, but '{path}' is none ({error})") from error


def _packed(path: Path) -> dict[str, Tensor]:
    from lightning_compress.packing.reading import unpack  # it measures what it packs, by this package
    from lightning_compress.packing.stream import PackedFileError

    try:
        return unpack(path)
    except PackedFileError as error:
        raise ValueError(str(error)) from error


def _checkpoint(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise ValueError(
            f"expected a checkpoint of tensors, but '{path}' cannot be read as one without running code from it; write "
            f"it with torch.save(model.state_dict(), path) ({_cause(error)})"
        ) from error


def _cause(error: BaseException) -> str:
    """The part of torch's page of advice that says what was met: an object that is no tensor, or a broken file."""
    refused = re.search(r"WeightsUnpickler error: ([^\n]*)", str(error))
    return refused.group(1).split(" Please ")[0] if refused else f"{type(error).__name__}: {error!s}"[:200]


def _is_weight(tensor: Tensor) -> bool:
    return tensor.dim() >= 2 and (tensor.is_floating_point() or tensor.dtype in _WEIGHT_TYPES)

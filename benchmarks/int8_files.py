"""What the int8 file of a trained network computes, holds and takes, against its float32 file."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import onnx
from int8 import cpu_times, spread
from onnx import numpy_helper
from torch import Tensor, nn

from lightning_compress.export.onnx import export_onnx, int8_report, onnx_session
from lightning_compress.quantization.outputs import Ranges

COLUMNS = "file agrees, % (worst seed) | integer kernels | file bytes | faster"
Batch = dict[str, Tensor] | tuple[Tensor, ...]


def compared(
    module: nn.Module, ranges: Ranges, batches: Sequence[Batch], wanted: Tensor, runs: int, **options: Any
) -> dict[str, Any]:
    """Write both files; compare the int8 one's classes with those `wanted`, and time both on one example.

    Args:
        module: trained, in float32.
        ranges: what was trained.
        batches: the module's inputs.
        wanted: (examples,) the classes that the module gives with every rounding.
        runs: timed runs of each file.
        options: of `export_onnx`.
    """
    example, one = _first(batches[0], 8), _first(batches[0], 1)
    with tempfile.TemporaryDirectory() as folder:
        paths = {"float32": Path(folder) / "float.onnx", "int8": Path(folder) / "int8.onnx"}
        export_onnx(module, paths["float32"], example, **options)
        export_onnx(module, paths["int8"], example, ranges=ranges, **options)
        sessions = {name: onnx_session(path) for name, path in paths.items()}
        names = [each.name for each in sessions["int8"].get_inputs()]
        got = [sessions["int8"].run(None, _feed(names, batch))[0].argmax(1) for batch in batches]
        feed = _feed(names, one)
        times = cpu_times({n: lambda s=s: s.run(None, feed) for n, s in sessions.items()}, runs, warm=2)
        report, stored = int8_report(paths["int8"]), _weights(paths["int8"])
        return {
            "agreement": float(np.mean(np.concatenate(got) == wanted.numpy())),
            "int8_ms": spread(times["int8"]),
            "float32_ms": spread(times["float32"]),
            "speedup": spread(times["float32"] / times["int8"]),
            "kernels": dict(Counter(each.operator for each in report.kernels if each.integer)),
            "float_kernels": [f"{each.operator} of {each.layer}: {each.reason}" for each in report.floats],
            "file_bytes": {n: path.stat().st_size for n, path in paths.items()},
            "weight_types": dict(Counter(str(each.dtype) for each in stored)),
            "zeros": sum(int((each == 0).sum()) for each in stored),
            "weights": sum(each.size for each in stored),
        }


def _first(batch: Batch, count: int) -> Batch:
    if isinstance(batch, dict):
        return {name: value[:count] for name, value in batch.items()}
    return tuple(value[:count] for value in batch)


def _feed(names: list[str], batch: Batch) -> dict[str, np.ndarray]:
    values = batch.values() if isinstance(batch, dict) else batch
    return {name: value.numpy() for name, value in zip(names, values, strict=True)}


def _weights(path: Path) -> list[np.ndarray]:
    """Return every matrix or kernel in a file."""
    arrays = [numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer]
    return [each for each in arrays if each.ndim >= 2 and each.size > 1]


def columns(cells: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what `COLUMNS` names of one row's files, of all seeds; dashes where there are none."""
    files = [cell["file"] for cell in cells if "file" in cell]
    refused = [cell["refused"] for cell in cells if "refused" in cell]
    if refused or not files:
        yield from (f"refused: {refused[0].split(' has ')[-1].split(',')[0]}" if refused else "-", "-", "-", "-")
        return
    kernels = ", ".join(f"{count} {name}" for name, count in files[0]["kernels"].items())
    yield f"{100 * min(each['agreement'] for each in files):.2f}"
    yield f"{kernels}; {len(files[0]['float_kernels'])} float"
    yield f"{mean(each['file_bytes']['int8'] / each['file_bytes']['float32'] for each in files):.3f}"
    yield f"{mean(each['speedup']['median'] for each in files):.2f}"

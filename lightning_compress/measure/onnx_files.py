"""Two ONNX files on the same examples: accuracy, bytes, zeros and latency of what ships, by running it."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_compress.export.runtime import onnx_session
from lightning_compress.measure.differences import Differences, compare_predictions
from lightning_compress.measure.entropy import entropy_bound_bytes_onnx
from lightning_compress.measure.latency import Latency, compare_latency
from lightning_compress.measure.layers import layer_changes
from lightning_compress.measure.report import Measurement, Report, compare
from lightning_compress.measure.size import count_nonzero_onnx, file_bytes, per_layer_onnx, zipped_bytes

__all__ = ["compare_onnx", "predict_onnx"]


def predict_onnx(path: str | Path, *inputs: Any, batch_size: int = 64, threads: int = 1) -> np.ndarray:
    """Run an ONNX file over all examples in batches; returns its first output, (examples, ...).

    Args:
        path: an ONNX file with an open batch dimension.
        inputs: one array or CPU tensor for each input of the file, examples first.
        batch_size: examples of one call; the last call may be smaller.
        threads: of ONNX Runtime.

    Raises:
        ValueError: the file has another number of inputs.
    """
    arrays = [np.asarray(array) for array in inputs]
    run = _runner(path, arrays, threads)
    return np.concatenate([run(slice(start, start + batch_size)) for start in range(0, len(arrays[0]), batch_size)])


def compare_onnx(
    before: str | Path,
    after: str | Path,
    inputs: Sequence[Any] | Mapping[str, Any],
    labels: Any,
    *,
    names: tuple[str, str] = ("dense", "compressed"),
    batch_size: int = 64,
    threads: int = 1,
    runs: int = 50,
) -> Report:
    """Measure two ONNX classifiers on the same examples. Runs after `export_onnx`.

    Accuracy is the share of examples whose largest logit is the label; latency is of one batch of `batch_size`, the
    files in turn, so that the ratio holds on a busy machine; zeros are counted in the files' weights. Which answers
    changed is in the report where both files have the same classes and labels are integers; zeros and bits of each
    weight are in it too.

    Args:
        before: the dense file.
        after: the compressed file.
        inputs: arrays or CPU tensors, one for each input of the files, examples first; a dict in the files' order.
        labels: (examples,) class indices.
        names: what the columns are called.
        batch_size: examples of one timed call.
        threads: of ONNX Runtime, for both.
        runs: timed calls of each file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the files have another number of inputs, or there are more or fewer labels than examples.
    """
    if isinstance(inputs, Mapping):  # as export_onnx takes them, in the order of the file's inputs
        inputs = tuple(inputs.values())
    arrays = tuple(np.asarray(array) for array in inputs)
    wanted = np.asarray(labels)
    if len(wanted) != len(arrays[0]):
        raise ValueError(
            f"expected one label for each of the {len(arrays[0])} examples, got {len(wanted)}; inputs is a tuple or "
            f"dict with one array for each input of the files, such as (images,)"
        )
    paths = (before, after)
    runners = [_runner(path, arrays, threads) for path in paths]
    batch = slice(0, batch_size)
    calls = {name: functools.partial(run, batch) for name, run in zip(names, runners, strict=True)}
    latency = compare_latency(calls, runs=runs, threads=threads)
    logits = [predict_onnx(path, *arrays, batch_size=batch_size, threads=threads) for path in paths]
    measured = [
        _measurement(name, path, float((own.argmax(axis=-1) == wanted).mean()), latency[name])
        for name, path, own in zip(names, paths, logits, strict=True)
    ]
    return compare(
        *measured,
        about=_about(len(wanted), batch_size),
        layers=layer_changes(*(per_layer_onnx(path) for path in paths)),
        differences=_differences(logits[0], logits[1], wanted),
    )


def _runner(path: str | Path, arrays: Sequence[np.ndarray], threads: int) -> Callable[[slice], np.ndarray]:
    """Open a file once; the function then runs a slice of the examples."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected an ONNX file at {str(path)!r}, found none; write it with export_onnx")
    session = onnx_session(path, threads=threads)
    names = [each.name for each in session.get_inputs()]
    if len(names) != len(arrays):
        raise ValueError(f"expected {len(names)} arrays for the inputs {names} of {path}, got {len(arrays)}")

    def run(examples: slice) -> np.ndarray:
        feed = {name: array[examples] for name, array in zip(names, arrays, strict=True)}
        return np.asarray(session.run(None, feed)[0])

    return run


def _differences(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> Differences | None:
    """Compare the answers; None for files with other outputs, of which only the accuracy can be compared."""
    if before.shape != after.shape or before.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        return None
    one, other = (torch.from_numpy(np.ascontiguousarray(logits)) for logits in (before, after))
    return compare_predictions(one, other, torch.from_numpy(labels.astype(np.int64)))


def _measurement(name: str, path: str | Path, accuracy: float, latency: Latency) -> Measurement:
    count = count_nonzero_onnx(path)
    return Measurement(
        name,
        {"ONNX file": accuracy},
        size_bytes=file_bytes(path),
        zipped_bytes=zipped_bytes(path),
        nonzero=count.nonzero,
        total=count.total,
        latency=latency,
        entropy_bytes=entropy_bound_bytes_onnx(path),
    )


def _about(examples: int, batch_size: int) -> dict[str, str]:
    return {
        "accuracy": f"of {examples} examples",
        "latency": f"ONNX Runtime, batch {batch_size}, the two files in turn",
        "machine": platform.processor() or platform.machine(),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "onnxruntime")),
    }

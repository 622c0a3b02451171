"""`python -m lightning_compress report A B`: two model files side by side, as a table and as files."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_compress.measure.layers import LayerChange, layer_changes
from lightning_compress.measure.onnx_files import compare_onnx
from lightning_compress.measure.report import Report, compare
from lightning_compress.measure.stored import KINDS, measure_file, stored_layers
from lightning_compress.measure.terminal import show

__all__ = ["main", "report_of_files"]

PROGRAM = "python -m lightning_compress report"
NAMES_SHOWN = 5


def main(argv: Sequence[str] = ()) -> int:
    """Compare two files, print the table and the paths written; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(list(argv))
    names = tuple(name.strip() for name in options.names.split(","))
    if len(names) != 2 or not all(names):
        parser.error(f"--names takes two names with a comma between them, got {options.names!r}")
    try:
        function = None if options.data is None else _function(options.data)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    answer = None if function is None else function()  # an error of the user's own code keeps its traceback
    try:
        data = None if function is None else _pair(answer, options.data)
        report = report_of_files(options.before, options.after, data, names, options.batch_size, options.threads)
    except (ValueError, FileNotFoundError, ImportError) as error:
        parser.error(str(error))
    show(report, sys.stdout)
    sys.stdout.write("\n")
    for name, path in report.save(options.out).items():
        sys.stdout.write(f"{name:12} {path}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("before", help=f"the dense model's file ({', '.join(KINDS)})")
    parser.add_argument("after", help="the compressed model's file, of the same or another kind")
    parser.add_argument(
        "--data",
        help="module:function that returns (inputs, labels), arrays or tensors; runs two ONNX files on them for "
        "accuracy, latency and which answers changed",
    )
    parser.add_argument("--out", default="report", help="folder for report.html, .md and .json (default: report)")
    parser.add_argument("--names", default="dense,compressed", help="what the columns are called")
    parser.add_argument("--batch-size", type=_positive, default=64, help="examples of one timed call (default 64)")
    parser.add_argument("--threads", type=_positive, default=1, help="threads of ONNX Runtime (default 1)")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def report_of_files(
    before: str | Path,
    after: str | Path,
    data: tuple[Any, Any] | None = None,
    names: tuple[str, str] = ("dense", "compressed"),
    batch_size: int = 64,
    threads: int = 1,
) -> Report:
    """Compare two model files: bytes, zipped, entropy bound, zeros, and each weight that both have.

    Args:
        before: the dense model: an ONNX file, a checkpoint or a safetensors file.
        after: the compressed one, of any of these kinds.
        data: (inputs, labels); with them both files must be ONNX, and are run.
        names: what the columns are called.
        batch_size: examples of one timed call.
        threads: of ONNX Runtime.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is no model, or cannot be run on the data.
        ImportError: the package that reads a file is not installed.
    """
    layers = layer_changes(stored_layers(before), stored_layers(after))
    shared = tuple(layer for layer in layers if layer.before is not None and layer.after is not None)
    about = {"weights": _said(layers, names), "entropy bound": "of single values, each tensor with a code of its own"}
    if data is None:
        machine = {"machine": platform.processor() or platform.machine()}
        files = {name: str(path) for name, path in zip(("before", "after"), (before, after), strict=True)}
        measured = (measure_file(path, name) for path, name in zip((before, after), names, strict=True))
        return compare(*measured, about={**files, **about, **machine}, layers=shared)
    for path in (before, after):
        if Path(path).suffix.lower() != ".onnx":
            raise ValueError(
                f"expected ONNX files to run on the data, got '{path}', which holds weights without a forward; export "
                "it with export_onnx, or leave --data out"
            )
    inputs, labels = data
    several = inputs if isinstance(inputs, (tuple, list, dict)) else (inputs,)
    run = compare_onnx(before, after, several, labels, names=names, batch_size=batch_size, threads=threads)
    return dataclasses.replace(run, layers=shared, about={**run.about, **about})


def _said(layers: Sequence[LayerChange], names: tuple[str, str]) -> str:
    """Say how many weights both files have, and which only one has."""
    only = (
        [layer.name for layer in layers if layer.after is None],
        [layer.name for layer in layers if layer.before is None],
    )
    text = f"{len(layers) - sum(map(len, only))} are in both files by name and are compared one by one"
    for name, missing in zip(names, only, strict=True):
        if missing:
            more = f" and {len(missing) - NAMES_SHOWN} more" if len(missing) > NAMES_SHOWN else ""
            text += f"; only in {name}: {', '.join(missing[:NAMES_SHOWN])}{more}"
    return text


def _function(where: str) -> Callable[[], Any]:
    """Find the user's function; its module is looked for in the current folder, too."""
    module_name, _, function_name = where.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"--data takes module:function, such as my_project.data:test_set, got '{where}'")
    found = getattr(importlib.import_module(module_name), function_name, None)
    if found is None:
        raise ValueError(f"expected a function '{function_name}' in {module_name}, found none; check --data")
    return found  # type: ignore[no-any-return]


def _pair(answer: Any, where: str) -> tuple[Any, Any]:
    """Check what the user's function returned."""
    if isinstance(answer, (tuple, list)) and len(answer) == 2:
        return answer[0], answer[1]
    got = f"{len(answer)} values" if isinstance(answer, (tuple, list)) else type(answer).__name__
    raise ValueError(f"expected (inputs, labels) from {where}, got {got}")

"""What became of a file: bytes, how near it is to what was trained, speed; a file that differs is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.export.norms import called
from lightning_compress.export.tracing import Inputs, OpenSizes
from lightning_compress.export.verify import (
    ALL_FIXED,
    FLOAT_TOLERANCE,
    compare_outputs,
    expected_outputs,
    sqnr_db,
    with_other_sizes,
)
from lightning_compress.measure.latency import Latency, compare_latency
from lightning_compress.quantization.outputs import Ranges

__all__ = ["Checked", "File", "checked", "first_rows"]

WARMUP, RUNS = 2, 20


@dataclass(frozen=True)
class Checked:
    """A file that was kept, and what its own runtime said of it. It may be given wherever a path may.

    `size_bytes` is of all its parts. `sqnr_db` is the signal-to-noise ratio of its first output against the trained
    module (with every rounding, where it has any), infinite where nothing differs. `agreement` is the share of rows
    whose largest value stands in the same place, None where a row has one value. `latency` and `module_latency` are of
    the file and of the float module in eager mode, in turns on one thread, on one example where the file takes it.
    """

    path: Path
    size_bytes: int
    sqnr_db: float
    agreement: float | None
    latency: Latency
    module_latency: Latency

    def __fspath__(self) -> str:
        return str(self.path)

    def text(self) -> str:
        """Return the figures in one line.

        >>> fast, slow = Latency(1.0, 0.9, 1.2, 0.9, 20, 1, 2.5), Latency(2.5, 2.4, 2.8, 2.3, 20, 1, 1.0)
        >>> print(Checked(Path("net.xml"), 4096, 41.25, 0.995, fast, slow).text())
        net.xml: 4096 bytes, 41.2 dB, 99.5 % of rows agree, 1.00 ms (0.90 to 1.20), 2.50 times as fast as the module
        """
        rows = "" if self.agreement is None else f"{100 * self.agreement:.1f} % of rows agree, "
        fast = self.latency
        return (
            f"{self.path.name}: {self.size_bytes} bytes, {self.sqnr_db:.1f} dB, {rows}{fast.median_ms:.2f} ms "
            f"({fast.p10_ms:.2f} to {fast.p90_ms:.2f}), {fast.speedup or 0:.2f} times as fast as the module"
        )


@dataclass(frozen=True)
class File:
    """A file that is written and not kept yet: what to call it, where it will stand, its bytes, and how it runs."""

    what: str
    path: Path
    size_bytes: int
    run: Callable[[Inputs], Sequence[np.ndarray]]


def checked(
    file: File,
    module: nn.Module,
    inputs: Inputs,
    ranges: Ranges | None,
    *,
    open_sizes: OpenSizes = ALL_FIXED,
    tolerance: float = FLOAT_TOLERANCE,
    timed_rows: int | None = None,
) -> Checked:
    """Run a file and the module on the same inputs, compare every output, and time both. Runs before a file is kept.

    Args:
        file: what was written.
        module: in eval mode.
        inputs: on the module's device.
        ranges: those in the file, None for floats.
        open_sizes: sizes that the file leaves open; others than those of `inputs` are tried.
        tolerance: of floats, as in `compare_outputs`.
        timed_rows: rows of the inputs to time with, None for all.

    Raises:
        CompressError: `forward` refuses another size, or the outputs differ; with the figure.
    """
    tried = with_other_sizes(inputs, open_sizes)
    expected, got = expected_outputs(module, tried, ranges, open_sizes), file.run(tried)
    compare_outputs(file.what, expected, got, ranges, tolerance)
    shortened = inputs if timed_rows is None else first_rows(inputs, timed_rows)
    calls = {"module": lambda: called(module, shortened), "file": lambda: file.run(shortened)}
    with _one_thread():
        times = compare_latency(calls, warmup=WARMUP, runs=RUNS, threads=1)
    floats = [(a, b) for a, b in zip(expected, got, strict=True) if a.dtype.kind == "f" and a.size]
    ratio_db, agreement = (sqnr_db(*floats[0]), _agreement(*floats[0])) if floats else (float("inf"), None)
    return Checked(file.path, file.size_bytes, ratio_db, agreement, times["file"], times["module"])


def first_rows(inputs: Inputs, count: int) -> Inputs:
    """Return the first rows of every tensor, as copies: a view is saved with all of what it is a view of."""
    fewer: Inputs = pytree.tree_map_only(
        Tensor, lambda tensor: tensor[:count].clone() if tensor.dim() else tensor, inputs
    )
    return fewer


def _agreement(expected: np.ndarray, got: np.ndarray) -> float | None:
    if expected.ndim < 2 or expected.shape[-1] < 2:
        return None
    return float((expected.argmax(-1) == got.argmax(-1)).mean())


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

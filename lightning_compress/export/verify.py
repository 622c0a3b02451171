"""Check that a file computes what the module does, before the file is kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.errors import CompressError
from lightning_compress.export.runtime import run_onnx
from lightning_compress.export.tracing import Inputs, OpenSizes
from lightning_compress.quantization.outputs import Ranges, rounded_as_trained

__all__ = ["arrays_of", "compare_outputs", "expected_outputs", "sqnr_db", "verify_file", "with_other_sizes"]

FLOAT_TOLERANCE = 1e-3
LEAST_SQNR_DB = 20.0
LEAST_SQNR_OF_NARROW_INPUTS_DB = 10.0
ALL_FIXED = OpenSizes(batch=False)


def verify_file(path: Path, module: nn.Module, inputs: Inputs, ranges: Ranges | None, open_sizes: OpenSizes) -> None:
    """Run the file and the module on the same inputs, one thread, and compare every floating-point output.

    Without ranges the largest difference must stay below 1e-3 of the largest output. With ranges the file must reach
    20 dB of signal to noise against the module inside `rounded_as_trained`. They differ by the rounding of int32
    biases, which moves some sums to the next code: with 8-bit inputs even untrained networks reach 40 dB. Inputs of
    fewer bits have coarser biases too, so 10 dB are asked where there are any. Open sizes are tried at others than
    the traced ones.

    Raises:
        CompressError: `forward` refuses another size, or the outputs differ in shape or value; with the figure.
    """
    import onnx

    onnx.checker.check_model(str(path), full_check=True)
    inputs = with_other_sizes(inputs, open_sizes)
    expected = expected_outputs(module, inputs, ranges, open_sizes)
    compare_outputs("ONNX file", expected, run_onnx(path, *arrays_of(inputs)), ranges)


def expected_outputs(
    module: nn.Module, inputs: Inputs, ranges: Ranges | None, open_sizes: OpenSizes = ALL_FIXED
) -> list[np.ndarray]:
    """Return what a file must compute: the module's outputs, with every rounding where there are ranges.

    Raises:
        CompressError: `forward` refuses a size that is to be open.
    """
    with rounded_as_trained(module, ranges) if ranges is not None else nullcontext():
        return _outputs(module, inputs, open_sizes)


def compare_outputs(
    what: str,
    expected: Sequence[np.ndarray],
    got: Sequence[np.ndarray],
    ranges: Ranges | None,
    tolerance: float = FLOAT_TOLERANCE,
) -> None:
    """Compare every floating-point output, as `verify_file` says.

    Args:
        what: what computed `got`, for errors.
        expected: the module's outputs.
        got: those of the file.
        ranges: None for a file of floats.
        tolerance: without ranges, the largest difference as a share of the largest output.

    Raises:
        CompressError: they differ in number, shape or value; with the figure.
    """
    shapes = [each.shape for each in expected], [each.shape for each in got]
    if shapes[0] != shapes[1]:
        raise CompressError(f"expected outputs of the shapes {shapes[0]} from the {what}, got {shapes[1]}")
    narrow = ranges is not None and any(trained.bits < 8 for trained in ranges.values())
    for index, (reference, output) in enumerate(zip(expected, got, strict=True)):
        if reference.dtype.kind != "f" or not reference.size:
            continue
        if ranges is None:
            _compare_float(what, index, reference, output, tolerance)
        else:
            least_db = LEAST_SQNR_OF_NARROW_INPUTS_DB if narrow else LEAST_SQNR_DB
            _compare_rounded(what, index, reference, output, least_db)


def with_other_sizes(inputs: Inputs, open_sizes: OpenSizes) -> Inputs:
    """Repeat the first example and leave out the last token; a size of 1 stays, which was traced as two."""

    def changed(leaf: Any) -> Any:
        for dim in open_sizes.of(leaf):
            if leaf.shape[dim] > 1:
                leaf = torch.cat([leaf, leaf[:1]]) if dim == 0 else leaf[:, :-1]
        return leaf

    other: Inputs = pytree.tree_map(changed, inputs)
    return other


def _outputs(module: nn.Module, inputs: Inputs, open_sizes: OpenSizes) -> list[np.ndarray]:
    try:
        return arrays_of(module(**inputs) if isinstance(inputs, dict) else module(*inputs))
    except RuntimeError as error:
        if not open_sizes.names:
            raise
        options = [f"dynamic_{name}" for name in open_sizes.names.values()]
        raise CompressError(
            f"{'=True, '.join(options)}=True needs a forward that takes any such size, but another one ends in: "
            f"{error}; pass {', '.join(f'{option}=False' for option in options)}"
        ) from error


def sqnr_db(reference: np.ndarray, rounded: np.ndarray) -> float:
    """Return the signal-to-quantization-noise ratio 10 log10(sum r^2 / sum (r - q)^2) in decibels.

    >>> sqnr_db(np.array([10.0, 0.0]), np.array([10.0, 1.0]))
    20.0
    """
    signal = float(np.square(reference, dtype=np.float64).sum())
    noise = float(np.square(np.subtract(reference, rounded, dtype=np.float64)).sum())
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal > 0 else float("-inf")


def arrays_of(tree: object) -> list[np.ndarray]:
    """Return the tensors in a tree, in its order."""
    return [leaf.detach().cpu().numpy() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _compare_float(what: str, index: int, reference: np.ndarray, output: np.ndarray, tolerance: float) -> None:
    largest = max(float(np.abs(reference).max()), float(np.finfo(np.float32).tiny))
    error = float(np.abs(reference - output).max()) / largest
    if not error <= tolerance:  # NaN too
        raise CompressError(
            f"the {what} is not the module: output {index} differs by {error:.2g} of its largest value, "
            f"expected at most {tolerance:g}; look in forward for randomness, branches on values, or NaN"
        )


def _compare_rounded(what: str, index: int, reference: np.ndarray, output: np.ndarray, least_db: float) -> None:
    ratio_db = sqnr_db(reference, output)
    if not ratio_db >= least_db:
        raise CompressError(
            f"the int8 {what} is not the fake-quantized module: output {index} has {ratio_db:.1f} dB of signal "
            f"to noise, expected at least {least_db:g}; see that the ranges were trained with these weights"
        )

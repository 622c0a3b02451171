"""Fake-quantization: round to a grid in the forward, pass the gradient straight through in the backward.

Each function has one formula; where a compiler exists it runs as one fused kernel (`compiled_functions`).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_compress.quantization.grid import weight_scale

__all__ = ["compiled_functions", "compiler_available", "fake_quantize_input", "fake_quantize_weight"]

# Values up to half a step outside the grid still round onto it and keep their gradient; the margin below one
# half keeps the rounding itself on the grid.
MARGIN = 0.4999


class _StraightThrough(torch.autograd.Function):
    """Value of the second argument, gradient to the first (Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded`, whose gradient goes to `value` unchanged."""
    result: Tensor = _StraightThrough.apply(value, rounded)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def round_weight(weight: Tensor, bits: int = 8) -> Tensor:
    """Round a weight to its per-channel symmetric grid, without gradient. Runs once per optimizer step.

    Args:
        weight: (out, ...), floating point.
        bits: width of the integer code, sign included.

    Returns:
        Same shape and dtype.

    >>> round_weight(torch.tensor([[1.27, -0.504]]))
    tensor([[ 1.2700, -0.5000]])
    """
    scale = weight_scale(weight, bits).view(-1, *[1] * (weight.dim() - 1))
    return (weight / scale).round_().mul_(scale).to(weight.dtype)


def fake_quantize_weight(weight: Tensor, bits: int = 8) -> Tensor:
    """Round a weight to its grid with a plain straight-through gradient: an abs-max grid never clips.

    Krishnamoorthi 2018, section 2.4 (per-channel symmetric); same shape and dtype as `weight`.
    """
    return straight_through(weight, round_weight(weight, bits))


def fake_quantize_input(value: Tensor, scale: Tensor, zero_point: Tensor, bits: int = 8) -> Tensor:
    """Clip and round an input to its affine grid; the gradient is 1 inside the grid and 0 outside.

    Jacob et al. 2018, equation 12. The zero point is added after rounding, as ONNX's QuantizeLinear does:
    rounding the sum differs on ties when the zero point is odd. The clipped value plus a detached rounding error
    equals the grid point exactly (Sterbenz), so that compiled and eager forms agree to the bit.

    Args:
        value: any shape, floating point; computed in float32.
        scale: () float32.
        zero_point: () float32, a whole number.
        bits: width of the unsigned code.

    Returns:
        Same shape and dtype as `value`.

    >>> fake_quantize_input(torch.tensor([-5.0, 0.26, 0.7, 9.0]), torch.tensor(0.5), torch.tensor(0.0), 2)
    tensor([0.0000, 0.5000, 0.5000, 1.5000])
    """
    low, high = (-zero_point - MARGIN) * scale, (2**bits - 1 - zero_point + MARGIN) * scale
    clipped = torch.minimum(torch.maximum(value.float(), low), high)
    return (clipped + ((clipped / scale).round() * scale - clipped).detach()).to(value.dtype)


def fake_quantize_input_eager(value: Tensor, scale: Tensor, zero_point: Tensor, bits: int = 8) -> Tensor:
    """Compute `fake_quantize_input` with the fewest passes over memory that uncompiled operators allow."""
    step, zero = float(scale), float(zero_point)
    clipped = functional.hardtanh(value.float(), (-zero - MARGIN) * step, (2**bits - 1 - zero + MARGIN) * step)
    with torch.no_grad():
        rounded = (clipped / scale).round_().mul_(scale)
    return straight_through(clipped, rounded).to(value.dtype)


def compiler_available(device: torch.device) -> bool:
    """Say whether `torch.compile` can build kernels here: a C++ compiler for the CPU, Triton for an accelerator."""
    if device.type != "cpu":
        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def _input_rows(function: Callable[..., Tensor], value: Tensor, *grid: Any) -> Tensor:
    # One rank for all inputs: each further rank would be compiled again and count against Dynamo's limit.
    return function(value.flatten(), *grid).view(value.shape) if value.is_contiguous() else function(value, *grid)


@functools.cache
def compiled_functions() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return (round_weight, fake_quantize_input) compiled once per process with dynamic shapes."""
    rounding = torch.compile(round_weight, dynamic=True)
    clipping = torch.compile(fake_quantize_input, dynamic=True)

    def weights(weight: Tensor, bits: int = 8) -> Tensor:
        return rounding(weight.detach().flatten(1), bits).view_as(weight)

    return weights, functools.partial(_input_rows, clipping)

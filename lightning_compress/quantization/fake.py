"""Fake-quantization: round to a grid in the forward, pass the gradient straight through in the backward.

Each function has one formula; where a compiler exists it runs as one fused kernel (`compiled_functions`).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_compress.quantization.scales import weight_scale

__all__ = [
    "compiled_functions",
    "compiler_available",
    "fake_quantize_input",
    "fake_quantize_weight",
    "forget_compiled_code",
]

Kernel = Callable[..., Tensor]

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
    if not torch.is_grad_enabled():
        return rounded
    if torch.compiler.is_compiling():  # Dynamo warns of an autograd.Function; the sum is exact (Sterbenz)
        return value + (rounded - value).detach()
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
    low, high = _bounds(scale, zero_point, bits)
    clipped = torch.minimum(torch.maximum(value.float(), low), high)
    return (clipped + ((clipped / scale).round() * scale - clipped).detach()).to(value.dtype)


class _InputRounding(torch.autograd.Function):
    """`fake_quantize_input` with its forward and backward as two kernels: rounding, and the gradient's gate."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grid: tuple[Any, Any, int], rounding: Kernel, gate: Kernel) -> Tensor:
        ctx.save_for_backward(value)
        ctx.grid, ctx.gate = grid, gate
        return rounding(value.detach(), *grid)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (value,) = ctx.saved_tensors
        return ctx.gate(gradients[0], value.detach(), *ctx.grid), None, None, None


def _bounds(scale: Any, zero_point: Any, bits: int) -> tuple[Any, Any]:
    return (-zero_point - MARGIN) * scale, (2**bits - 1 - zero_point + MARGIN) * scale


def _round_formula(value: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    low, high = _bounds(scale, zero_point, bits)
    clipped = torch.minimum(torch.maximum(value.float(), low), high)
    return ((clipped / scale).round() * scale).to(value.dtype)


def _gate_formula(gradient: Tensor, value: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    low, high = _bounds(scale, zero_point, bits)
    return torch.where((value > low) & (value < high), gradient, 0.0)


def _round_in_place(value: Tensor, scale: float, zero_point: float, bits: int) -> Tensor:
    # Five passes over memory where the formula takes seven; the first makes the copy the others work in.
    clipped = functional.hardtanh(value.float(), *_bounds(scale, zero_point, bits))
    return clipped.div_(scale).round_().mul_(scale).to(value.dtype)


def _gate_fused(gradient: Tensor, value: Tensor, scale: float, zero_point: float, bits: int) -> Tensor:
    return torch.ops.aten.hardtanh_backward(gradient, value, *_bounds(scale, zero_point, bits))  # type: ignore[no-any-return]


def fake_quantize_input_eager(value: Tensor, scale: Tensor, zero_point: Tensor, bits: int = 8) -> Tensor:
    """Compute `fake_quantize_input` with the fewest passes over memory that uncompiled operators allow."""
    if value.device.type != "cpu":  # reading the grid as numbers would wait for the device
        return _rounded(value, (scale, zero_point, bits), _round_formula, _gate_formula)
    return _rounded(value, (scale.item(), zero_point.item(), bits), _round_in_place, _gate_fused)


def _rounded(value: Tensor, grid: tuple[Any, Any, int], rounding: Kernel, gate: Kernel) -> Tensor:
    result: Tensor = _InputRounding.apply(value, grid, rounding, gate)  # type: ignore[no-untyped-call]
    return result


def compiler_available(device: torch.device) -> bool:
    """Say whether `torch.compile` can build kernels here: a C++ compiler for the CPU, Triton for an accelerator."""
    if device.type != "cpu":
        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


@functools.cache
def compiled_functions() -> tuple[Kernel, Kernel]:
    """Return (round_weight, fake_quantize_input), their kernels compiled once per process with dynamic shapes."""
    rounding, gate = torch.compile(_round_formula, dynamic=True), torch.compile(_gate_formula, dynamic=True)
    weight_rounding = torch.compile(round_weight, dynamic=True)

    # One rank for all tensors: each further rank would be compiled again and count against Dynamo's limit.
    def flat(kernel: Kernel) -> Kernel:
        def run(first: Tensor, *rest: Any) -> Tensor:
            tensors = [first, *(item for item in rest if isinstance(item, Tensor) and item.dim())]
            if not all(tensor.is_contiguous() for tensor in tensors):
                return kernel(first, *rest)
            rows = [item.view(-1) if isinstance(item, Tensor) and item.dim() else item for item in rest]
            return kernel(first.view(-1), *rows).view(first.shape)

        return run

    def weights(weight: Tensor, bits: int = 8) -> Tensor:
        return weight_rounding(weight.detach().flatten(1), bits).view_as(weight)

    def inputs(value: Tensor, scale: Tensor, zero_point: Tensor, bits: int = 8) -> Tensor:
        return _rounded(value, (scale, zero_point, bits), flat(rounding), flat(gate))

    return weights, inputs


def forget_compiled_code() -> None:
    """Drop compiled graphs: Dynamo does not guard on hooks, so old code would run without (or with) ours."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()

"""The trained integers as a plain module of `quantized_decomposed` operators, for torch.export and what compiles it.

Inductor, ExecuTorch and other compilers of PyTorch know these operators and turn them into integer kernels.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401 - registers torch.ops.quantized_decomposed
from torch.nn import functional
from torch.utils import _pytree as pytree

from lightning_compress.errors import CompressError
from lightning_compress.export.integer import check_grids, layer_codes, scaled_codes
from lightning_compress.export.norms import called, norms_behind
from lightning_compress.export.replacing import written_at_the_end
from lightning_compress.export.tracing import Inputs, OpenSizes, evaluating, inputs_beside, open_shapes
from lightning_compress.export.verify import LEAST_SQNR_DB, sqnr_db
from lightning_compress.quantization.attach import QUANTIZABLE
from lightning_compress.quantization.attention import is_product_key
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.outputs import OutputRange, Ranges, outputs_of, rounded_as_trained
from lightning_compress.quantization.projections import projections_in

__all__ = ["ReferenceLayer", "export_program", "reference_module"]

Grid = tuple[float, int, int]  # scale, zero point, largest code


class ReferenceLayer(nn.Module):
    """A Linear or Conv layer that holds int8 codes and one float32 scale for each output channel.

    forward: x, any float tensor the layer takes -> conv or linear of the rounded x and the rounded weight, + bias.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Module, trained: Range, norm: nn.BatchNorm1d | nn.BatchNorm2d | None = None) -> None:
        super().__init__()
        weight, bias = layer.get_parameter("weight").detach(), getattr(layer, "bias", None)
        codes, scales = layer_codes(weight, trained)
        bias = None if bias is None else bias.detach()
        if norm is not None:
            codes, scales, bias = _folded(codes, scales, bias, norm)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", torch.zeros_like(scales, dtype=torch.int64))
        self.register_buffer("bias", bias)
        self.grid: Grid = trained.scale, trained.zero_point, 2**trained.bits - 1
        self.layer_options = _options(layer)

    def forward(self, value: Tensor) -> Tensor:
        """Return the layer's output, rounded as in training."""
        weight = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.codes, self.scales, self.zeros, 0, -128, 127, torch.int8
        )
        value = _rounded(value, self.grid)
        if self.layer_options is None:
            return functional.linear(value, weight, self.bias)
        return torch.convolution(value, weight, self.bias, *self.layer_options)


class _RoundOutput:
    """A forward hook that copies and pickles with its module."""

    def __init__(self, trained: OutputRange) -> None:
        self.grid: Grid = trained.scale, trained.zero_point, 2**trained.bits - 1

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return _rounded(output, self.grid)


def _rounded(value: Tensor, grid: Grid) -> Tensor:
    ops, (scale, zero_point, top) = torch.ops.quantized_decomposed, grid
    codes = ops.quantize_per_tensor(value, scale, zero_point, 0, top, torch.uint8)
    rounded: Tensor = ops.dequantize_per_tensor(codes, scale, zero_point, 0, top, torch.uint8)
    return rounded


def _folded(
    codes: Tensor, scales: Tensor, bias: Tensor | None, norm: nn.BatchNorm1d | nn.BatchNorm2d
) -> tuple[Tensor, Tensor, Tensor]:
    """Fold y = (x - mean) / sqrt(var + eps) * gamma + beta: codes change sign at most, scales take the factor."""
    if norm.running_mean is None or norm.running_var is None:
        raise CompressError("a batch norm without running statistics cannot be folded; train with them")
    factor = norm.running_var.add(norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight.detach()
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    shift = shift * factor if norm.bias is None else shift * factor + norm.bias.detach()
    return *scaled_codes(codes, scales, factor), shift


def _options(layer: nn.Module) -> tuple[Any, ...] | None:
    """Return a convolution's strides, padding, dilation, transposed, output padding and groups; None for a Linear."""
    if isinstance(layer, nn.Linear):
        return None
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise TypeError(f"expected a Linear or Conv layer, got {type(layer).__name__}")
    padding = layer.padding
    if padding == "same" and all(d * (k - 1) % 2 == 0 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)):
        padding = tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    if isinstance(padding, str) and padding != "valid":
        raise ValueError(f"expected padding that is the same on both sides, got '{padding}'; write it as numbers")
    padding = (0,) * len(layer.kernel_size) if isinstance(padding, str) else padding
    return layer.stride, padding, layer.dilation, False, (0,) * len(layer.kernel_size), layer.groups


def reference_module(module: nn.Module, ranges: Ranges, example_inputs: Inputs) -> nn.Module:
    """Return a copy of a module that computes with stored integers, batch norms folded. Runs after `fit`.

    It computes what the module inside `rounded_as_trained` does, but for the order of a rounding: codes that fall on a
    tie may differ by one. It is for inference; its `state_dict` has other keys than the module's.

    Args:
        module: the trained module; left as it was.
        ranges: `QuantizationAwareTraining.ranges()`.
        example_inputs: what `module(*inputs)` or, for a dict, `module(**inputs)` takes: shows which norm follows what.

    Raises:
        ValueError: a layer in `ranges` is none, has a forward of its own, padding that differs between sides, or grids
            without integer form.
    """
    layers, outputs = outputs_of(ranges)
    unplaced = [key for key in ranges if key in projections_in(module) or is_product_key(key)]
    if unplaced:
        raise ValueError(
            f"expected ranges of layers that the forward calls and of modules' outputs, got {unplaced} of attention; "
            "leave them out of ranges, and they stay in floating point"
        )
    norms = norms_behind(module, layers, inputs_beside(module, example_inputs))
    clone = copy.deepcopy(module).eval().requires_grad_(False)
    for name, trained in layers.items():
        layer = clone.get_submodule(name)
        plain = next((kind for kind in QUANTIZABLE if isinstance(layer, kind)), None)
        if (
            plain is None
            or type(layer).forward is not plain.forward
            or getattr(layer, "padding_mode", "zeros") != "zeros"
        ):
            raise ValueError(
                f"expected a plain Linear or zero-padded Conv layer in '{name}', got {layer}; leave it out"
            )
        check_grids(name, layer, trained)
        norm = clone.get_submodule(norms[name]) if name in norms else None
        clone.set_submodule(name, ReferenceLayer(layer, trained, norm))  # type: ignore[arg-type]
    for norm_name in set(norms.values()):
        clone.set_submodule(norm_name, nn.Identity())
    for name, trained_output in outputs.items():
        clone.get_submodule(name).register_forward_hook(_RoundOutput(trained_output))
    return clone


def export_program(
    module: nn.Module, path: str | Path, example_inputs: Inputs, *, ranges: Ranges, dynamic_batch: bool = True
) -> Path:
    """Write the reference module as a torch.export program (.pt2). Runs after `fit`.

    `path` appears only once the program has run on `example_inputs` and agrees with the fake-quantized module to 20 dB.

    Args:
        module: any module that torch.export can trace.
        path: the file to write; missing folders are made.
        example_inputs: a tuple for `module(*inputs)`, or a dict for `module(**inputs)`.
        ranges: `QuantizationAwareTraining.ranges()`.
        dynamic_batch: leave the first size of every input open.

    Raises:
        ValueError: as `reference_module`; the inputs' first sizes differ.
        CompressError: the program does not compute what the module does.
    """
    path, inputs = Path(path), inputs_beside(module, example_inputs)
    reference = reference_module(module, ranges, inputs)
    traced_with, shapes = open_shapes(inputs, OpenSizes(batch=dynamic_batch))
    args, kwargs = ((), traced_with) if isinstance(traced_with, dict) else (traced_with, {})
    dynamic = tuple(shapes) if isinstance(shapes, tuple) else shapes
    with torch.no_grad():
        program = torch.export.export(reference, args, kwargs, dynamic_shapes=dynamic, strict=False)
    with written_at_the_end(path, suffix=".pt2") as unfinished:
        torch.export.save(program, unfinished)
        with torch.no_grad():
            _compare(module, ranges, inputs, torch.export.load(unfinished).module())
    return path


def _compare(module: nn.Module, ranges: Ranges, inputs: Inputs, program: nn.Module) -> None:
    with evaluating(module), rounded_as_trained(module, ranges):
        expected = pytree.tree_leaves(called(module, inputs))
    for reference, got in zip(expected, pytree.tree_leaves(called(program, inputs)), strict=True):
        if not isinstance(reference, Tensor) or not reference.is_floating_point() or not reference.numel():
            continue
        ratio_db = sqnr_db(np.asarray(reference.cpu()), np.asarray(got.cpu()))
        if not ratio_db >= LEAST_SQNR_DB:
            raise CompressError(
                f"the exported program is not the fake-quantized module: {ratio_db:.1f} dB of signal to noise, "
                f"expected at least {LEAST_SQNR_DB:g}"
            )

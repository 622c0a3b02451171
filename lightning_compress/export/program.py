"""The trained integers as a plain module of `quantized_decomposed` operators, for torch.export and what compiles it.

Inductor, ExecuTorch and other compilers of PyTorch know these operators and turn them into integer kernels.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401 - registers torch.ops.quantized_decomposed
from torch.nn import functional

from lightning_compress.errors import CompressError
from lightning_compress.export.checked import Checked, File, checked, first_rows
from lightning_compress.export.integer import check_grids, layer_codes, scaled_codes
from lightning_compress.export.norms import called, norms_behind
from lightning_compress.export.replacing import written_at_the_end
from lightning_compress.export.tracing import Inputs, OpenSizes, evaluating, inputs_beside, open_shapes
from lightning_compress.export.verify import arrays_of
from lightning_compress.quantization.attach import QUANTIZABLE
from lightning_compress.quantization.attention import is_product_key
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.outputs import OutputRange, Ranges, outputs_of
from lightning_compress.quantization.projections import projections_in

__all__ = ["ReferenceLayer", "export_program", "reference_module", "traced_program"]

Grid = tuple[float, int, int, int]  # scale, zero point, smallest and largest code


class ReferenceLayer(nn.Module):
    """A Linear or Conv layer that holds int8 codes and one float32 scale for each output channel.

    forward: x, any float tensor the layer takes -> conv or linear of the rounded x and the rounded weight, + bias.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None

    def __init__(
        self,
        layer: nn.Module,
        trained: Range,
        norm: nn.BatchNorm1d | nn.BatchNorm2d | None = None,
        signed: bool = False,
    ) -> None:
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
        self.grid = _grid(trained, signed)
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

    def __init__(self, trained: OutputRange, signed: bool) -> None:
        self.grid = _grid(trained, signed)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return _rounded(output, self.grid)


def _grid(trained: Range | OutputRange, signed: bool) -> Grid:
    offset = 128 if signed else 0
    return trained.scale, trained.zero_point - offset, -offset, 2**trained.bits - 1 - offset


def _rounded(value: Tensor, grid: Grid) -> Tensor:
    ops, dtype = torch.ops.quantized_decomposed, torch.int8 if grid[2] < 0 else torch.uint8
    rounded: Tensor = ops.dequantize_per_tensor(ops.quantize_per_tensor(value, *grid, dtype), *grid, dtype)
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


def reference_module(module: nn.Module, ranges: Ranges, example_inputs: Inputs, *, signed: bool = False) -> nn.Module:
    """Return a copy of a module that computes with stored integers, batch norms folded. Runs after `fit`.

    It computes what the module inside `rounded_as_trained` does, but for the order of a rounding: codes that fall on a
    tie may differ by one. It is for inference; its `state_dict` has other keys than the module's.

    Args:
        module: the trained module; left as it was.
        ranges: `QuantizationAwareTraining.ranges()`.
        example_inputs: what `module(*inputs)` or, for a dict, `module(**inputs)` takes: shows which norm follows what.
        signed: store codes of inputs and outputs as int8, 128 less than the uint8 that they are otherwise.

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
        clone.set_submodule(name, ReferenceLayer(layer, trained, norm, signed))  # type: ignore[arg-type]
    for norm_name in set(norms.values()):
        clone.set_submodule(norm_name, nn.Identity())
    for name, trained_output in outputs.items():
        clone.get_submodule(name).register_forward_hook(_RoundOutput(trained_output, signed))
    return clone


def export_program(
    module: nn.Module,
    path: str | Path,
    example_inputs: Inputs,
    *,
    ranges: Ranges | None = None,
    dynamic_batch: bool = True,
) -> Checked:
    """Write a torch.export program (.pt2) of a module, or of its reference module. Runs after `fit`.

    `path` appears only once the file has been loaded, has run on `example_inputs` and agrees with the module: to 1e-3
    of the largest output in floats, to 20 dB (10 where inputs have fewer than 8 bits) with every rounding.

    Args:
        module: any module that torch.export can trace.
        path: the file to write; missing folders are made.
        example_inputs: a tuple for `module(*inputs)`, or a dict for `module(**inputs)`; real data, for the check.
        ranges: `QuantizationAwareTraining.ranges()`; None writes floats.
        dynamic_batch: leave the first size of every input open.

    Returns:
        The path with what the check found; its latency is that of the loaded program in eager mode.

    Raises:
        ValueError: as `reference_module`; the inputs' first sizes differ.
        CompressError: torch.export cannot trace `forward`, or the program does not compute what the module does.
    """
    module, path = getattr(module, "_orig_mod", module), Path(path)  # torch.compile wraps
    inputs, open_sizes = inputs_beside(module, example_inputs), OpenSizes(batch=dynamic_batch)
    with evaluating(module):
        traced = module if ranges is None else reference_module(module, ranges, inputs)
        # The file holds what it was traced with: two rows do where the batch is open.
        program = traced_program(traced, first_rows(inputs, 2) if dynamic_batch else inputs, open_sizes)
        with written_at_the_end(path, suffix=".pt2") as unfinished:
            torch.export.save(program, unfinished)
            loaded = torch.export.load(unfinished).module()
            return checked(
                File("program", path, unfinished.stat().st_size, lambda inputs: arrays_of(called(loaded, inputs))),
                module, inputs, ranges, open_sizes=open_sizes, timed_rows=1 if dynamic_batch else None,
            )  # fmt: skip


def traced_program(module: nn.Module, inputs: Inputs, open_sizes: OpenSizes) -> torch.export.ExportedProgram:
    """Return what torch.export makes of a module in eval mode.

    Raises:
        ValueError: a size is to be open in which the inputs differ.
        CompressError: torch.export cannot trace `forward`; with its reason.
    """
    traced_with, shapes = open_shapes(inputs, open_sizes)
    args, kwargs = ((), traced_with) if isinstance(traced_with, dict) else (traced_with, {})
    dynamic = tuple(shapes) if isinstance(shapes, tuple) else shapes
    try:
        with torch.no_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic, strict=False)
    except RuntimeError as error:
        raise CompressError(
            f"torch.export cannot trace {type(module).__name__}: {str(error).strip().partition(chr(10))[0]}; write "
            "forward without branches on values, or export the part that has none"
        ) from error

"""Biases on the grid where an integer kernel adds them, so that an int8 file computes what was measured before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_compress.export.integer import bias_scale, check_grids, integer_layer, layer_codes, scaled_codes
from lightning_compress.export.norms import norms_behind
from lightning_compress.export.tracing import Inputs, inputs_beside
from lightning_compress.quantization.attach import QUANTIZABLE
from lightning_compress.quantization.folding import folded
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.outputs import Ranges, outputs_of
from lightning_compress.quantization.projections import Projection, projections_in
from lightning_compress.sharding import clean_name

__all__ = ["round_biases"]


@torch.no_grad()
def round_biases(module: nn.Module, ranges: Ranges, example_inputs: Inputs) -> dict[str, float]:
    """Put the bias of each quantized layer on its kernel's grid, in place. Runs after `fit`, before test and export.

    An integer kernel adds its bias to whole numbers, in steps of s_x * s_w (Jacob et al. 2018, equation 11). Training
    leaves it between two steps; `export_onnx` has to round it, and this is nearly all that a file differs by from the
    module inside `rounded_as_trained`. Rounded here, the module that is tested is the one that is shipped. It matters
    most where inputs have few bits or a layer few weights, as a depthwise convolution has: there steps are large.

    Where a batch norm alone reads a convolution, the norm's bias takes the change, so that keys stay as they are.
    A norm without a bias, and a bias that several layers share, are left.

    Args:
        module: the trained module, in any mode.
        ranges: what was trained: `QuantizationAwareTraining.ranges()`, or of post-training.
        example_inputs: what `module(*inputs)` or, for a dict, `module(**inputs)` takes: shows which norm follows what.

    Returns:
        Name of a layer -> how far its bias moved at most, in the unit of the layer's (or the norm's) output.

    Raises:
        ValueError: a grid has no integer form.

    >>> net = nn.Sequential(nn.Linear(1, 1)).requires_grad_(False)
    >>> _ = net[0].weight.fill_(1.27), net[0].bias.fill_(0.123)
    >>> round_biases(net, {"0": Range(0.0, 25.5)}, (torch.ones(1, 1),)), net[0].bias.data  # steps of 0.1 * 0.01
    ({'0': 0.0}, tensor([0.1230]))
    >>> round_biases(net, {"0": Range(0.0, 255.0)}, (torch.ones(1, 1),)), net[0].bias.data  # steps of 1 * 0.01
    ({'0': 0.003}, tensor([0.1200]))
    """
    layers, _ = outputs_of(ranges)
    parts: dict[str, nn.Module] = dict(projections_in(module))
    parts |= {clean_name(name): part for name, part in module.named_modules(remove_duplicate=False)}
    norms = norms_behind(module, layers, inputs_beside(module, example_inputs))
    owners = [id(bias) for part in set(parts.values()) if (bias := _bias(part)) is not None]
    moved = {}
    for name, trained in layers.items():
        layer = parts[name] if name in parts else module.get_submodule(name)
        norm = parts[norms[name]] if name in norms else None
        own = _bias(norm or layer)
        if own is None or owners.count(id(own)) > 1 or not isinstance(layer, (*QUANTIZABLE, Projection)):
            continue
        check_grids(name, layer, trained)
        change = _to_the_grid(layer, norm, trained)
        own.add_(change)
        moved[name] = round(float(change.abs().max()), 9)
    return moved


def _bias(part: nn.Module) -> Tensor | None:
    if isinstance(part, Projection):
        return part.bias_rows
    return dict(part.named_parameters(recurse=False)).get("bias")


def _to_the_grid(layer: nn.Module, norm: nn.Module | None, trained: Range) -> Tensor:
    """Return what the bias of layer and norm lacks to the nearest code, (out,), as `integer_layer` makes codes."""
    codes, scale = layer_codes(layer.get_parameter("weight").detach(), trained)
    bias = _bias(layer)
    if norm is not None:
        factor, bias = folded(torch.ones_like(scale), bias, norm)
        codes, scale = scaled_codes(codes, scale, factor)
    bias = torch.zeros_like(scale) if bias is None else bias
    _, scale, bias_codes = integer_layer(codes, scale, bias, trained.scale)
    if bias_codes is None:
        return torch.zeros_like(bias)
    return (bias_codes.double() * bias_scale(trained.scale, scale).double() - bias.double()).to(bias.dtype)

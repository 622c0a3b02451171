"""Post-training quantization in one call: weights put on their grids, ranges calibrated, biases corrected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressError
from lightning_compress.pruning.calibration import evaluating, in_forward_order, run
from lightning_compress.pruning.hessians import RECONSTRUCTIBLE, Hessian, as_matrices, as_weight, watching
from lightning_compress.pruning.reconstruction import output_error
from lightning_compress.quantization.bias_correction import channel_means, correct_bias
from lightning_compress.quantization.calibration import calibrate, calibrated_layers
from lightning_compress.quantization.equalization import equalize
from lightning_compress.quantization.grid import Range, check_bits
from lightning_compress.quantization.ranges import RangeRule, min_max
from lightning_compress.select import Pattern

__all__ = ["Recipe", "Rounding", "quantize_post_training", "round_weights"]

Rounding = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Recipe:
    """What `quantize_post_training` does, in this order. Frozen: equal by value, its repr is the recipe.

    Args:
        equalized: scale channels between layers first (`equalize`); the function stays the same.
        rounding: puts the weights on their grids, in place: `error_feedback`, `adaptive_rounding`, `nearest`, or any
            `(weight, hessian, bits) -> weight`; options through `functools.partial`. None leaves them as they are:
            they are rounded to nearest, by abs-max, wherever the ranges are used.
        rule: makes a range of what was seen: `min_max`, `moving_average`, `percentile`, `mean_square_error`.
        bias_corrected: take the mean error out of the biases last (`correct_bias`).
    """

    equalized: bool = False
    rounding: Rounding | None = None
    rule: RangeRule = min_max
    bias_corrected: bool = False


def _matrix_weights(layers: Mapping[str, nn.Module], module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights to round by their layer's name; a shared one once, one tied to an embedding not at all."""
    embedded = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    weights: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        weight = layer.get_parameter("weight")
        known = id(weight) in embedded or any(weight is other for other in weights.values())
        if isinstance(layer, RECONSTRUCTIBLE) and not known:
            weights[name] = weight
    return weights


@torch.no_grad()
def _round_layer(name: str, layer: nn.Module, hessian: Hessian, rounding: Rounding, bits: int) -> float:
    weight, mean = layer.get_parameter("weight"), hessian.mean
    old = as_matrices(layer, weight.detach())
    try:
        new = rounding(old, mean, bits)
    except (ValueError, CompressError) as error:
        raise type(error)(f"'{name}' cannot be rounded: {error}") from error
    moved = output_error(old, new, mean)
    weight.copy_(as_weight(layer, new, weight.shape))
    return moved


def round_weights(
    module: nn.Module,
    batches: Iterable[Any],
    rounding: Rounding,
    bits: int = 4,
    include: Iterable[Pattern] | Pattern | None = None,
    exclude: Iterable[Pattern] | Pattern | None = None,
) -> dict[str, float]:
    """Put the weights of Linear, Conv1d and Conv2d layers on their grids, in place, layer by layer in forward order.

    Each layer is calibrated on what the rounded layers before it give: one pass over the batches a layer, and one
    Hessian at a time, inputs^2 numbers each; nothing else of the module is copied. Conv3d layers, and weights tied to
    an embedding, keep their weights.

    Args:
        module: in any mode; it runs in eval mode and is put back.
        batches: as `calibrate` takes them, held as a list.
        rounding: as in `Recipe`.
        bits: width of the code, sign included, 2 to 8.
        include: names, globs, class names or types; None is every such layer but the output head.
        exclude: the same, left as they are.

    Returns:
        Name of a layer -> its relative output error |X W - X W'|^2 / |X W|^2.

    Raises:
        ValueError: no batches, bits out of range, a pattern that matches nothing.
        NothingToCompress: nothing is selected.
        CompressError: NaN or infinite inputs, a layer that never runs; layers before the named one are rounded already.

    >>> from lightning_compress.quantization.error_feedback import error_feedback
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> list(round_weights(net, [torch.randn(32, 4)], error_feedback, bits=4))
    ['0']
    """
    inputs = list(batches)
    check_bits(bits)
    if not inputs:
        raise ValueError("rounding needs at least one batch of inputs to calibrate on, got none")
    weights = _matrix_weights(calibrated_layers(module, include, exclude), module)
    return round_in_order(module, inputs, weights, rounding, bits)


def round_in_order(
    module: nn.Module, inputs: list[Any], weights: Mapping[str, Tensor], rounding: Rounding, bits: int
) -> dict[str, float]:
    """Put given weights, by their layer's name, on their grids, as `round_weights` does after its checks."""
    errors: dict[str, float] = {}
    with evaluating(module), watching(module, weights) as hessians:
        order = in_forward_order(module, inputs, hessians.layers)
        missing = [name for name in weights if name not in order]
        if missing:
            raise CompressError(
                f"{missing} never run in these batches, so nothing says how to round them; calibrate with batches "
                f"that reach them, or exclude={missing}"
            )
        for name in order:
            hessians.start([name])
            run(module, inputs)
            errors[name] = _round_layer(name, hessians.layers[name][0], hessians[name], rounding, bits)
            hessians.stop([name])
    return errors


def quantize_post_training(
    module: nn.Module,
    batches: Iterable[Any],
    weight_bits: int = 8,
    input_bits: int = 8,
    method: Recipe | Rounding | None = None,
    include: Iterable[Pattern] | Pattern | None = None,
    exclude: Iterable[Pattern] | Pattern | None = None,
) -> dict[str, Range]:
    """Quantize a trained module from a few batches of its inputs, without training. Runs when a user calls it.

    The module keeps its classes, its keys and its float weights. By default nothing in it changes, and only ranges are
    returned. Equalization, rounding and bias correction change its weights and biases in place; rounded weights lie on
    the grids that the ranges' consumers find again, to the bit in float32.

    A later fit with `QuantizationAwareTraining` starts from these weights.

    Args:
        module: in any mode; it runs in eval mode and is put back.
        batches: inputs on the module's device: a tensor, a tuple or list of positional arguments, or a dict of keyword
            arguments each; held as a list.
        weight_bits: width of weight codes, 2 to 8.
        input_bits: width of input codes, 2 to 8.
        method: a `Recipe`; a rounding function alone is short for `Recipe(rounding=...)`, None for `Recipe()`.
        include: names, globs, class names or types; None is every Linear and Conv1d/2d/3d but the output head.
        exclude: the same, left in floating point.

    Returns:
        Name of a layer -> its range, for `export_onnx(ranges=...)` and `fake_quantized`.

    Raises:
        ValueError: no batches, bits out of range, a pattern that matches nothing.
        NothingToCompress: nothing is selected.
        CompressError: NaN or infinite inputs, a layer that never runs, an input that is always zero; each names it.
        IncompatibleCallbacks: a selected weight is reparametrized.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> ranges = quantize_post_training(net, [torch.tensor([[-1.0, 0.5]])], weight_bits=4)
    >>> list(ranges), ranges["0"].low, ranges["0"].weight_bits
    (['0'], -1.0, 4)
    """
    recipe = method if isinstance(method, Recipe) else Recipe(rounding=method)
    inputs = list(batches)

    def ranges() -> dict[str, Range]:
        return calibrate(module, inputs, input_bits, weight_bits, recipe.rule, include, exclude)

    found = ranges()  # first, so that bad input is named before anything has changed
    if recipe.equalized:
        equalize(module, inputs[0])
    layers = calibrated_layers(module, include, exclude)
    wanted = channel_means(module, inputs, layers) if recipe.bias_corrected else {}
    if recipe.rounding is not None:
        round_weights(module, inputs, recipe.rounding, weight_bits, include, exclude)
    if recipe.equalized or recipe.rounding is not None:
        found = ranges()
    if recipe.bias_corrected:
        correct_bias(module, inputs, found, wanted)
    return found

"""Weights of Linear layers at few bits, one scale for each group of inputs; inputs stay in floating point."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressError
from lightning_compress.quantization.clipping import codes_of, row_scale
from lightning_compress.quantization.error_feedback import check_group, error_feedback
from lightning_compress.quantization.grid import FLOAT_BITS, Range, check_bits, weight_scale
from lightning_compress.quantization.posttraining import round_in_order
from lightning_compress.quantization.weights import Symmetric
from lightning_compress.select import Pattern, patterns_or_none, select_weights

__all__ = ["group_codes", "quantize_weights", "round_groups", "weight_ranges"]


def group_codes(weight: Tensor, bits: int = 4, group: int | None = 128) -> tuple[Tensor, Tensor]:
    """Return the codes of a weight that lies on its grid, and the scale of each group. Runs where a file is written.

    Args:
        weight: (out, in), put on its grid by `quantize_weights` with the same `bits` and `group`.
        bits: width of the code, sign included.
        group: inputs that share a scale; None is one scale an output.

    Returns:
        (out, in) int8 and (out, in / group) float32; codes times scales are the weight, exactly if it is float32.

    >>> group_codes(torch.tensor([[7.0, -1.0, 0.5, 3.5]]), 4, 2)
    (tensor([[ 7, -1,  1,  7]], dtype=torch.int8), tensor([[1.0000, 0.5000]]))
    """
    check_group(group, weight.shape[1])
    rows = weight.detach().reshape(-1, group or weight.shape[1])
    scale = weight_scale(rows, bits)
    codes = (rows.float() / scale.unsqueeze(1)).round().to(torch.int8)
    return codes.view(weight.shape), scale.view(len(weight), -1)


@torch.no_grad()
def round_groups(weight: Tensor, bits: int = 4, group: int | None = 128) -> Tensor:
    """Round each group of a weight to the nearest point of its grid, whose scale has the least square error; pure.

    Args:
        weight: (out, in), any floating dtype.
        bits: width of the code, sign included.
        group: inputs that share a scale; None is one scale an output.

    >>> round_groups(torch.tensor([[3.0, 1.1, 30.0, 11.0]]), 3, 2)
    tensor([[ 3.,  1., 30., 10.]])
    """
    rows = weight.detach().reshape(-1, group or weight.shape[1])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    scale = row_scale(rows, bits)
    return (codes_of(rows, scale, bits) * scale).to(weight.dtype).view(weight.shape)


def quantize_weights(
    module: nn.Module,
    batches: Iterable[Any] | None = None,
    bits: int = 4,
    group: int | None = 128,
    include: Iterable[Pattern] | Pattern | None = None,
    exclude: Iterable[Pattern] | Pattern | None = None,
    damping: float = 0.01,
) -> dict[str, Tensor]:
    """Put the weights of Linear layers on a grid by group of inputs, in place. Runs when a user calls it.

    With batches by error feedback (`error_feedback`, GPTQ), layer by layer, each calibrated on what the rounded layers
    before it give: one pass over the batches a layer; memory beyond the module: a few matrices of inputs^2 numbers, one
    layer at a time. Without batches each weight is rounded to nearest, which needs no more than a copy of one weight.

    Args:
        module: in any mode; it runs in eval mode and is put back.
        batches: as `calibrate` takes them, held as a list; None rounds to nearest.
        bits: width of the code, sign included, 2 to 8.
        group: inputs that share a scale, a divisor of every selected layer's inputs; None is one scale an output.
        include: names, globs, class names or types; None is every Linear but the output head.
        exclude: the same, left as they are. A weight tied to an embedding is left too.
        damping: added to each Hessian's diagonal, by its mean.

    Returns:
        Name of a layer -> the scales of its groups, (out, in / group) float32; `group_codes` gives the codes too.

    Raises:
        ValueError: an empty list of batches, bits out of range, a group that does not divide a layer's inputs.
        NothingToCompress: nothing is selected.
        CompressError: NaN or infinite weights or inputs, a layer that never runs; layers before it are rounded already.

    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> {name: scale.shape for name, scale in quantize_weights(net, [torch.randn(16, 8)], group=4).items()}
    {'0': torch.Size([4, 2])}
    """
    check_bits(bits)
    inputs = None if batches is None else list(batches)
    if inputs is not None and not inputs:
        raise ValueError("error feedback needs at least one batch of inputs, got none; pass None to round to nearest")
    selected = select_weights(module, (nn.Linear,), patterns_or_none(include), patterns_or_none(exclude))
    weights = {name.removesuffix("weight").removesuffix("."): weight for name, weight in selected.items()}
    for name, weight in weights.items():
        check_group(group, weight.shape[1], name)
        if not bool(torch.isfinite(weight).all()):
            raise CompressError(f"expected finite weights, got NaN or infinity in '{name}'")
    if inputs is None:
        for weight in weights.values():
            weight.data.copy_(round_groups(weight, bits, group))
    else:
        feedback = functools.partial(error_feedback, group=group, damping=damping)
        round_in_order(module, inputs, weights, feedback, bits)
    return {name: group_codes(weight, bits, group)[1] for name, weight in weights.items()}


def weight_ranges(names: Iterable[str], bits: int = 4, group: int | None = 128) -> dict[str, Range]:
    """Return the ranges of layers whose weights `quantize_weights` has rounded, for exports. Runs after it.

    Args:
        names: of the layers, such as what `quantize_weights` returned.
        bits: as it was given.
        group: as it was given.

    >>> weight_ranges(["head"], group=None)["head"].weight_grid
    Symmetric(bits=4, group='channel')
    """
    grid = Symmetric(bits, group if group is not None else "channel")
    return {name: Range(0.0, 0.0, FLOAT_BITS, bits, grid) for name in names}

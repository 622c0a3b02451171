"""The weights of a module as they were rounded in training, as codes and scales where their grids have such."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_compress.packing.tensors import Codes, Version
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.outputs import Ranges, outputs_of
from lightning_compress.quantization.projections import weight_names
from lightning_compress.quantization.weight_only import group_codes
from lightning_compress.quantization.weights import Symmetric, output_first

__all__ = ["rounded_weights"]

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def rounded_weights(module: nn.Module, ranges: Ranges) -> dict[str, Callable[[], Version]]:
    """Return, by the key of each weight with a range, what rounds it and finds codes for it. Runs when it is packed.

    Nothing is rounded before it is asked for, so that a file is written one weight at a time. Codes are None where the
    grid has none, as floating formats, or none whose product with scales is the rounded weight to the bit.

    Raises:
        AttributeError: a range names no layer of the module.
    """
    layers = outputs_of(ranges)[0]
    names = weight_names(module, layers)
    found: dict[str, Callable[[], Version]] = {}
    for layer, trained in layers.items():
        name = names[layer]
        owner = module.get_submodule(name.rpartition(".")[0])
        groups = owner.groups if isinstance(owner, TRANSPOSED) else 0
        rounded = functools.partial(_rounded, module.get_parameter(name), trained, groups)
        found |= dict.fromkeys(_keys(module, owner, name.rpartition(".")[2]), rounded)
    return found


def _keys(module: nn.Module, owner: nn.Module, own: str) -> list[str]:
    """Every key of a weight whose layer stands in several places: they are rounded together."""
    places = (name for name, layer in module.named_modules(remove_duplicate=False) if layer is owner)
    return [f"{name}.{own}" if name else own for name in places]


@torch.no_grad()
def _rounded(parameter: Tensor, trained: Range, groups: int) -> Version:
    """A transposed convolution of several groups has no codes here: its channels lie in two dimensions."""
    weight = parameter.detach().cpu()
    rows = output_first(weight, groups) if groups else weight
    rounded = trained.weight_grid.rounded(rows, trained.weights_learned)
    pair = _codes(rows, trained)
    if groups:
        rounded = output_first(rounded, groups)
    if pair is None or groups > 1:
        return rounded, None
    integers = output_first(pair[0], groups).contiguous() if groups else pair[0]
    codes = Codes(integers, pair[1].reshape(-1), before=len(weight) if groups else 1)
    product = codes.product().to(weight.dtype)
    return (product, codes) if torch.equal(product, rounded) else (rounded, None)


def _codes(rows: Tensor, trained: Range) -> tuple[Tensor, Tensor] | None:
    grid = trained.weight_grid
    if isinstance(grid, Symmetric) and isinstance(grid.group, int):
        codes, scales = group_codes(rows.flatten(1), grid.bits, grid.group)
        return codes.view(rows.shape), scales
    return trained.codes(rows)

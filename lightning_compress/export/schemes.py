"""How one layer's codes and grids stand in the layout of compressed-tensors, which transformers and vLLM read.

The layout: https://github.com/vllm-project/compressed-tensors, version 0.11 and later. A layer has its codes, packed
into int32 where its inputs stay in floating point ("pack-quantized") and as int8 where they are rounded too
("int-quantized"), its scales, and the grid of its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.export.integer import layer_codes
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.inputs import PerToken
from lightning_compress.quantization.weight_only import group_codes
from lightning_compress.quantization.weights import Symmetric

__all__ = ["INTEGERS", "PACKED", "layer_tensors", "pack_codes", "scheme_of"]

PACKED, INTEGERS = "pack-quantized", "int-quantized"
WORD = 32  # bits

Scheme = dict[str, Any]


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes without gaps into 32-bit words, row by row, lowest bits first. Runs once a layer, at export.

    A code c is kept as c + 2^(bits - 1); one that crosses the end of a word goes on in the next.

    Args:
        codes: (rows, columns) integers in [-2^(bits - 1), 2^(bits - 1)).
        bits: 1 to 8.

    Returns:
        (rows, ceil(columns * bits / 32)) int32.

    >>> pack_codes(torch.tensor([[-8, -7, 7]]), 4), 0x0F10
    (tensor([[3856]], dtype=torch.int32), 3856)
    """
    rows, columns = codes.shape
    unsigned = (codes.to(torch.int64) + (1 << (bits - 1))).unsqueeze(-1)
    single = ((unsigned >> torch.arange(bits)) & 1).view(rows, columns * bits)
    words = torch.nn.functional.pad(single, (0, -single.shape[1] % WORD)).view(rows, -1, WORD)
    return (words << torch.arange(WORD)).sum(-1).to(torch.int32)  # bit 31 is the sign: int64 wraps to it


def scheme_of(name: str, layer: nn.Module, trained: Range) -> Scheme:
    """Return the layout's words for the grids of one layer: {"format", "weights", "input_activations"}.

    Raises:
        ValueError: a layer that is no Linear, or grids that the layout has no words for; with the layer's name.
    """
    if not isinstance(layer, nn.Linear):
        raise ValueError(  # noqa: TRY004 - the range is at fault, not an argument's type
            f"transformers and vLLM read integer weights of Linear layers, got {type(layer).__name__} for '{name}'; "
            f"leave '{name}' out of ranges: exclude it in training"
        )
    inputs = _inputs(name, trained)
    weights: Scheme = {"num_bits": max(2, trained.weight_grid.bits), "type": "int", "symmetric": True}
    group = _group(trained)
    if group is None:
        weights["strategy"] = "channel"
    elif inputs is None:
        weights |= {"strategy": "group", "group_size": group}
    else:
        raise ValueError(
            f"the layout has rounded inputs beside one scale for each output channel, got groups of {group} for "
            f"'{name}'; train it with inputs=None, or without groups"
        )
    return {"format": PACKED if inputs is None else INTEGERS, "weights": weights, "input_activations": inputs}


def _group(trained: Range) -> int | None:
    grid = trained.weight_grid
    return grid.group if isinstance(grid, Symmetric) and isinstance(grid.group, int) else None


def _inputs(name: str, trained: Range) -> Scheme | None:
    grid = trained.input_grid
    if grid is None:
        return None
    scheme: Scheme = {"num_bits": trained.bits, "type": "int"}
    if isinstance(grid, PerToken):
        return {**scheme, "symmetric": grid.symmetric, "strategy": "token", "dynamic": True}
    if grid.affine(torch.tensor(trained.low), torch.tensor(trained.high), trained.inputs_learned) is None:
        raise ValueError(
            f"the layout rounds inputs on one affine grid a tensor or a token, got {grid} for '{name}'; train it with "
            f"inputs=8 or inputs=None"
        )
    return {**scheme, "symmetric": False, "strategy": "tensor", "dynamic": False}


def layer_tensors(name: str, layer: nn.Module, trained: Range, scheme: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what stands in the file instead of a layer's weight, by the end of its key. Runs once a layer, at export.

    Raises:
        ValueError: the weight's grid has no codes.
    """
    weight, group, bits = layer.get_parameter("weight").detach().cpu(), _group(trained), scheme["weights"]["num_bits"]
    try:
        codes, scales = group_codes(weight, bits, group) if group is not None else layer_codes(weight, trained)
    except ValueError as error:
        raise ValueError(
            f"no integer codes for the weight of '{name}': {error}; leave '{name}' out of ranges"
        ) from error
    found = {"weight_scale": scales.view(len(weight), -1)}
    if scheme["format"] == PACKED:
        found |= {"weight_packed": pack_codes(codes, bits), "weight_shape": torch.tensor(weight.shape)}
    else:
        found["weight"] = codes
    inputs = scheme["input_activations"]
    if inputs is not None and not inputs["dynamic"]:
        signed = trained.zero_point - 2 ** (trained.bits - 1)  # the layout's codes are signed, ours are not
        found["input_scale"] = torch.tensor([trained.scale])
        found["input_zero_point"] = torch.tensor([signed], dtype=torch.int8)
    return found

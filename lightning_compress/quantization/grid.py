"""Grids: which real numbers an integer code stands for, and what training decided about a layer's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_compress.quantization.inputs import Affine, InputGrid
from lightning_compress.quantization.scales import SMALLEST_SCALE, check_bits, input_grid, weight_scale
from lightning_compress.quantization.weights import Symmetric, WeightGrid

__all__ = ["FLOAT_BITS", "SMALLEST_SCALE", "Range", "check_bits", "input_grid", "integer_weight", "weight_scale"]

FLOAT_BITS = 32


def integer_weight(weight: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Return the int8 codes of a weight and their scale of each output channel, as an exporter stores them.

    >>> codes, scale = integer_weight(torch.tensor([[1.27, -0.5]]))
    >>> codes
    tensor([[127, -50]], dtype=torch.int8)
    """
    scale = weight_scale(weight, bits)
    column = scale.view(-1, *[1] * (weight.dim() - 1))
    return (weight.detach().float() / column).round().to(torch.int8), scale


@dataclass(frozen=True)
class Range:
    """What training decided about one layer: the range of its input, and the grids of input and weight.

    The default grids follow from the widths alone: `Affine(bits)` for the input, where 32 bits stand for one that
    stays in floating point, and `Symmetric(weight_bits)` for the weight, whose scale is not kept because it follows
    from the weight. Other grids, and what they learned, stand in the last four fields; what was learned is not
    compared by `==`.
    """

    low: float
    high: float
    bits: int = 8
    weight_bits: int = 8
    weights: WeightGrid | None = None
    inputs: InputGrid | None = None
    weights_learned: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    inputs_learned: Mapping[str, Tensor] = field(default_factory=dict, compare=False)

    @property
    def weight_grid(self) -> WeightGrid:
        """The weight's grid."""
        return self.weights or Symmetric(self.weight_bits)

    @property
    def input_grid(self) -> InputGrid | None:
        """The input's grid; None for an input that stays in floating point."""
        return self.inputs or (None if self.bits == FLOAT_BITS else Affine(self.bits))

    @property
    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the input, computed in float32 exactly as in training.

        Raises:
            ValueError: the input stays in floating point, or its grid is not affine.
        """
        grid = self.input_grid
        affine = grid and grid.affine(torch.tensor(self.low), torch.tensor(self.high), self.inputs_learned)
        if not affine:
            raise ValueError(f"expected an input on an affine grid, got {grid}, which has no scale and zero point")
        return affine

    @property
    def scale(self) -> float:
        """Step of the input's grid."""
        return float(self.grid[0])

    @property
    def zero_point(self) -> int:
        """Code of the input value 0.0, in 0 .. 2^bits - 1."""
        return int(self.grid[1])

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return (int8 codes, scale of each output channel) of the layer's weight, as `WeightGrid.codes` does."""
        return self.weight_grid.codes(weight.detach(), self.weights_learned)

"""Scales: the arithmetic of the default grids. Affine uint for inputs, symmetric for weights."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SMALLEST_SCALE", "check_bits", "input_grid", "weight_scale"]

# Below it a scale is a denormal or zero: dividing by it overflows.
SMALLEST_SCALE = 1e-10


def weight_scale(weight: Tensor, bits: int = 8) -> Tensor:
    """Return the symmetric scale of each output channel: max |w| / (2^(bits-1) - 1).

    An all-zero channel (pruned away) gets scale 1, so that nothing divides by zero here or in an integer bias.
    Jacob et al. 2018, section 2.1, with zero point 0: zeros of pruning stay exactly zero.

    Args:
        weight: (out, ...), floating point.
        bits: width of the integer code, sign included.

    Returns:
        (out,) float32.

    >>> weight_scale(torch.tensor([[1.27, -0.5], [0.0, 0.0]]))
    tensor([0.0100, 1.0000])
    """
    largest = torch.linalg.vector_norm(weight.detach().flatten(1).float(), ord=float("inf"), dim=1)
    scale = (largest / (2 ** (bits - 1) - 1)).clamp_min(SMALLEST_SCALE)
    return torch.where(largest > 0, scale, torch.ones_like(scale))


def input_grid(low: Tensor, high: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of the affine grid over [low, high], widened to hold zero exactly.

    Jacob et al. 2018, section 3.1: scale = (high - low) / (2^bits - 1), zero point = round(-low / scale).

    Args:
        low: smallest observed values, any shape, float32.
        high: largest observed values, same shape.
        bits: width of the unsigned code.

    Returns:
        Scale and zero point, both float32 (the zero point is a whole number), same shape.

    >>> input_grid(torch.tensor(-1.0), torch.tensor(1.55))
    (tensor(0.0100), tensor(100.))
    """
    levels = 2**bits - 1
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = ((high - low) / levels).clamp_min(SMALLEST_SCALE)
    return scale, (-low / scale).round().clamp(0, levels)


def check_bits(bits: int) -> int:
    """Return a code width of 2 to 8 bits.

    >>> check_bits(8)
    8
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits is a whole number from 2 to 8, got {bits!r}")
    return bits

"""Scales of rounded weights, so chosen that a later abs-max rounding finds the same scale and the same codes.

Rounding by abs-max takes max |w| / (2^(bits-1) - 1). A weight that was put on a grid keeps that grid if some entry of
each row has the largest code, and if codes times scale are exact in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["exact_scale", "largest_code", "nearest", "row_scale"]

SIGNIFICANT = 1 << 16  # of a scale: with 7 bits of a code, 23 of float32's 24
SHRINKS = 40
NARROWEST = 0.2


def largest_code(bits: int) -> int:
    """Return 2^(bits-1) - 1, the largest code of a symmetric grid.

    >>> largest_code(4)
    7
    """
    return int(2 ** (bits - 1)) - 1


def exact_scale(scale: Tensor) -> Tensor:
    """Round a scale up to 16 significant bits: every code times it is exact in float32, and so is the way back.

    >>> scale = exact_scale(torch.tensor(0.1))
    >>> bool(127 * scale / 127 == scale), float(scale)
    (True, 0.1000...)
    """
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * SIGNIFICANT).ceil() / SIGNIFICANT, exponent)


def row_scale(weight: Tensor, bits: int, importance: Tensor | None = None, clipped: bool = True) -> Tensor:
    """Return one scale a row: abs-max, or shrunk to where rounding to nearest has the least square error.

    Searched at 41 sizes from 1 to 0.2 of the abs-max scale. Runs once a weight (or once a group of inputs).

    Args:
        weight: (..., inputs), float32 or float64.
        bits: width of the code, sign included.
        importance: (..., inputs) that broadcasts to `weight`: how much an input's square error counts, such as the
            Hessian's diagonal; None counts all alike.
        clipped: False is abs-max.

    Returns:
        (..., 1), `weight`'s dtype; 1 for a row of zeros.

    >>> row_scale(torch.tensor([[1.25, -0.5], [0.0, 0.0]]), 3, clipped=False)
    tensor([[0.4167],
            [1.0000]])
    """
    largest = weight.abs().amax(-1, keepdim=True)
    full = torch.where(largest > 0, largest / largest_code(bits), torch.ones_like(largest))
    best = full = exact_scale(full)
    least: Tensor | None = None
    for size in torch.linspace(1.0, NARROWEST, SHRINKS + 1).tolist() if clipped else ():
        scale = exact_scale(full * size)
        square = (codes_of(weight, scale, bits).mul_(scale) - weight).square_()
        error = (square if importance is None else square.mul_(importance)).sum(-1, keepdim=True)
        if least is None:
            least = error
            continue
        best, least = torch.where((error < least) & (largest > 0), scale, best), torch.minimum(error, least)
    return best


def codes_of(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the nearest codes, whole numbers in the weight's dtype.

    >>> codes_of(torch.tensor([1.26, -0.5, 9.0]), torch.tensor(0.5), 4)
    tensor([ 3., -1.,  7.])
    """
    largest = largest_code(bits)
    return (weight / scale).round_().clamp_(-largest, largest)


def nearest(weight: Tensor, hessian: Tensor, bits: int = 8, clipped: bool = True) -> Tensor:
    """Round each row to the nearest point of its grid; pure, once a layer.

    Args:
        weight: (..., outputs, inputs), any floating dtype.
        hessian: (..., inputs, inputs); its diagonal says how much each input counts for the choice of the scale.
        bits: width of the code, sign included.
        clipped: search the scale (`row_scale`); False is abs-max, so that rounding changes nothing that the fake
            quantization of training would not.

    >>> nearest(torch.tensor([[3.0, -1.1, 0.4]]), torch.eye(3), 3)
    tensor([[ 3., -1.,  0.]])
    """
    work = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    importance = hessian.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    scale = row_scale(work, bits, importance, clipped)
    return (codes_of(work, scale, bits) * scale).to(weight.dtype)

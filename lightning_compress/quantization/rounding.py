"""Rounding up or down as the layer's outputs ask for, not to nearest: AdaRound (Nagel et al. 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_compress.quantization.clipping import codes_of, largest_code, row_scale
from lightning_compress.quantization.error_feedback import check_matrices
from lightning_compress.quantization.scales import check_bits

__all__ = ["adaptive_rounding", "rectified_sigmoid", "rounding_regularizer"]

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # gamma and zeta of the paper
FIRST_BETA, LAST_BETA, WARM_UP = 20.0, 2.0, 0.2


def rectified_sigmoid(value: Tensor) -> Tensor:
    """Return clip(1.2 sigmoid(v) - 0.1, 0, 1): how far up each weight goes. Nagel et al. 2020, equation 23.

    >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return (torch.sigmoid(value) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0.0, 1.0)


def rounding_regularizer(up: Tensor, beta: float) -> Tensor:
    """Return sum of 1 - |2 h - 1|^beta, which is 0 once each h is 0 or 1. Nagel et al. 2020, equation 24.

    >>> rounding_regularizer(torch.tensor([0.0, 0.5, 1.0]), 20.0)
    tensor(1.)
    """
    return (1.0 - (2.0 * up - 1.0).abs().pow(beta)).sum()


def annealed_beta(progress: float) -> float:
    """Return beta at a fraction of the steps: 20 in the warm-up, then down to 2 on half a cosine.

    >>> annealed_beta(0.1), annealed_beta(0.6), annealed_beta(1.0)
    (20.0, 11.0, 2.0)
    """
    after = max(0.0, (progress - WARM_UP) / (1.0 - WARM_UP))
    return LAST_BETA + 0.5 * (FIRST_BETA - LAST_BETA) * (1.0 + math.cos(math.pi * after))


def _row_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    return ((difference @ hessian) * difference).sum(-1, keepdim=True)


def _learned(
    scaled: Tensor, scale: Tensor, hessian: Tensor, bits: int, steps: int, weigh: tuple[float, float]
) -> Tensor:
    """Return the codes after learning, for `scaled` = weight / scale."""
    regularizer, learning_rate = weigh
    floor, largest = scaled.floor(), largest_code(bits)
    share = ((scaled - floor) - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)
    variable = (-torch.log(1.0 / share - 1.0)).requires_grad_()
    size = (
        _row_errors((codes_of(scaled, torch.ones_like(scale), bits) - scaled) * scale, hessian).sum() / scaled.numel()
    )
    optimizer = torch.optim.Adam([variable], learning_rate)
    for step in range(steps):
        up = rectified_sigmoid(variable)
        codes = (floor + up).clamp(-largest, largest)
        # Of d H d^T, with d the weight's change, the gradient is 2 d H: one product, where autograd would make two.
        slope = ((codes.detach() - scaled) * scale) @ hessian * (2.0 * scale / size)
        loss = (slope * codes).sum()
        if step >= WARM_UP * steps:
            loss = loss + regularizer * rounding_regularizer(up, annealed_beta(step / steps))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return (floor + (variable.detach() >= 0)).clamp(-largest, largest)


def adaptive_rounding(
    weight: Tensor,
    hessian: Tensor,
    bits: int = 4,
    steps: int = 1000,
    regularizer: float = 10.0,
    learning_rate: float = 0.03,
    clipped: bool = True,
) -> Tensor:
    """Learn for each weight whether it is rounded up or down, so that W x changes least; pure, once a layer.

    W' = s clip(floor(W / s) + h(V), -q, q), minimize |W x - W' x|^2 + regularizer * sum(1 - |2 h(V) - 1|^beta) over V
    by Adam, beta from 20 to 2, no regularizer in the first fifth. Nagel et al. 2020, equations 21 to 25, with two
    changes: the error is the exact mean over all inputs, from their Hessian, not over drawn ones, and is divided by
    that of rounding to nearest, a weight. Rows are independent: one that nearest rounds better is rounded to nearest.
    Zeros stay zero, and the largest weight of each row keeps the largest code, so that rounding by abs-max gives the
    result back.

    Args:
        weight: (outputs, inputs) or (groups, outputs, inputs), any floating dtype; computed in float32 or wider.
        hessian: (inputs, inputs) or (groups, inputs, inputs); the mean, or any multiple, of x x^T.
        bits: width of the code, sign included, 2 to 8.
        steps: of Adam; each costs one product of the weight with the Hessian.
        regularizer: what makes h(V) decide.
        learning_rate: of Adam.
        clipped: search each row's scale for the least error (`row_scale`); False is abs-max.

    Returns:
        The weight on its grid, in the old one's shape and dtype.

    Raises:
        ValueError: bits or steps out of range, shapes that do not fit.
        CompressError: NaN or infinite numbers.

    >>> both = torch.ones(3, 3)  # three inputs that are always equal: two halves go up and down, not both down
    >>> adaptive_rounding(torch.tensor([[3.0, 0.45, 0.45]]), both, 3, 200, clipped=False).sum()
    tensor(4.)
    """
    check_bits(bits)
    if steps < 1:
        raise ValueError(f"steps is a whole number >= 1, got {steps!r}")
    if weight.dim() == 2:
        return adaptive_rounding(weight[None], hessian[None], bits, steps, regularizer, learning_rate, clipped)[0]
    check_matrices(weight, hessian)
    work = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    hessian = hessian.to(work.dtype)
    scale = row_scale(work, bits, hessian.diagonal(dim1=-2, dim2=-1).unsqueeze(-2), clipped)
    near = codes_of(work, scale, bits)
    fixed = (work == 0).scatter_(-1, work.abs().argmax(-1, keepdim=True), True)
    with torch.enable_grad():
        learned = _learned(work / scale, scale, hessian, bits, steps, (regularizer, learning_rate))
    codes = torch.where(fixed, near, learned)
    better = _row_errors(codes * scale - work, hessian) < _row_errors(near * scale - work, hessian)
    return (torch.where(better, codes, near) * scale).to(weight.dtype)

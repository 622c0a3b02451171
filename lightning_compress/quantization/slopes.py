"""Gradients by formula: a rounding's value, with the slope that a paper gives each of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["column", "straight", "with_slopes", "within"]

# Slope of each argument: a bool mask (1 or 0), a factor, or None (1 everywhere).
Slopes = Callable[..., tuple[Tensor | None, ...]]


def _scaled(gradient: Tensor, slope: Tensor | None) -> Tensor:
    if slope is None:
        return gradient
    if slope.dtype == torch.bool:  # not a product: an overflowing gradient times 0 would be NaN
        return torch.where(slope, gradient, 0.0)
    return gradient.to(slope.dtype) * slope


class _Sloped(torch.autograd.Function):
    """Rounding forward, slopes backward; only the arguments are kept between the two, no slope."""

    @staticmethod
    def forward(ctx: Any, rounding: Callable[..., Tensor], slopes: Slopes, *arguments: Tensor) -> Tensor:
        ctx.save_for_backward(*arguments)
        ctx.slopes = slopes
        return rounding(*(argument.detach() for argument in arguments))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        arguments = [argument.detach() for argument in ctx.saved_tensors]
        found: list[Tensor | None] = [None, None]
        for argument, slope, needed in zip(arguments, ctx.slopes(*arguments), ctx.needs_input_grad[2:], strict=True):
            gradient = _scaled(gradients[0], slope).sum_to_size(argument.shape) if needed else None
            found.append(gradient if gradient is None else gradient.to(argument.dtype))
        return tuple(found)


def with_slopes(rounding: Callable[..., Tensor], slopes: Slopes, *arguments: Tensor) -> Tensor:
    """Return `rounding(*arguments)`, whose gradient to each argument is the output's times its slope, summed to shape.

    Runs in each forward that rounds. While `torch.compile` or `torch.export` traces, the same is written as the value
    plus slopes times differences that are exactly 0, which fuses.

    Args:
        rounding: to the value; runs without gradient.
        slopes: to one slope an argument; runs without gradient, in the backward.
        arguments: tensors, each of a shape that expands to the value's.

    >>> x, clip = torch.tensor([0.4, 5.0], requires_grad=True), torch.tensor(2.0, requires_grad=True)
    >>> y = with_slopes(torch.minimum, lambda x, clip: (x < clip, x >= clip), x, clip)
    >>> y.sum().backward()
    >>> y.detach(), x.grad, clip.grad
    (tensor([0.4000, 2.0000]), tensor([1., 0.]), tensor(1.))
    """
    if not torch.is_grad_enabled():
        return rounding(*arguments)
    if torch.compiler.is_compiling():
        return _traced(rounding, slopes, *arguments)
    result: Tensor = _Sloped.apply(rounding, slopes, *arguments)  # type: ignore[no-untyped-call]
    return result


def _traced(rounding: Callable[..., Tensor], slopes: Slopes, *arguments: Tensor) -> Tensor:
    fixed = [argument.detach() for argument in arguments]
    value = rounding(*fixed)
    for argument, slope in zip(arguments, slopes(*fixed), strict=True):
        # An infinity has slope 0 by a mask; its difference to itself would be NaN.
        kept = argument if slope is None or slope.dtype != torch.bool else torch.where(slope, argument, 0.0)
        difference = kept - kept.detach()
        if slope is not None and slope.dtype != torch.bool:
            difference = difference * slope.detach()
        value = value + difference.to(value.dtype)
    return value


def straight(value: Tensor) -> tuple[None]:
    """Return the slope of a plain straight-through gradient, 1 everywhere (Bengio et al. 2013); for `with_slopes`.

    >>> straight(torch.ones(2))
    (None,)
    """
    return (None,)


def within(value: Tensor, low: Tensor | float, high: Tensor | float) -> tuple[Tensor]:
    """Return the slope of clipping to [low, high], ends included; for `with_slopes`.

    >>> within(torch.tensor([0.0, 2.0]), 0.0, 1.0)
    (tensor([ True, False]),)
    """
    wide = value.float()  # a bound beyond float16 would be compared as an infinity
    return ((wide >= low) & (wide <= high),)


def column(values: Tensor, weight: Tensor) -> Tensor:
    """Return one value a channel, (out,), so shaped that it multiplies a weight (out, ...); one for all stays ().

    >>> column(torch.ones(4), torch.ones(4, 3, 3)).shape
    torch.Size([4, 1, 1])
    """
    return values if values.dim() == 0 else values.view(-1, *[1] * (weight.dim() - 1))

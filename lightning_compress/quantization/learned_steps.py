"""Steps and clips that are learned with the weights: LSQ for weights; LSQ+ and PACT for inputs.

The roundings are plain functions with the gradients of their papers; the frozen classes are grids made of them, for
`QuantizationAwareTraining(weights=..., inputs=...)`, which keeps and steps what they learn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_compress.quantization.scales import SMALLEST_SCALE, check_bits
from lightning_compress.quantization.slopes import column, with_slopes

__all__ = ["LSQ", "PACT", "LSQPlus", "initial_step", "learned_affine", "learned_step", "pact"]


def _positive(step: Tensor) -> Tensor:
    # An optimizer may push a step to 0 or below; its gradient there is that of the smallest step, so it comes back.
    return step.clamp_min(SMALLEST_SCALE)


def _signed(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def initial_step(weight: Tensor, bits: int, *, per_channel: bool = False) -> Tensor:
    """Return the step that LSQ begins with: 2 <|w|> / sqrt(Qp), Qp = 2^(bits-1) - 1. Runs when fake-quant begins.

    Esser et al. 2020, "Learned Step Size Quantization", section 2.1. Where all weights are 0 the step is 1.

    Args:
        weight: (out, ...), floating point.
        bits: width of the code, sign included, 2 to 8.
        per_channel: one step for each output channel instead of one for the layer.

    Returns:
        () or (out,), float32.

    >>> initial_step(torch.tensor([[0.5, -1.5]]), 2)
    tensor(2.)
    """
    size = weight.detach().float().abs()
    total = size.flatten(1).sum(dim=1) if per_channel else size.sum()
    count = weight[0].numel() if per_channel and weight.shape[0] else weight.numel()
    step = 2.0 * total / max(count, 1) / math.sqrt(2 ** (bits - 1) - 1)
    return torch.where(step > 0, _positive(step), torch.ones_like(step))


def _round_step(value: Tensor, step: Tensor, lowest: int, highest: int) -> Tensor:
    size = _positive(step)
    return (value.float() / size).clamp_(lowest, highest).round_().mul_(size).to(value.dtype)


def _step_slopes(value: Tensor, step: Tensor, lowest: int, highest: int, factor: float) -> tuple[Tensor, Tensor]:
    position = value.float() / _positive(step)
    inside = (position > lowest) & (position < highest)
    position = position.clamp_(lowest, highest)
    return inside, torch.where(inside, position.round() - position, position).mul_(factor)


def learned_step(value: Tensor, step: Tensor, lowest: int, highest: int, factor: float = 1.0) -> Tensor:
    """Round to `step * clip(round(value / step), lowest, highest)`, with a gradient to the step. Runs in each forward.

    With v = value / step the slope of the step is round(v) - v inside the grid, `lowest` below and `highest` above;
    that of the value is 1 strictly inside and 0 outside. Esser et al. 2020, equations 1, 2, 3 and 5.

    Args:
        value: any shape, floating point; computed in float32.
        step: float32, of a shape that expands to the value's; what is not positive counts as the smallest step.
        lowest: smallest code, -Qn of the paper.
        highest: largest code, Qp of the paper.
        factor: multiplies the step's gradient: 1 / sqrt(N Qp) in section 2.2 of the paper.

    Returns:
        Same shape and dtype as `value`.

    >>> step = torch.tensor(0.5, requires_grad=True)
    >>> rounded = learned_step(torch.tensor([0.3, 9.0]), step, -2, 1)
    >>> rounded.sum().backward()
    >>> rounded.detach(), step.grad
    (tensor([0.5000, 0.5000]), tensor(1.4000))
    """
    return with_slopes(
        partial(_round_step, lowest=lowest, highest=highest),
        partial(_step_slopes, lowest=lowest, highest=highest, factor=factor),
        value,
        step,
    )


@dataclass(frozen=True)
class LSQ:
    """Weights on a uniform grid whose step is learned with them. Esser et al. 2020, "Learned Step Size Quantization".

    The code is -2^(bits-1) .. 2^(bits-1) - 1, zeros stay zeros, and large weights may be clipped. The gradient of the
    step is scaled by 1 / sqrt(N Qp), with N the number of weights that share it.

    Args:
        bits: width of the code, sign included, 2 to 8; a ValueError otherwise.
        per_channel: one step for each output channel; the paper has one a layer.
    """

    bits: int = 4
    per_channel: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def learned(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the first `step`: () or (out,), float32."""
        return {"step": initial_step(weight, self.bits, per_channel=self.per_channel)}

    def rounded(self, weight: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        """Return the weight on its grid."""
        step = column(learned["step"], weight)
        sharing = weight.numel() // max(step.numel(), 1)
        factor = 1.0 / math.sqrt(max(sharing, 1) * (2 ** (self.bits - 1) - 1))
        return learned_step(weight, step, *_signed(self.bits), factor)

    def codes(self, weight: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return int8 codes and the float32 step of each output channel."""
        step = _positive(learned["step"].detach())
        codes = (weight.detach().float() / column(step, weight)).clamp_(*_signed(self.bits)).round_()
        return codes.to(torch.int8), step.expand(weight.shape[0]).clone()


def _affine(step: Tensor, offset: Tensor, top: int, whole_zero: bool) -> tuple[Tensor, Tensor, Tensor | float]:
    """Step, lowest position and shift of the values: code + lowest = clip((x - shift) / step, lowest, lowest + top)."""
    size = _positive(step)
    if not whole_zero:
        return size, torch.zeros_like(size), offset
    return size, (offset / size).round().clamp(-top, 0), 0.0


def _round_affine(value: Tensor, step: Tensor, offset: Tensor, top: int, whole_zero: bool) -> Tensor:
    size, lowest, shift = _affine(step, offset, top, whole_zero)
    position = ((value.float() - shift) / size).clamp_(lowest, lowest + top)
    return position.round_().mul_(size).add_(shift).to(value.dtype)


def _affine_slopes(
    value: Tensor, step: Tensor, offset: Tensor, top: int, whole_zero: bool, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    size, lowest, shift = _affine(step, offset, top, whole_zero)
    position = (value.float() - shift) / size
    inside = (position > lowest) & (position < lowest + top)
    position = position.clamp_(lowest, lowest + top)
    step_slope = torch.where(inside, position.round() - position, position - lowest).mul_(factor)
    return inside, step_slope, torch.where(inside, 0.0, factor)


def learned_affine(
    value: Tensor, step: Tensor, offset: Tensor, bits: int, factor: float = 1.0, *, whole_zero: bool = True
) -> Tensor:
    """Round to `step * clip(round((value - offset) / step), 0, top) + offset`, top = 2^bits - 1. Runs in each forward.

    With v = (value - offset) / step: the slope of the step is round(v) - v inside, 0 below and top above; that of the
    offset is 0 inside and 1 outside; that of the value 1 inside and 0 outside. Bhalgat et al. 2020, "LSQ+", whose
    learned offset this is, with codes from 0.

    Args:
        value: any shape, floating point; computed in float32.
        step: () float32.
        offset: () float32, the value of code 0.
        bits: width of the unsigned code.
        factor: multiplies the gradients of step and offset.
        whole_zero: round the offset to a whole number of steps within the codes, straight through, as integer
            arithmetic needs it: a real 0.0 has a code and stays 0.0. False is the paper's letter.

    Returns:
        Same shape and dtype as `value`.

    >>> learned_affine(torch.tensor([-9.0, 0.0, 0.3]), torch.tensor(0.5), torch.tensor(-0.6), 2)
    tensor([-0.5000,  0.0000,  0.5000])
    >>> learned_affine(torch.tensor([-9.0, 0.0, 0.3]), torch.tensor(0.5), torch.tensor(-0.6), 2, whole_zero=False)
    tensor([-0.6000, -0.1000,  0.4000])
    """
    form = {"top": 2**bits - 1, "whole_zero": whole_zero}
    slopes = partial(_affine_slopes, **form, factor=factor)
    return with_slopes(partial(_round_affine, **form), slopes, value, step, offset)


def _features(value: Tensor) -> int:
    return max(value.numel() // max(value.shape[0], 1) if value.dim() > 1 else value.numel(), 1)


@dataclass(frozen=True)
class LSQPlus:
    """Inputs on an affine grid whose step and offset are learned. Bhalgat et al. 2020, "LSQ+".

    It begins with the observed range: step = (high - low) / (2^bits - 1), offset = low; the paper searches for the
    start of least square error instead. Gradients are scaled by 1 / sqrt(N Qp), with N the values of one example
    (Esser et al. 2020, section 2.2).

    Args:
        bits: width of the unsigned code, 2 to 8; a ValueError otherwise.
        learn_offset: False keeps the observed low end, and learns the step alone: LSQ, for inputs after a ReLU.
        whole_zero: let 0.0 have a code, as integer arithmetic needs it; False is the paper's letter, for which there
            is no integer export.
    """

    bits: int = 4
    learn_offset: bool = True
    whole_zero: bool = True

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def learned(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """Return the first `step` and `offset`, each () float32."""
        low, high = low.detach().float().clamp(max=0.0), high.detach().float().clamp(min=0.0)
        step = _positive((high - low) / (2**self.bits - 1))
        return {"step": step, "offset": low} if self.learn_offset else {"step": step}

    def rounded(self, value: Tensor, low: Tensor, high: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        """Return the input on its grid; the observed range is not looked at again but for an offset not learned."""
        factor = 1.0 / math.sqrt(_features(value) * (2**self.bits - 1))
        offset = learned["offset"] if self.learn_offset else low.detach().float().clamp(max=0.0)
        return learned_affine(value, learned["step"], offset, self.bits, factor, whole_zero=self.whole_zero)

    def affine(self, low: Tensor, high: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return scale and zero point; None where the offset is no whole number of steps."""
        if not self.whole_zero:
            return None
        offset = learned["offset"] if self.learn_offset else low.float().clamp(max=0.0)
        size, lowest, _ = _affine(learned["step"].detach(), offset.detach(), 2**self.bits - 1, True)
        return size, lowest.abs()


def _round_pact(value: Tensor, clip: Tensor, top: int) -> Tensor:
    step = _positive(clip) / top
    return (value.float() / step).clamp_(0, top).round_().mul_(step).to(value.dtype)


def _pact_slopes(value: Tensor, clip: Tensor, top: int) -> tuple[Tensor, Tensor]:
    above = value >= _positive(clip)
    return (value >= 0.0) & ~above, above


def pact(value: Tensor, clip: Tensor, bits: int) -> Tensor:
    """Clip to [0, clip] and round to 2^bits levels, with a gradient to the clip. Runs in each forward.

    The slope of the clip is 1 where value >= clip and 0 elsewhere; that of the value is 1 in [0, clip). Choi et al.
    2018, "PACT: Parameterized Clipping Activation", equations 1 to 3.

    >>> clip = torch.tensor(1.5, requires_grad=True)
    >>> rounded = pact(torch.tensor([-1.0, 0.6, 7.0]), clip, 2)
    >>> rounded.sum().backward()
    >>> rounded.detach(), clip.grad
    (tensor([0.0000, 0.5000, 1.5000]), tensor(1.))
    """
    top = 2**bits - 1
    return with_slopes(partial(_round_pact, top=top), partial(_pact_slopes, top=top), value, clip)


@dataclass(frozen=True)
class PACT:
    """Inputs that are never negative, clipped at a learned level. Choi et al. 2018, "PACT", section 4.

    It begins with the observed high end. The paper's L2 penalty on the clip is left out.

    Args:
        bits: width of the unsigned code, 2 to 8; a ValueError otherwise.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def learned(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """Return the first `clip`, () float32.

        Raises:
            ValueError: the observed input goes below 0.
        """
        if float(low) < 0.0:
            raise ValueError(
                f"PACT needs inputs that are never negative, as after a ReLU, got values down to {float(low):g}; use "
                f"LSQPlus({self.bits}) for this layer or exclude it"
            )
        return {"clip": _positive(high.detach().float())}

    def rounded(self, value: Tensor, low: Tensor, high: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        """Return the clipped input on its grid."""
        return pact(value, learned["clip"], self.bits)

    def affine(self, low: Tensor, high: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return scale and zero point, which is 0."""
        scale = _positive(learned["clip"].detach()) / (2**self.bits - 1)
        return scale, torch.zeros_like(scale)

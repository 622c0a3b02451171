"""Small grids with something to learn, written for the tests: a step for weights, a clipping bound for inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def rounded(value: Tensor) -> Tensor:
    """Nearest whole numbers, with the gradient of the identity."""
    return value + (value.round() - value).detach()


@dataclass(frozen=True)
class Step:
    """Signed codes times a learned step for the whole weight; gradients by autograd (Esser et al. 2020)."""

    bits: int = 4

    def learned(self, weight: Tensor) -> dict[str, Tensor]:
        return {"step": 2 * weight.float().abs().mean() / (2 ** (self.bits - 1) - 1) ** 0.5}

    def rounded(self, weight: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        top = 2 ** (self.bits - 1) - 1
        step = learned["step"].abs() + 1e-12
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return (rounded((wide / step).clamp(-top, top)) * step).to(weight.dtype)

    def codes(self, weight: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        top = 2 ** (self.bits - 1) - 1
        step = learned["step"].abs() + 1e-12
        return (weight / step).clamp(-top, top).round().to(torch.int8), step.expand(len(weight)).clone()


@dataclass(frozen=True)
class Bounds:
    """Unsigned codes over a learned range, whose ends start as the observed ones."""

    bits: int = 8

    def learned(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        return {"low": low.clamp(max=0.0), "high": high.clamp(min=0.0)}

    def rounded(self, value: Tensor, low: Tensor, high: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        low, high = learned["low"], learned["high"]
        step = (high - low).abs() / (2**self.bits - 1) + 1e-12
        clipped = torch.minimum(torch.maximum(value.float(), low), high)
        return (rounded((clipped - low) / step) * step + low).to(value.dtype)

    def affine(self, low: Tensor, high: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        return None

"""DoReFa: weights squeezed by tanh onto levels in [-1, 1], inputs clipped to [0, 1]; nothing is learned beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_compress.quantization.scales import SMALLEST_SCALE, check_bits
from lightning_compress.quantization.slopes import straight, with_slopes

__all__ = ["DoReFaInputs", "DoReFaWeights", "unit_steps"]


def _unit(value: Tensor, top: int) -> Tensor:
    scale = 1.0 / top  # divided and multiplied by, as the export's QuantizeLinear does
    return (value.float() / scale).clamp_(0, top).round_().mul_(scale).to(value.dtype)


def _unit_slopes(value: Tensor, top: int) -> tuple[Tensor]:
    return ((value >= 0.0) & (value <= 1.0),)


def unit_steps(value: Tensor, bits: int) -> Tensor:
    """Round to `round((2^bits - 1) x) / (2^bits - 1)` of x clipped to [0, 1]; gradient 1 there. Runs in each forward.

    Zhou et al. 2016, "DoReFa-Net", section 2.2; same shape and dtype.

    >>> unit_steps(torch.tensor([-1.0, 0.3, 9.0]), 2)
    tensor([0.0000, 0.3333, 1.0000])
    """
    top = 2**bits - 1
    return with_slopes(partial(_unit, top=top), partial(_unit_slopes, top=top), value)


def _odd_codes(normal: Tensor, weight: Tensor, top: int) -> Tensor:
    codes = ((normal.detach() / 2 + 0.5) * top).round_() * 2 - top
    return torch.where(weight.detach() == 0, 0.0, codes)


def _normal(weight: Tensor) -> Tensor:
    bounded = torch.tanh(weight.float())
    return bounded / bounded.abs().amax().clamp_min(SMALLEST_SCALE) if weight.numel() else bounded


@dataclass(frozen=True)
class DoReFaWeights:
    """Weights on 2^bits levels in [-1, 1] after tanh and division by its largest. Zhou et al. 2016, "DoReFa-Net".

    Section 2.3: `2 q(tanh(w) / (2 max |tanh(w)|) + 1/2) - 1`, q of `unit_steps` with the gradient straight through it,
    and the true gradient of the rest, its maximum included. The layer's weights change their size, so a norm has to
    follow it. The levels leave out 0; weights that are exactly 0 stay 0 all the same, as a further code.

    Args:
        bits: 2 to 8; a ValueError otherwise. For the paper's 1 bit take `Binary(per_channel=False)`.

    >>> DoReFaWeights(2).rounded(torch.tensor([[0.0, 9.0, -9.0, 0.1]]), {})
    tensor([[ 0.0000,  1.0000, -1.0000,  0.3333]])
    """

    bits: int = 4

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def learned(self, weight: Tensor) -> dict[str, Tensor]:
        """Return {}."""
        return {}

    def rounded(self, weight: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        """Return the weight on its grid."""
        top: int = 2**self.bits - 1

        def onto_grid(normal: Tensor) -> Tensor:
            return _odd_codes(normal, weight, top) * (1.0 / top)

        return with_slopes(onto_grid, straight, _normal(weight)).to(weight.dtype)

    def codes(self, weight: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return odd int8 codes, 0 for zeros, and the scale 1 / (2^bits - 1); None for 8 bits, which do not fit."""
        top = 2**self.bits - 1
        if top > 127:
            return None
        codes = _odd_codes(_normal(weight.detach()), weight, top).to(torch.int8)
        return codes, torch.full((weight.shape[0],), 1.0 / top, device=weight.device)


@dataclass(frozen=True)
class DoReFaInputs:
    """Inputs clipped to [0, 1] and rounded to 2^bits levels there. Zhou et al. 2016, "DoReFa-Net", section 2.4.

    For layers after an activation that is bounded like that; the observed range plays no part.

    Args:
        bits: width of the unsigned code, 2 to 8; a ValueError otherwise.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def learned(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """Return {}."""
        return {}

    def rounded(self, value: Tensor, low: Tensor, high: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        """Return the input on its grid."""
        return unit_steps(value, self.bits)

    def affine(self, low: Tensor, high: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return scale 1 / (2^bits - 1) and zero point 0."""
        return torch.full_like(high, 1.0 / (2**self.bits - 1)), torch.zeros_like(high)

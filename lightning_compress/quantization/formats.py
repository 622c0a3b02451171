"""Small floating-point formats, emulated through torch's own types: bf16, fp16, and fp8 with a scale.

Each class is a grid for `QuantizationAwareTraining(weights=..., inputs=...)`. The gradient is straight-through for
weights and one that is 0 beyond the range for inputs. They have no integer form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_compress.quantization.levels import largest_size, scale_onto
from lightning_compress.quantization.slopes import column, straight, with_slopes, within

__all__ = [
    "FloatInputs",
    "FloatWeights",
    "float_values",
]

FORMATS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}


def _format(name: str) -> torch.dtype:
    if name not in FORMATS:
        raise ValueError(f"a floating-point format is one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def float_values(value: Tensor, name: str, scale: Tensor | None = None) -> Tensor:
    """Round to the nearest value of a floating-point format, ties to even, without gradient. Runs in each forward.

    What is too large becomes the format's largest finite value: a plain conversion would make it infinite, or NaN in
    e4m3. IEEE 754 for fp16; Micikevicius et al. 2022, "FP8 Formats for Deep Learning", for the 8-bit ones (OCP OFP8).

    Args:
        value: any shape, floating point.
        name: bf16, fp16, e4m3 (the variant without infinities) or e5m2.
        scale: float32, divides before and multiplies after; expands to the value's shape.

    Returns:
        Same shape and dtype as `value`.

    >>> float_values(torch.tensor([1.1, 1000.0]), "e4m3")
    tensor([  1.1250, 448.0000])
    """
    dtype = _format(name)
    wide = value.detach().float() if scale is None else value.detach().float() / scale
    # Not the two ends of a clamp in the format itself: no arithmetic on 8-bit floats.
    rounded = wide.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).float()
    return (rounded if scale is None else rounded * scale).to(value.dtype)


@dataclass(frozen=True)
class FloatWeights:
    """Weights as a small floating-point format keeps them; 8-bit ones with a scale for each output channel.

    The scale of an 8-bit format is max |w| / its largest value. Micikevicius et al. 2022, section 3.

    Args:
        format: bf16, fp16 ("half precision"), e4m3 or e5m2; a ValueError otherwise.

    >>> FloatWeights("bf16").rounded(torch.tensor([[1.001, 0.0]]), {})
    tensor([[1., 0.]])
    """

    format: str = "bf16"

    def __post_init__(self) -> None:
        _format(self.format)

    @property
    def bits(self) -> int:
        """16 or 8."""
        return 8 * _format(self.format).itemsize

    def learned(self, weight: Tensor) -> dict[str, Tensor]:
        """Return {}."""
        return {}

    def rounded(self, weight: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        """Return the weight as the format keeps it."""
        return with_slopes(self._values, straight, weight)

    def _values(self, weight: Tensor) -> Tensor:
        if self.bits == 16:
            return float_values(weight, self.format)
        scale = scale_onto(largest_size(weight, per_channel=True), torch.finfo(_format(self.format)).max)
        return float_values(weight, self.format, column(scale, weight))

    def codes(self, weight: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return None."""
        return None


@dataclass(frozen=True)
class FloatInputs:
    """Inputs as a small floating-point format keeps them; 8-bit ones with one scale over the observed range.

    Args:
        format: bf16, fp16 ("half precision"), e4m3 or e5m2; a ValueError otherwise.
    """

    format: str = "bf16"

    def __post_init__(self) -> None:
        _format(self.format)

    @property
    def bits(self) -> int:
        """16 or 8."""
        return 8 * _format(self.format).itemsize

    def learned(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """Return {}."""
        return {}

    def rounded(self, value: Tensor, low: Tensor, high: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        """Return the input as the format keeps it; the gradient is 0 beyond its largest value."""
        top: Tensor | float = torch.finfo(_format(self.format)).max
        scale = None
        if self.bits == 8:
            scale = scale_onto(torch.maximum(-low, high), float(top))
            top = scale * top
        return with_slopes(
            partial(float_values, name=self.format, scale=scale), partial(within, low=-top, high=top), value
        )

    def affine(self, low: Tensor, high: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return None."""
        return None

"""Input grids: how a layer's input is rounded. The protocol, and affine grids by tensor or by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_compress.quantization import fake
from lightning_compress.quantization.scales import SMALLEST_SCALE, check_bits, input_grid

__all__ = ["Affine", "InputGrid", "PerToken"]


class InputGrid(Protocol):
    """How a layer's input is rounded. Its functions run in each forward of a layer once it rounds.

    A grid is a frozen dataclass: equal by value, and its repr is the recipe that a checkpoint keeps. Every tensor that
    training moves, such as a step, is in `learned`, owned by the callback.
    """

    @property
    def bits(self) -> int:
        """Width of a stored code."""
        ...

    def learned(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """Return start values, float32, of what training moves, from the observed range, () float32 each."""
        ...

    def rounded(self, value: Tensor, low: Tensor, high: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        """Return the rounded input, same shape and dtype, with its gradient to the input and what is learned."""
        ...

    def affine(self, low: Tensor, high: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return scale and zero point of an unsigned affine grid, () float32 each; None where it is none."""
        ...


@dataclass(frozen=True)
class Affine:
    """Round to the 2^bits points of an affine grid over the observed range, one for the whole tensor.

    Jacob et al. 2018, section 3.1; the gradient is 1 inside the range and 0 outside.

    Args:
        bits: width of the unsigned code, 2 to 8.

    >>> Affine(bits=2).rounded(torch.tensor([-5.0, 0.6, 9.0]), torch.tensor(0.0), torch.tensor(3.0), {})
    tensor([0., 1., 3.])
    """

    bits: int = 8

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def learned(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """Return {}: the grid follows from the range."""
        return {}

    def rounded(self, value: Tensor, low: Tensor, high: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        """Return the clipped and rounded input."""
        scale, zero_point = input_grid(low, high, self.bits)
        if torch.compiler.is_compiling():
            return fake.fake_quantize_input(value, scale, zero_point, self.bits)
        return fake.fake_quantize_input_eager(value, scale, zero_point, self.bits)

    def affine(self, low: Tensor, high: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return scale and zero point."""
        return input_grid(low, high, self.bits)


@dataclass(frozen=True)
class PerToken:
    """Round each row of the last dimension, such as a token's features, on a grid over its own values.

    Dynamic: what was observed in training plays no part, so no token is ever clipped. Symmetric,
    s = max|x| / (2^(bits-1) - 1) as in Yao et al. 2022 (ZeroQuant), section 4.1, or affine over the row's smallest and
    largest value. Meant for Linear: a row of an image is its width.

    Args:
        bits: width of the code, 2 to 8.
        symmetric: False gives each row a zero point too.

    >>> PerToken(bits=3).rounded(torch.tensor([[3.0, -1.1], [30.0, 11.0]]), torch.tensor(0.0), torch.tensor(1.0), {})
    tensor([[ 3., -1.],
            [30., 10.]])
    """

    bits: int = 8
    symmetric: bool = True

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def learned(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """Return {}: the grid follows from the row."""
        return {}

    def rounded(self, value: Tensor, low: Tensor, high: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        """Return the rounded input, computed in float32."""
        if value.numel() == 0:
            return value
        rows = value.detach().float()
        if not self.symmetric:
            scale, zero_point = input_grid(rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True), self.bits)
            return fake.fake_quantize_input(value, scale, zero_point, self.bits)
        scale = (rows.abs().amax(-1, keepdim=True) / (2 ** (self.bits - 1) - 1)).clamp_min(SMALLEST_SCALE)
        return fake.straight_through(value, ((rows / scale).round() * scale).to(value.dtype))

    def affine(self, low: Tensor, high: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return None: each row has its own."""
        return None

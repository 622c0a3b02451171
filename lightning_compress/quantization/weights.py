"""Weight grids: how a weight is rounded. The protocol, and symmetric grids by channel, tensor or group of inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_compress.quantization import fake
from lightning_compress.quantization.noise import round_at_random
from lightning_compress.quantization.scales import check_bits, weight_scale

__all__ = ["Symmetric", "WeightGrid", "output_first"]


class WeightGrid(Protocol):
    """How a weight is rounded. Its functions run in each forward of a layer; output channels are dimension 0.

    A grid is a frozen dataclass: equal by value, and its repr is the recipe that a checkpoint keeps. Every other tensor
    that training moves, such as a step, is in `learned`, owned by the callback.
    """

    @property
    def bits(self) -> int:
        """Width of a stored code."""
        ...

    def learned(self, weight: Tensor) -> dict[str, Tensor]:
        """Return start values, float32, of what training moves besides the weight; {} for most grids.

        Raises:
            ValueError: this grid cannot round such a weight. Called at `setup` too, for this check.
        """
        ...

    def rounded(self, weight: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        """Return the rounded weight, same shape and dtype, with its gradient to the weight and what is learned."""
        ...

    def codes(self, weight: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return int8 codes and a float32 scale of each output channel, (out,), whose product is the rounded weight.

        None where there is no such form.
        """
        ...


@dataclass(frozen=True)
class Symmetric:
    """Round to whole multiples of s = max|w| / (2^(bits-1) - 1), with a plain straight-through gradient.

    Zeros of pruning stay exactly zero and nothing is clipped. Jacob et al. 2018, section 2.1; the maximum is taken over
    an output channel, the whole weight, or `group` neighbouring entries of a flattened channel (a Linear's inputs).

    Args:
        bits: width of the code, sign included, 2 to 8.
        group: "channel", "tensor", or entries a group, which must divide a channel's entries.

    Raises:
        ValueError: an option out of its range; later, a weight that the groups do not divide.

    >>> Symmetric(bits=3, group=2).rounded(torch.tensor([[3.0, 1.1, 30.0, 11.0]]), {})
    tensor([[ 3.,  1., 30., 10.]])
    """

    bits: int = 8
    group: str | int = "channel"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        whole = isinstance(self.group, int) and not isinstance(self.group, bool) and self.group >= 1
        if not whole and self.group not in ("channel", "tensor"):
            raise ValueError(f"group is 'channel', 'tensor' or a number of inputs >= 1, got {self.group!r}")

    def learned(self, weight: Tensor) -> dict[str, Tensor]:
        """Return {}: the scale follows from the weight. Raises where groups do not divide it."""
        self._rows(weight)
        return {}

    def rounded(self, weight: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        """Return the rounded weight; same shape and dtype, the gradient is that of the identity."""
        return fake.straight_through(weight, self.values(weight))

    def codes(self, weight: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return int8 codes and the scale of each output channel; None for several groups in a channel.

        >>> Symmetric(group="tensor").codes(torch.tensor([[1.27, -0.5], [0.0, 0.2]]), {})
        (tensor([[127, -50],
                [  0,  20]], dtype=torch.int8), tensor([0.0100, 0.0100]))
        """
        rows = self._rows(weight)
        if len(rows) > len(weight):
            return None
        scale = weight_scale(rows, self.bits)
        codes = (rows.detach().float() / scale.unsqueeze(1)).round().to(torch.int8)
        return codes.view(weight.shape), scale.expand(len(weight)).contiguous()

    @torch.no_grad()
    def values(self, weight: Tensor) -> Tensor:
        """Return the rounded weight without gradient. Runs once per optimizer step where that is enough."""
        if self.group == "channel":
            return fake.round_weight(weight, self.bits)
        return fake.round_weight(self._rows(weight), self.bits).view(weight.shape)

    @torch.no_grad()
    def values_at_random(self, weight: Tensor, noise: Tensor) -> Tensor:
        """Return the weight rounded up or down by noise of its shape, without gradient (`noise.round_at_random`)."""
        rows = self._rows(weight)
        return round_at_random(rows, weight_scale(rows, self.bits), noise.view_as(rows), self.bits).view(weight.shape)

    def _rows(self, weight: Tensor) -> Tensor:
        """View a weight as (scales, entries that share one)."""
        if self.group == "channel":
            return weight.flatten(1)
        if self.group == "tensor":
            return weight.reshape(1, -1)
        size = int(self.group)
        entries = weight[0].numel()
        if entries % size:
            raise ValueError(
                f"group={size} does not divide the {entries} entries of an output channel of the weight "
                f"{tuple(weight.shape)}; take a divisor of {entries}, or 'channel'"
            )
        return weight.reshape(-1, size)


def output_first(weight: Tensor, groups: int) -> Tensor:
    """Return a transposed convolution's weight (in, out/groups, ...) as (out, in/groups, ...). Runs before a grid.

    It exchanges two dimensions within each group, so it is its own inverse, and runs after the grid too.

    >>> output_first(torch.zeros(6, 2, 5, 5), groups=3).shape
    torch.Size([6, 2, 5, 5])
    >>> output_first(torch.zeros(4, 8, 5), groups=1).shape
    torch.Size([8, 4, 5])
    """
    return weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)

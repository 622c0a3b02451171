"""Which entry of a codebook each weight has, and what is done alike to all weights of an entry."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.pruning.masks import pack_mask, unpack_mask
from lightning_compress.weight_sharing.codebook import Start, found_entries, linear

__all__ = ["Codes", "found_codes", "pack_codes", "unpack_codes"]


@dataclass(frozen=True)
class Codes:
    """The entry of each weight, of one tensor.

    Args:
        entry: int32, of the weight's shape; 0 is the entry of zeros, which stay zeros.
        counts: (entries + 1,) float64, weights an entry; at least 1 but for that of zeros.
    """

    entry: Tensor
    counts: Tensor

    @classmethod
    def of(cls, entry: Tensor) -> Codes:
        """Count the weights of each entry.

        >>> Codes.of(torch.tensor([0, 2, 1, 2], dtype=torch.int32)).counts
        tensor([1., 1., 2.], dtype=torch.float64)
        """
        return cls(entry, torch.bincount(entry.flatten()).double())

    @torch.no_grad()
    def average(self, values: Tensor, zeros: bool) -> None:
        """Give all members of an entry their mean, in place. Runs on gradients, on moments, and after each step.

        The mean of gradients is the codebook's gradient (Han et al. 2016, equation 3) divided by the number of members:
        the steepest descent among weights that stay shared. It takes n members as far as each would go alone; the sum,
        at the same learning rate, n times as far.

        Args:
            values: the weight's shape, any floating dtype; summed in float64, so that equal values stay as they are.
            zeros: set those of the entry of zeros to zero; False averages them too.

        >>> weight = torch.tensor([0.5, 1.0, 2.0, 4.0])
        >>> Codes.of(torch.tensor([0, 1, 2, 2], dtype=torch.int32)).average(weight, zeros=True)
        >>> weight
        tensor([0., 1., 3., 3.])
        """
        flat = self.entry.flatten()
        sums = torch.zeros_like(self.counts).index_add_(0, flat, values.flatten().double())
        means = (sums / self.counts.clamp(min=1)).to(values.dtype)
        if zeros:
            means[0] = 0.0
        values.copy_(means.index_select(0, flat).view_as(values))

    def to(self, device: torch.device) -> Codes:
        """Return these codes on a device."""
        return Codes(self.entry.to(device), self.counts.to(device))


def found_codes(weight: Tensor, entries: int, start: Start = linear) -> Codes:
    """Return the codes of a weight by k-means. Zeros have an entry of their own, which is one of `entries`.

    Args:
        weight: any shape, finite.
        entries: 2 to 256.
        start: of k-means.

    >>> found_codes(torch.tensor([0.0, 1.0, 1.2, -3.0]), 3).entry
    tensor([0, 2, 2, 1], dtype=torch.int32)
    """
    return Codes.of(found_entries(weight, entries, start)[0].int())


def pack_codes(codes: Codes) -> Tensor:
    """Return the codes in as few bits a weight as number them, plane after plane, (planes, bytes) uint8.

    >>> pack_codes(Codes.of(torch.tensor([0, 2, 1], dtype=torch.int32)))
    tensor([[32],
            [64]], dtype=torch.uint8)
    """
    planes = max(1, math.ceil(math.log2(len(codes.counts))))
    return torch.stack([pack_mask((codes.entry >> plane & 1).bool()) for plane in range(planes)])


def unpack_codes(packed: Tensor, shape: torch.Size) -> Codes:
    """Return the codes of a weight of the given shape.

    Raises:
        ValueError: they are of another size.

    >>> unpack_codes(torch.tensor([[32], [64]], dtype=torch.uint8), torch.Size([3])).entry
    tensor([0, 2, 1], dtype=torch.int32)
    """
    entry = torch.zeros(shape, dtype=torch.int32)
    for plane, bits in enumerate(packed):
        entry |= unpack_mask(bits, shape).int() << plane
    return Codes.of(entry)

"""Which piece of a tensor a process holds, and how pieces and wholes are made of each other; no communication."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Part"]


@dataclass(frozen=True)
class Part:
    """The piece of a tensor that this process holds: a box of it, or a slice of it flattened.

    Args:
        shape: of the whole.
        start: where the piece begins: an index for each dimension, or one number for a slice.
        size: the piece's own shape.
        counted: whether the piece counts in sums over processes: of replicas, one does.
        replicated: whether every process holds the whole; one that does may be alone with it.
        borders: along each dimension, where pieces of any process begin and end; () if the own ones are all there are.
    """

    shape: torch.Size
    start: tuple[int, ...]
    size: torch.Size
    counted: bool = True
    replicated: bool = False
    borders: tuple[frozenset[int], ...] = ()

    @property
    def flat(self) -> bool:
        """Whether the piece is a slice of the flattened whole."""
        return len(self.start) != len(self.shape)

    def divides(self, dim: int, extent: int) -> bool:
        """Say whether no process's border along a dimension cuts groups of `extent`: the same answer on all of them.

        >>> Part(torch.Size([8]), (4,), torch.Size([4]), borders=(frozenset({0, 3, 4, 8}),)).divides(0, 4)
        False
        """
        own = {self.start[dim], self.start[dim] + self.size[dim]} if not self.flat else {1}
        return all(border % extent == 0 for border in (self.borders[dim] if self.borders else own))

    def cut(self, tensor: Tensor) -> Tensor:
        """Return this process's piece of a whole.

        >>> Part(torch.Size([2, 2]), (1, 0), torch.Size([1, 2])).cut(torch.arange(4).view(2, 2))
        tensor([[2, 3]])
        """
        if self.flat:
            return tensor.reshape(-1)[self.start[0] : self.start[0] + self.size.numel()].clone()
        for dim, (start, size) in enumerate(zip(self.start, self.size, strict=True)):
            tensor = tensor.narrow(dim, start, size)
        return tensor.contiguous()

    def placed(self, piece: Tensor) -> Tensor:
        """Return a whole that is zero but for this process's piece.

        >>> Part(torch.Size([2, 2]), (3,), torch.Size([1])).placed(torch.ones(1))
        tensor([[0., 0.],
                [0., 1.]])
        """
        tensor = piece.new_zeros(self.shape)
        target = tensor.view(-1) if self.flat else tensor
        for dim, (start, size) in enumerate(zip(self.start, self.size, strict=True)):
            target = target.narrow(dim, start, size)
        target.copy_(piece)
        return tensor

    def positions(self, indices: Tensor) -> Tensor:
        """Return the places in the flattened whole of places in the flattened piece.

        >>> Part(torch.Size([2, 4]), (0, 2), torch.Size([2, 2])).positions(torch.tensor([0, 2]))
        tensor([2, 6])
        """
        if self.flat:
            return indices + self.start[0]
        found, stride = torch.zeros_like(indices), 1
        for start, size, extent in zip(*(reversed(each) for each in (self.start, self.size, self.shape)), strict=True):
            found += (indices % max(size, 1) + start) * stride
            indices, stride = indices // max(size, 1), stride * extent
        return found

    def viewed(self, view: tuple[int, ...]) -> Part | None:
        """Return the piece of the whole in another shape, whose last dimension takes in the rest; None if it is none.

        >>> Part(torch.Size([4, 2, 3]), (2, 0, 0), torch.Size([2, 2, 3])).viewed((4, 6)).size
        torch.Size([2, 6])
        """
        if self.flat or tuple(self.shape) == view:
            return None if self.flat else self
        last, rest = len(view) - 1, math.prod(self.shape[len(view) :])
        if not all(self.divides(dim, self.shape[dim]) for dim in range(len(view), len(self.shape))):
            return None
        size = torch.Size((*self.size[:last], self.size[last] * rest))
        start = (*self.start[:last], self.start[last] * rest)
        seen = self.borders[: len(view)]
        borders = (*seen[:last], frozenset(border * rest for border in seen[last])) if seen else ()
        return Part(torch.Size(view), start, size, self.counted, self.replicated, borders)

    def tiled(self, extents: tuple[int, ...]) -> Part | None:
        """Return the piece of the tiles that tile the whole; None if the piece's border cuts one.

        >>> Part(torch.Size([4, 4]), (2, 0), torch.Size([2, 4])).tiled((1, 4)).shape
        torch.Size([4, 1])
        """
        if self.flat or not all(self.divides(dim, extent) for dim, extent in enumerate(extents)):
            return None
        shape, start, size = (
            [each // extent for each, extent in zip(each_dim, extents, strict=True)]
            for each_dim in (self.shape, self.start, self.size)
        )
        borders = tuple(
            frozenset(b // extent for b in each) for each, extent in zip(self.borders, extents, strict=False)
        )
        return Part(torch.Size(shape), tuple(start), torch.Size(size), self.counted, self.replicated, borders)

"""Masks on the data: multiply a weight in place after each optimizer step; no reparametrization, no new key."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_mask", "pack_mask", "unpack_mask"]

# Small enough that the widened mask of one piece stays in a core's cache.
PIECE = 1 << 17
SAME_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def apply_mask(value: Tensor, mask: Tensor) -> None:
    """Zero, in place, what the mask drops (False). Runs after each optimizer step and on each gradient.

    Bits are multiplied, not floats: NaN, infinity and -0.0 all become +0.0, and no temporary of the weight's size is
    made.

    Args:
        value: any shape and floating dtype.
        mask: bool, same shape, True = keep.

    >>> weight = torch.tensor([1.0, float("nan")])
    >>> apply_mask(weight, torch.tensor([True, False]))
    >>> weight
    tensor([1., 0.])
    """
    integers = value.detach().view(SAME_WIDTH[value.element_size()])
    if not integers.is_contiguous():
        integers.mul_(mask.view(torch.int8))
        return
    pieces, kept = torch.split(integers.view(-1), PIECE), torch.split(mask.reshape(-1).view(torch.int8), PIECE)
    for piece, keep in zip(pieces, kept, strict=True):
        piece.mul_(keep)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool mask to one bit a weight, first weight in the highest bit (as numpy.packbits does).

    >>> pack_mask(torch.tensor([True, False, True]))
    tensor([160], dtype=torch.uint8)
    """
    flat = mask.detach().reshape(-1).cpu()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8).to(torch.uint8)
    return (padded << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: torch.Size) -> Tensor:
    """Return the bool mask of the given shape from its packed bits.

    Raises:
        ValueError: the packed mask is of another size.

    >>> unpack_mask(torch.tensor([160], dtype=torch.uint8), torch.Size([3]))
    tensor([ True, False,  True])
    """
    if packed.numel() != -(-shape.numel() // 8):
        raise ValueError(f"a mask of {packed.numel()} bytes does not fit {tuple(shape)} ({shape.numel()} weights)")
    bits = (packed.unsqueeze(1) >> torch.arange(7, -1, -1, dtype=torch.uint8)) & 1
    return bits.view(-1)[: shape.numel()].view(shape).bool()

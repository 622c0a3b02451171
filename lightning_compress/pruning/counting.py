"""Counts over processes: what is sent to find one threshold, whatever the size of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.sharding import all_reduce_max, all_reduce_sum

__all__ = ["BINS", "DIGIT", "kth_place", "summed"]

DIGIT = 16
BINS = 1 << DIGIT


def summed(counts: Tensor, total: int) -> Tensor:
    """Sum counts over processes, in as few bytes as they need: half where no score is negative, and 32 bits.

    Args:
        counts: int64 (BINS,), of digits; the lower half is of negative scores in the first pass.
        total: their sum over all processes, -1 in the first pass.

    >>> int(summed(torch.ones(BINS, dtype=torch.int64), -1).sum())
    65536
    """
    middle = BINS // 2
    begin = 0
    if total < 0:  # the first pass: what the processes have is not known yet
        negative, total = all_reduce_sum(torch.stack([counts[:middle].sum(), counts.sum()])).tolist()
        begin = 0 if negative else middle
    narrow = torch.int32 if total < 1 << 31 else torch.int64
    summed = torch.zeros_like(counts)
    summed[begin:] = all_reduce_sum(counts[begin:].to(narrow))
    return summed


def kth_place(places: Tensor, k: int) -> int:
    """Return the k-th smallest of numbers that lie on several processes; every process calls it.

    Radix selection by 12 bits at a time: 32 KiB a pass, four passes for a trillion places.

    Args:
        places: int64, not negative; none on some processes.
        k: 1-based rank over all processes.

    >>> kth_place(torch.tensor([70_000, 3, 4096]), 2)
    4096
    """
    largest = int(all_reduce_max(places.max().view(1) if len(places) else places.new_zeros(1)))
    prefix = 0
    for shift in range(max(0, largest.bit_length() - 1) // 12 * 12, -1, -12):
        near = places[(places >> (shift + 12)) == prefix]
        running = all_reduce_sum(torch.bincount((near >> shift) & 4095, minlength=4096)).cumsum(0)
        digit = int(torch.searchsorted(running, k))
        k -= int(running[digit - 1]) if digit else 0
        prefix = (prefix << 12) | digit
    return prefix

"""The exact k-th smallest of many score tensors, by radix selection on the bits of non-negative floats.

A non-negative float and its bits, read as an integer, have the same order. One histogram of the high bits over all
tensors finds the bin of the k-th score, a second one its low bits: two passes, a few hundred KiB, no concatenation,
no sort, and histograms can be summed over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Threshold", "keep_masks", "kth_smallest"]

CHUNK = 1 << 20
LAYOUT: dict[torch.dtype, tuple[torch.dtype, tuple[int, ...]]] = {
    torch.float32: (torch.int32, (16, 15)),
    torch.bfloat16: (torch.int16, (15,)),
    torch.float16: (torch.int16, (15,)),
    torch.float64: (torch.int64, (16, 16, 16, 15)),
}


@dataclass(frozen=True)
class Threshold:
    """The k-th smallest score: its value, its bits, and how many scores equal to it belong to the k."""

    value: float
    bits: int
    ties: int


def _ordered_bits(scores: Tensor) -> Tensor:
    integer, digits = LAYOUT[scores.dtype]
    return scores.detach().contiguous().view(integer).bitwise_and((1 << sum(digits)) - 1)


def _chunks(scores: Tensor) -> Iterator[Tensor]:
    return iter(torch.split(scores.reshape(-1), CHUNK)) if scores.numel() else iter(())


def _histogram(scores: Sequence[Tensor], prefix: int, above: int, width: int) -> Tensor:
    """Count the `width` bits under the `above` lowest bits' edge, among scores whose higher bits are `prefix`."""
    counts = torch.zeros(1 << width, dtype=torch.int64, device=scores[0].device)
    below = above - width
    for tensor in scores:
        for chunk in _chunks(tensor):
            bits = _ordered_bits(chunk)
            if prefix >= 0:
                bits = bits[(bits >> above) == prefix]
            counts += torch.bincount((bits >> below) & ((1 << width) - 1), minlength=1 << width)
    return counts


def _identity(counts: Tensor) -> Tensor:
    return counts


def kth_smallest(scores: Sequence[Tensor], k: int, reduce: Callable[[Tensor], Tensor] = _identity) -> Threshold:
    """Return the k-th smallest score over all tensors, exactly. Runs at each mask update.

    Args:
        scores: non-negative float64, float32, bfloat16 or float16 tensors of one dtype, any shapes; -0.0 counts as 0.0.
        k: 1-based rank over all tensors (and all processes).
        reduce: sums an int64 histogram over processes; one call a pass.

    Raises:
        ValueError: k out of range, mixed or unsupported dtypes.

    >>> kth_smallest([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0])], k=2)
    Threshold(value=2.0, bits=1073741824, ties=1)
    """
    dtypes = {tensor.dtype for tensor in scores}
    if len(dtypes) != 1 or not dtypes <= LAYOUT.keys():
        raise ValueError(
            f"expected scores of one dtype among float64, float32, bfloat16, float16, got {sorted(map(str, dtypes))}"
        )
    integer, widths = LAYOUT[scores[0].dtype]
    prefix, rank, above = -1, k, sum(widths)
    for width in widths:
        running = reduce(_histogram(scores, prefix, above, width)).cumsum(0)
        if not 1 <= rank <= int(running[-1]):
            raise ValueError(f"expected k in 1 .. {int(running[-1])}, the number of scores, got {k}")
        digit = int(torch.searchsorted(running, rank))
        rank -= int(running[digit - 1]) if digit else 0
        prefix, above = (max(prefix, 0) << width) | digit, above - width
    value = torch.tensor(prefix, dtype=integer).view(scores[0].dtype).item()
    return Threshold(float(value), prefix, rank)


def keep_masks(scores: Sequence[Tensor], k: int) -> tuple[list[Tensor], Threshold]:
    """Return masks (True = keep) that drop exactly the k smallest scores, and the threshold used.

    Equal scores are dropped in order of tensor and position, so that the count is exact to one weight.

    >>> masks, _ = keep_masks([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0])], k=2)
    >>> masks
    [tensor([ True, False]), tensor([False,  True])]
    """
    if k == 0:
        return [torch.ones_like(tensor, dtype=torch.bool) for tensor in scores], Threshold(0.0, 0, 0)
    threshold = kth_smallest(scores, k)
    masks, quota = [], threshold.ties
    for tensor in scores:
        bits = _ordered_bits(tensor)
        mask = bits > threshold.bits
        equal = (bits == threshold.bits).flatten().nonzero().flatten()
        mask.view(-1)[equal[quota:]] = True
        quota = max(0, quota - equal.numel())
        masks.append(mask)
    return masks, threshold

"""The exact k-th smallest of many score tensors, by radix selection on the bits of floats.

A float's magnitude bits, negated where its sign is set, are an integer of the same order. A histogram of the high 16
bits over all tensors finds the bin of the k-th score, one of the low bits inside it the score itself: two passes over
float32, one over bfloat16, a megabyte of counts, no concatenation, no sort; counts can be summed over processes.
Scores may be functions, called anew in each pass, so that one tensor of them is alive at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.errors import CompressError

__all__ = ["Piecewise", "Scored", "Threshold", "keep_masks", "kth_smallest"]

CHUNK = 1 << 18
DIGIT = 16
BINS = 1 << DIGIT
# The integer of the same width, and how many digits it has.
LAYOUT: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float32: (torch.int32, 2),
    torch.bfloat16: (torch.int16, 1),
    torch.float16: (torch.int16, 1),
    torch.float64: (torch.int64, 4),
}


@dataclass(frozen=True)
class Piecewise:
    """Scores of a weight by a function of single entries: computed a piece at a time, so that none is ever whole."""

    weight: Tensor
    function: Callable[[Tensor], Tensor]


Scored = Tensor | Piecewise | Callable[[], Tensor]


@dataclass(frozen=True)
class Threshold:
    """The k-th smallest score: its value, its place in the order of bits, and the scores equal to it.

    Args:
        value: the score.
        key: the integer that compares as it does.
        ties: how many of the equal ones belong to the k smallest.
        equal: how many there are.
    """

    value: float
    key: int
    ties: int
    equal: int


def _identity(counts: Tensor) -> Tensor:
    return counts


def _keys(chunk: Tensor) -> Tensor:
    """Return integers that compare as the floats do; -0.0 and 0.0 are one. Non-negative floats are only viewed."""
    integer, _ = LAYOUT[chunk.dtype]
    bits = chunk.view(integer)
    if int(bits.min()) >= 0:
        return bits
    negative = bits < 0
    magnitude = bits & torch.iinfo(integer).max
    return torch.where(negative, -magnitude, magnitude)


def _chunks(scored: Scored) -> Iterator[Tensor]:
    if isinstance(scored, Piecewise):
        yield from (scored.function(piece) for piece in torch.split(scored.weight.detach().reshape(-1), CHUNK))
    else:
        tensor = scored if isinstance(scored, Tensor) else scored()
        yield from torch.split(tensor.detach().reshape(-1), CHUNK)


def _check_ordered(chunk: Tensor, keys: Tensor, index: int) -> None:
    integer, _ = LAYOUT[chunk.dtype]
    infinity = int(torch.tensor(float("inf"), dtype=chunk.dtype).view(integer))
    low, high = torch.aminmax(keys)
    if int(high) > infinity or int(low) < -infinity:
        raise CompressError(f"expected scores that have an order, got NaN in tensor {index}")


def _histogram(scores: Sequence[Scored], dtype: torch.dtype, prefix: int | None, shift: int) -> Tensor:
    """Count the digit at `shift` among the keys whose higher digits are `prefix` (None: all)."""
    counts: Tensor | None = None
    for index, scored in enumerate(scores):
        for chunk in _chunks(scored):
            if chunk.dtype != dtype:
                raise ValueError(
                    f"expected scores of one dtype among float64, float32, bfloat16, float16, "
                    f"got {dtype} and {chunk.dtype}"
                )
            if not chunk.numel():
                continue
            keys = _keys(chunk)
            if prefix is None:
                _check_ordered(chunk, keys, index)
                digits = (keys.int() if keys.dtype == torch.int16 else keys >> shift) + BINS // 2  # it has the sign
            else:
                digits = (keys[(keys >> (shift + DIGIT)) == prefix] >> shift) & (BINS - 1)
            counted = torch.bincount(digits, minlength=BINS)
            counts = counted if counts is None else counts.add_(counted)
    return torch.zeros(BINS, dtype=torch.int64) if counts is None else counts


def _dtype(scores: Sequence[Scored]) -> torch.dtype:
    dtype = next((chunk.dtype for scored in scores for chunk in _chunks(scored)), torch.float32)
    if dtype not in LAYOUT:
        raise ValueError(f"expected scores of one dtype among float64, float32, bfloat16, float16, got {dtype}")
    return dtype


def kth_smallest(scores: Sequence[Scored], k: int, reduce: Callable[[Tensor], Tensor] = _identity) -> Threshold:
    """Return the k-th smallest score over all tensors, exactly. Runs at each mask update.

    Args:
        scores: float64, float32, bfloat16 or float16 tensors of one dtype and any shapes, or functions that
            return them, the same at each call; -0.0 counts as 0.0.
        k: 1-based rank over all tensors (and all processes).
        reduce: sums an int64 histogram over processes; one call a pass.

    Raises:
        ValueError: k out of range, mixed or unsupported dtypes.
        CompressError: NaN, or a function that returned other scores when it was called again.

    >>> kth_smallest([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0])], k=2)
    Threshold(value=2.0, key=1073741824, ties=1, equal=2)
    """
    dtype = _dtype(scores)
    integer, digits = LAYOUT[dtype]
    prefix: int | None = None
    rank, expected = k, -1
    for shift in range(DIGIT * (digits - 1), -1, -DIGIT):
        counts = reduce(_histogram(scores, dtype, prefix, shift))
        running = counts.cumsum(0)
        total = int(running[-1])
        if prefix is None and not 1 <= k <= total:
            raise ValueError(f"expected k in 1 .. {total}, the number of scores, got {k}")
        if prefix is not None and total != expected:
            raise CompressError(
                f"the scores changed between two passes: {expected} were in the range of the threshold, now {total}; "
                f"a criterion must return the same scores each time it is called in one update"
            )
        digit = int(torch.searchsorted(running, rank))
        rank -= int(running[digit - 1]) if digit else 0
        expected = int(counts[digit])
        prefix = digit - BINS // 2 if prefix is None else (prefix << DIGIT) | digit
    key = int(prefix or 0)
    bits = torch.tensor(key if key >= 0 else -key, dtype=integer).view(dtype)
    return Threshold(float(bits) if key >= 0 else -float(bits), key, rank, expected)


def keep_masks(
    scores: Sequence[Scored], k: int, reduce: Callable[[Tensor], Tensor] = _identity
) -> tuple[Iterator[Tensor], Threshold]:
    """Return masks (True = keep), made one at a time, that drop exactly the k smallest scores; and the threshold.

    Equal scores are dropped in order of tensor and position, so that the count is exact to one weight. With `reduce`,
    ties at the threshold must belong to no or to all of the k smallest, or to this process alone.

    >>> masks, _ = keep_masks([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0])], k=2)
    >>> list(masks)
    [tensor([ True, False]), tensor([False,  True])]
    """
    if k == 0:
        return (torch.ones(_shape(scored), dtype=torch.bool) for scored in scores), Threshold(0.0, 0, 0, 0)
    threshold = kth_smallest(scores, k, reduce)
    return _masks(scores, threshold), threshold


def _shape(scored: Scored) -> torch.Size:
    if isinstance(scored, Piecewise):
        return scored.weight.shape
    return scored.shape if isinstance(scored, Tensor) else scored().shape


def _masks(scores: Sequence[Scored], threshold: Threshold) -> Iterator[Tensor]:
    quota = threshold.ties
    for scored in scores:
        tensor = scored() if not isinstance(scored, (Tensor, Piecewise)) else scored
        shape = _shape(tensor)
        parts = []
        for chunk in _chunks(tensor):
            keys = _keys(chunk) if chunk.numel() else chunk
            mask = keys > threshold.key
            if quota < threshold.equal:  # some of the equal ones stay: the first ones go
                equal = (keys == threshold.key).nonzero().flatten()
                mask[equal[max(0, quota) :]] = True
                quota -= len(equal)
            parts.append(mask)
        yield torch.cat(parts).view(shape) if parts else torch.ones(shape, dtype=torch.bool)

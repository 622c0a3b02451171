"""The exact k-th smallest of many score tensors, by radix selection on the bits of floats.

A float's magnitude bits, negated where its sign is set, are an integer of the same order. A histogram of the high 16
bits over all tensors finds the bin of the k-th score, one of the low bits inside it the score itself: two passes over
float32, one over bfloat16, a megabyte of counts, no concatenation, no sort; counts can be summed over processes.
Scores may be functions, called anew in each pass, so that one tensor of them is alive at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_compress.errors import CompressError
from lightning_compress.pruning.counting import BINS, DIGIT, kth_place, summed
from lightning_compress.sharding import all_reduce_sum

__all__ = ["Piece", "Piecewise", "Scored", "Threshold", "keep_masks", "kth_smallest"]

CHUNK = 1 << 18
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


class Piece(Protocol):
    """How scores of this process are part of a whole; `sharding.Part` is one."""

    @property
    def counted(self) -> bool:
        """Say whether they count: of replicas, one does."""
        ...

    def positions(self, indices: Tensor) -> Tensor:
        """Return the places in the flattened whole of places in the flattened piece."""
        ...


Pieces = Sequence[Piece]


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


def _keys(chunk: Tensor) -> Tensor:
    """Return integers that compare as the floats do; -0.0 and 0.0 are one. Non-negative floats are only viewed."""
    integer, _ = LAYOUT[chunk.dtype]
    bits = chunk.view(integer)
    if int(bits.min()) >= 0:
        return bits
    info = torch.iinfo(integer)
    sign = bits >> (info.bits - 1)  # all ones where it is set: x ^ -1 is -x - 1
    return (bits & info.max).bitwise_xor_(sign).sub_(sign)


def _chunks(scored: Scored) -> Iterator[Tensor]:
    if isinstance(scored, Piecewise):
        yield from (scored.function(piece) for piece in torch.split(scored.weight.detach().reshape(-1), CHUNK))
    else:
        tensor = scored if isinstance(scored, Tensor) else scored()
        yield from torch.split(tensor.detach().reshape(-1), CHUNK)


def _signed(chunk: Tensor, keys: Tensor, index: int) -> bool:
    integer, _ = LAYOUT[chunk.dtype]
    infinity = int(torch.tensor(float("inf"), dtype=chunk.dtype).view(integer))
    low, high = (int(bound) for bound in torch.aminmax(keys))
    if high > infinity or low < -infinity:
        raise CompressError(f"expected scores that have an order, got NaN in tensor {index}")
    return low < 0


def _starting_with(prefix: int, keys: Tensor, shift: int) -> Tensor:
    """Return the keys whose digits above `shift` are `prefix`: few, so that whole eights are passed over at once."""
    whole = len(keys) // 8 * 8
    hits = ((keys[:whole] >> shift) == prefix).view(torch.int64).nonzero().flatten()
    near = torch.cat([keys[:whole].view(-1, 8)[hits].flatten(), keys[whole:]])
    return near[(near >> shift) == prefix]


def _histogram(
    scores: Sequence[Scored], counted: Sequence[bool], dtype: torch.dtype, prefix: int | None, shift: int
) -> Tensor:
    """Count the digit at `shift` among the keys whose higher digits are `prefix` (None: all)."""
    counts: Tensor | None = None
    middle = BINS // 2  # first digits have a sign
    for index, scored in enumerate(scores):
        for chunk in _chunks(scored):
            if chunk.dtype != dtype:
                raise ValueError(
                    f"expected scores of one dtype among float64, float32, bfloat16, float16, "
                    f"got {dtype} and {chunk.dtype}"
                )
            if not chunk.numel() or not counted[index]:  # asked for all the same: to score may be a collective
                continue
            if counts is None:
                counts = torch.zeros(BINS, dtype=torch.int64, device=chunk.device)
            keys = _keys(chunk)
            if prefix is not None:
                digits = ((_starting_with(prefix, keys, shift + DIGIT) >> shift) & (BINS - 1)).long()
                counts.index_add_(0, digits, torch.ones_like(digits))  # few: a bincount is as long as its bins
            elif _signed(chunk, keys, index):
                counts += torch.bincount((keys >> shift).int() + middle, minlength=BINS)
            else:
                counts[middle:] += torch.bincount(keys >> shift, minlength=middle)
    return torch.zeros(BINS, dtype=torch.int64) if counts is None else counts


def _device(scores: Sequence[Scored]) -> torch.device:
    return next((chunk.device for scored in scores for chunk in _chunks(scored)), torch.device("cpu"))


def _dtype(scores: Sequence[Scored]) -> torch.dtype:
    dtype = next((chunk.dtype for scored in scores for chunk in _chunks(scored)), torch.float32)
    if dtype not in LAYOUT:
        raise ValueError(f"expected scores of one dtype among float64, float32, bfloat16, float16, got {dtype}")
    return dtype


def kth_smallest(scores: Sequence[Scored], k: int, pieces: Pieces | None = None) -> Threshold:
    """Return the k-th smallest score over all tensors, exactly. Runs at each mask update.

    Args:
        scores: float64, float32, bfloat16 or float16 tensors of one dtype and any shapes, or functions that
            return them, the same at each call; -0.0 counts as 0.0.
        k: 1-based rank over all tensors (and all processes).
        pieces: of each tensor, if a process has only a part of it; then every process calls this.

    Raises:
        ValueError: k out of range, mixed or unsupported dtypes.
        CompressError: NaN, or a function that returned other scores when it was called again.

    >>> kth_smallest([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 2.0])], k=2)
    Threshold(value=2.0, key=1073741824, ties=1, equal=2)
    """
    dtype = _dtype(scores)
    integer, digits = LAYOUT[dtype]
    counted = [True] * len(scores) if pieces is None else [piece.counted for piece in pieces]
    prefix: int | None = None
    rank, expected = k, -1
    for shift in range(DIGIT * (digits - 1), -1, -DIGIT):
        counts = _histogram(scores, counted, dtype, prefix, shift)
        if pieces is not None:
            counts = summed(counts.to(_device(scores)), expected)
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


def keep_masks(scores: Sequence[Scored], k: int, pieces: Pieces | None = None) -> tuple[Iterator[Tensor], Threshold]:
    """Return masks (True = keep), made one at a time, that drop exactly the k smallest scores; and the threshold.

    Equal scores are dropped in order of tensor and position, so that the count is exact to one weight. `pieces` as in
    `kth_smallest`: masks are then of this process's pieces.

    >>> masks, _ = keep_masks([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0])], k=2)
    >>> list(masks)
    [tensor([ True, False]), tensor([False,  True])]
    """
    if k == 0:
        return (torch.ones(_shape(scored), dtype=torch.bool) for scored in scores), Threshold(0.0, 0, 0, 0)
    threshold = kth_smallest(scores, k, pieces)
    if pieces is None:
        return _masks(scores, threshold, k), threshold
    return _pieces_of_masks(scores, threshold, pieces, _cut_among_ties(scores, threshold, pieces)), threshold


# Ties over processes


def _ties(scored: Scored, key: int) -> Tensor:
    """Return the places of scores equal to the threshold, in the flattened piece."""
    found, begin = [], 0
    for chunk in _chunks(scored):
        if chunk.numel():
            found.append((_keys(chunk) == key).nonzero().flatten() + begin)
        begin += chunk.numel()
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


def _cut_among_ties(scores: Sequence[Scored], threshold: Threshold, pieces: Pieces) -> tuple[int, int]:
    """Return up to which tensor, and in it up to which place, ties are dropped; every process calls it."""
    if threshold.ties == threshold.equal:
        return len(scores), -1
    device = _device(scores)
    of_each = [len(_ties(s, threshold.key)) * p.counted for s, p in zip(scores, pieces, strict=True)]
    running = all_reduce_sum(torch.tensor(of_each, device=device)).cumsum(0)
    tensor = int(torch.searchsorted(running, threshold.ties))
    left = threshold.ties - (int(running[tensor - 1]) if tensor else 0)
    ties, piece = _ties(scores[tensor], threshold.key).to(device), pieces[tensor]
    places = piece.positions(ties) if piece.counted else ties[:0]
    return tensor, kth_place(places, left)


def _pieces_of_masks(
    scores: Sequence[Scored], threshold: Threshold, pieces: Pieces, cut: tuple[int, int]
) -> Iterator[Tensor]:
    for index, (scored, piece) in enumerate(zip(scores, pieces, strict=True)):
        mask = next(_masks([scored], Threshold(threshold.value, threshold.key, 1, 1), None))
        if index >= cut[0]:  # otherwise all ties of this tensor go, as `_masks` drops them
            ties = _ties(scored, threshold.key).to(mask.device)
            stays = piece.positions(ties) > cut[1] if index == cut[0] else torch.ones_like(ties, dtype=torch.bool)
            mask.view(-1)[ties[stays]] = True
        yield mask


# One process


def _shape(scored: Scored) -> torch.Size:
    if isinstance(scored, Piecewise):
        return scored.weight.shape
    return scored.shape if isinstance(scored, Tensor) else scored().shape


def _masks(scores: Sequence[Scored], threshold: Threshold, k: int | None) -> Iterator[Tensor]:
    quota, dropped = threshold.ties, 0
    for index, scored in enumerate(scores):
        tensor = scored() if not isinstance(scored, (Tensor, Piecewise)) else scored
        device = (tensor.weight if isinstance(tensor, Piecewise) else tensor).device
        mask = torch.empty(_shape(tensor), dtype=torch.bool, device=device)
        for chunk, piece in zip(_chunks(tensor), torch.split(mask.view(-1), CHUNK), strict=True):
            if chunk.numel():
                quota -= _compare(_keys(chunk), threshold, quota, piece)
        dropped += mask.numel() - int(torch.count_nonzero(mask))
        if k is not None and index == len(scores) - 1 and dropped != k:
            raise CompressError(
                f"the scores changed after the threshold was found: {k} were to go, now {dropped}; "
                f"a criterion must return the same scores each time it is called in one update"
            )
        yield mask


def _compare(keys: Tensor, threshold: Threshold, quota: int, out: Tensor) -> int:
    """Write keys > threshold; of those equal to it the first `quota` go. Returns how many went, if that matters."""
    if quota == 0:
        torch.ge(keys, threshold.key, out=out)
        return 0
    torch.gt(keys, threshold.key, out=out)
    if threshold.ties == threshold.equal:
        return 0
    equal = (keys == threshold.key).nonzero().flatten()
    out[equal[quota:]] = True
    return min(quota, len(equal))

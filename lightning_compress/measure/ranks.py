"""How alike two rankings are: Spearman's correlation and the overlap of the strongest."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["average_ranks", "spearman", "top_overlap"]


def average_ranks(values: Tensor) -> Tensor:
    """Rank of each value from 1, float64; equal values share the mean of their ranks.

    Args:
        values: (n,), finite.

    >>> average_ranks(torch.tensor([10.0, 30.0, 10.0])).tolist()
    [1.5, 3.0, 1.5]
    """
    _, which, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    shared: Tensor = last - (counts.double() - 1.0) / 2.0
    ranks: Tensor = shared[which]
    return ranks


def spearman(first: Tensor, second: Tensor) -> float:
    r"""Return the rank correlation of two series in [-1, 1]; NaN where one of them is constant or not finite.

    \rho = \sum_i (r_i - \bar r)(s_i - \bar s) / \sqrt{\sum_i (r_i - \bar r)^2 \sum_i (s_i - \bar s)^2} over the ranks r
    and s, equal values sharing theirs (C. Spearman, "The proof and measurement of association between two things",
    1904).

    Args:
        first: (n,) of any dtype with an order.
        second: the same shape.

    >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 1000.0, 100.0]))
    0.5
    """
    if not (first.isfinite().all() and second.isfinite().all()):
        return float("nan")
    one, other = (ranks - ranks.mean() for ranks in (average_ranks(first), average_ranks(second)))
    scale = float(one.square().sum() * other.square().sum()) ** 0.5
    return float((one * other).sum()) / scale if scale else float("nan")


def top_overlap(first: Tensor, second: Tensor, share: float = 0.1) -> float:
    """Return the fraction of the strongest values, by size without sign, that are strongest in both.

    Args:
        first: (n,) values.
        second: the same shape.
        share: the fraction of values that counts as strongest, at least one; of equal ones the first.

    >>> top_overlap(torch.tensor([9.0, -8.0, 1.0, 0.0]), torch.tensor([7.0, 0.0, 6.0, 1.0]), share=0.5)
    0.5
    """
    k = max(1, round(share * first.numel()))
    tops = [set(values.abs().argsort(descending=True, stable=True)[:k].tolist()) for values in (first, second)]
    return len(tops[0] & tops[1]) / k

"""Codebooks: the few values that the weights of a tensor share, found by k-means; and the gradient that moves them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "Start",
    "codebook_gradient",
    "density",
    "found_entries",
    "kmeans",
    "linear",
    "nearest_entry",
    "plus_plus",
    "shared_values",
]

Start = Callable[[Tensor, int], Tensor]
MOST_ENTRIES = 256
SEED = 0


def linear(values: Tensor, entries: int) -> Tensor:
    """Return entries evenly spread from the least value to the largest, (entries,). Runs before k-means.

    The best of three starts in Han et al. 2016 ("Deep Compression", arXiv:1510.00149), section 3.2: it gives the few
    large weights, which matter most, entries of their own.

    >>> linear(torch.tensor([0.0, 0.1, 0.2, 4.0]), 3)
    tensor([0., 2., 4.])
    """
    return torch.linspace(float(values.min()), float(values.max()), entries, device=values.device)


def density(values: Tensor, entries: int) -> Tensor:
    """Return entries at evenly spread quantiles, (entries,): each has as many values. Han et al. 2016, section 3.2.

    >>> density(torch.tensor([0.0, 0.1, 0.2, 4.0]), 2)
    tensor([0.1000, 4.0000])
    """
    ordered = values.sort().values
    places = (torch.arange(entries, device=values.device) + 0.5) * len(ordered) / entries
    return ordered[places.long().clamp(max=len(ordered) - 1)]


def plus_plus(values: Tensor, entries: int) -> Tensor:
    """Return entries drawn from the values, each with a chance that grows with its squared distance from the others.

    D. Arthur and S. Vassilvitskii, "k-means++", 2007; the draws are the same at each call.

    >>> plus_plus(torch.tensor([0.0, 0.0, 9.0]), 2).sort().values
    tensor([0., 9.])
    """
    generator = torch.Generator(values.device).manual_seed(SEED)
    chosen = values[torch.randint(len(values), (1,), generator=generator, device=values.device)]
    distance = (values - chosen).square()
    while len(chosen) < entries:
        at = torch.searchsorted(distance.double().cumsum(0), torch.rand(1, generator=generator, dtype=torch.float64,
                                device=values.device) * distance.double().sum())  # fmt: skip
        chosen = torch.cat([chosen, values[at.clamp(max=len(values) - 1)]])
        distance = torch.minimum(distance, (values - chosen[-1]).square())
    return chosen


def nearest_entry(values: Tensor, book: Tensor) -> Tensor:
    """Return the place of the entry nearest to each value; of two as near, the lower.

    Args:
        values: any shape.
        book: (entries,), ascending.

    >>> nearest_entry(torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.0, 1.0]))
    tensor([0, 0, 1])
    """
    return torch.bucketize(values, (book[1:] + book[:-1]) / 2)


@torch.no_grad()
def kmeans(values: Tensor, entries: int, start: Start = linear, steps: int = 50) -> Tensor:
    """Return up to `entries` values that many can be replaced by at the least square error, by Lloyd's steps.

    Each step moves an entry to the mean of the values that are nearest to it; it stops when none moves. In one
    dimension the nearest entry follows from the middles between entries, so a step is a binary search a value.

    Args:
        values: (n,) floating point, finite.
        entries: 1 to 256.
        start: (values, entries) -> first entries.
        steps: at most.

    Returns:
        Ascending, of the values' dtype; fewer where there are fewer distinct values or an entry has none.

    Raises:
        ValueError: entries out of range, no values, or values that are not finite.

    >>> kmeans(torch.tensor([1.0, 1.2, 5.0, 5.2]), 2)
    tensor([1.1000, 5.1000])
    """
    if not 1 <= entries <= MOST_ENTRIES:
        raise ValueError(f"a codebook has 1 to {MOST_ENTRIES} entries, got {entries}")
    if not len(values) or not bool(values.isfinite().all()):
        raise ValueError(f"k-means needs finite values, got {len(values)} with NaN or infinity among them, or none")
    distinct: Tensor = torch.unique(values)
    if len(distinct) <= entries:
        return distinct
    exact = values.double()
    book: Tensor = torch.unique(start(values, entries).double())
    for _ in range(steps):
        codes = nearest_entry(exact, book)
        counts = torch.bincount(codes, minlength=len(book))
        sums = torch.zeros_like(book).index_add_(0, codes, exact)
        moved = torch.where(counts > 0, sums / counts.clamp(min=1), book)
        if torch.equal(moved, book):
            break
        book = moved
    used = torch.bincount(nearest_entry(exact, book), minlength=len(book)) > 0
    found: Tensor = torch.unique(book[used].to(values.dtype))
    return found


@torch.no_grad()
def found_entries(weight: Tensor, entries: int, start: Start = linear) -> tuple[Tensor, Tensor]:
    """Return which value each weight gets, and the values. Han et al. 2016, section 3. Runs where weights are shared.

    Args:
        weight: any shape, finite.
        entries: 2 to 256, that of zeros counted where the weight has zeros.
        start: of k-means.

    Returns:
        int64 of the weight's shape, and (entries + 1,) of its dtype: place 0 is that of zeros, which stay zeros.

    Raises:
        ValueError: entries out of range, values that are not finite.

    >>> found_entries(torch.tensor([0.0, 1.0, 1.2, -3.0]), 3)
    (tensor([0, 2, 2, 1]), tensor([ 0.0000, -3.0000,  1.1000]))
    """
    kept = weight != 0
    values = weight[kept]
    places = torch.zeros_like(weight, dtype=torch.int64)
    if not len(values):
        return places, weight.new_zeros(1)
    book = kmeans(values, entries - (len(values) < weight.numel()), start)
    places[kept] = nearest_entry(values, book) + 1
    return places, torch.cat([book.new_zeros(1), book])


def shared_values(weight: Tensor, entries: int, start: Start = linear) -> Tensor:
    """Return a weight whose values are those of a codebook; zeros stay zeros, as an entry of their own.

    Arguments and errors are those of `found_entries`.

    >>> shared_values(torch.tensor([[0.0, 1.0], [1.2, -3.0]]), 3)
    tensor([[ 0.0000,  1.1000],
            [ 1.1000, -3.0000]])
    """
    places, book = found_entries(weight, entries, start)
    return book[places]


def codebook_gradient(gradient: Tensor, codes: Tensor, entries: int) -> Tensor:
    """Return the gradient of each entry: the sum of those of the weights that share it. Han et al. 2016, equation 3.

    Args:
        gradient: of the weight, any shape.
        codes: int64, of its shape: which entry each weight has; entries and above count for none.
        entries: of the codebook.

    >>> codebook_gradient(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 0]), 2)
    tensor([5., 2.])
    """
    flat = codes.flatten()
    own = flat < entries
    return gradient.new_zeros(entries).index_add_(0, flat[own], gradient.flatten()[own])

"""Codebooks against numpy by hand and against the best that any codebook can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_compress import CompressError, NothingToCompress
from lightning_compress.weight_sharing.codebook import (
    codebook_gradient,
    density,
    kmeans,
    linear,
    nearest_entry,
    plus_plus,
    shared_values,
)
from lightning_compress.weight_sharing.sharing import share_weights

STARTS = [linear, density, plus_plus]


def lloyd_by_hand(values, book, steps):
    """Lloyd's steps as a textbook has them: all distances, then means."""
    values, book = np.asarray(values, np.float64), np.unique(np.asarray(book, np.float64))
    for _ in range(steps):
        codes = np.abs(values[:, None] - book[None]).argmin(1)
        book = np.array([values[codes == k].mean() if (codes == k).any() else book[k] for k in range(len(book))])
    return book[np.unique(np.abs(values[:, None] - book[None]).argmin(1))]


def least_error(values, entries):
    """The least square error of any codebook, by dynamic programming over the sorted values."""
    ordered = np.sort(np.asarray(values, np.float64))
    n = len(ordered)
    sums, squares = (np.concatenate([[0], np.cumsum(ordered**power)]) for power in (1, 2))

    def cost(low, high):
        return squares[high] - squares[low] - (sums[high] - sums[low]) ** 2 / (high - low)

    best = [cost(0, high) if high else 0.0 for high in range(n + 1)]
    for _ in range(entries - 1):
        best = [min([best[high]] + [best[low] + cost(low, high) for low in range(1, high)]) for high in range(n + 1)]
    return best[n]


def error(values, book):
    return float((values.double() - book.double()[nearest_entry(values.double(), book.double())]).square().sum())


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("entries", [2, 7, 16])
def test_lloyds_steps_are_those_of_the_textbook(start, entries):
    values = torch.randn(300, generator=torch.Generator().manual_seed(entries))
    expected = lloyd_by_hand(values, start(values, entries), 50)
    np.testing.assert_allclose(kmeans(values, entries, start), expected, rtol=1e-6)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31), st.sampled_from(STARTS))
def test_never_below_the_best_codebook_and_better_with_more_steps(count, entries, seed, start):
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    book = kmeans(values, entries, start)
    assert len(book) <= entries
    assert error(values, book) >= least_error(values, entries) - 1e-9
    if len(values.unique()) > entries:
        assert error(values, book) <= error(values, start(values, entries).unique()) + 1e-9
    else:
        assert torch.equal(book, values.unique())


def test_a_good_start_comes_near_the_best_codebook():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0))
    best = least_error(values, 8)
    errors = {start.__name__: error(values, kmeans(values, 8, start)) for start in STARTS}
    assert min(errors.values()) < 1.1 * best
    assert max(errors.values()) < 1.6 * best


@given(st.integers(2, 300), st.floats(0, 1), st.integers(2, 40), st.integers(0, 2**31))
def test_zeros_stay_and_are_one_of_the_entries(count, density_, entries, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(count, generator=generator) * (torch.rand(count, generator=generator) < density_)
    shared = shared_values(weight, entries)
    assert torch.equal(shared == 0, weight == 0)
    assert len((shared + 0.0).unique()) <= entries
    assert shared_values(shared, entries).equal(shared)  # sharing again changes nothing


def test_the_gradient_of_a_codebook_is_autograds():
    generator = torch.Generator().manual_seed(0)
    book = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    codes = torch.randint(6, (4, 7), generator=generator)  # 5 is a zero of pruning
    weight = torch.cat([book, book.new_zeros(1)])[codes]
    weight.retain_grad()
    (weight.sin() * torch.arange(28.0).view(4, 7)).sum().backward()
    torch.testing.assert_close(codebook_gradient(weight.grad, codes, 5), book.grad)


def test_a_net_shares_its_weights_and_keeps_its_zeros_and_head():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(72, 40), nn.ReLU(), nn.Linear(40, 10))
    zeros = torch.rand_like(net[2].weight) < 0.9
    net[2].weight.data[zeros] = 0.0
    head = net[4].weight.clone()
    books = share_weights(net, {"Conv2d": 16, "Linear": 8})
    assert {name: len(book) for name, book in books.items()} == {"0.weight": 16, "2.weight": 8}
    assert torch.equal(net[2].weight == 0, zeros)
    assert torch.equal(net[4].weight, head)
    assert torch.equal(net[2].weight.unique(), books["2.weight"])


def test_bad_input_is_named_and_changes_nothing():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    before = net[0].weight.clone()
    for entries, words in [
        (1, "2 to 256 entries, got 1"),
        (257, "got 257"),
        (17, "larger than '0.weight', which has 16"),
    ]:
        with pytest.raises(ValueError, match=words):
            share_weights(net, entries)
    with pytest.raises(ValueError, match=r"Conv2d, but '0\.weight' is of a Linear"):
        share_weights(net, {"Conv2d": 4})
    with pytest.raises(NothingToCompress):
        share_weights(nn.Sequential(nn.ReLU()), 4)
    with pytest.raises(ValueError, match="finite values"):
        kmeans(torch.tensor([1.0, float("nan")]), 1)
    net[0].weight.data[0, 0] = float("inf")
    with pytest.raises(CompressError, match=r"infinity in '0\.weight'"):
        share_weights(net, 4)
    assert torch.equal(net[0].weight[1:], before[1:])

"""Histograms against numpy on the values themselves: counts, quantiles, and errors by rounding every value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.quantization.grid import input_grid
from lightning_compress.quantization.histograms import BINS, CHUNK, count_values, quantile, rounding_error

quick = settings(max_examples=40, deadline=None)
INF, NAN = float("inf"), float("nan")
WIDTH = 1 / 128  # of a bin, as a part of its lower end


@st.composite
def values(draw):
    """Values as layers see them: normal, after a ReLU, of heavy tails; of any size."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    kind, size = draw(st.sampled_from(["normal", "relu", "heavy"])), draw(st.sampled_from([1e-4, 1.0, 300.0]))
    value = torch.randn(20_000, generator=generator)
    value = {"normal": value, "relu": value.relu(), "heavy": value**3}[kind]
    return value * size


@quick
@given(values(), st.integers(1, 5))
def test_histograms_of_parts_add_up_to_that_of_the_whole(value, parts):
    whole = count_values(value)
    assert whole.shape == (BINS,)
    assert whole.sum() == value.numel()
    assert torch.equal(sum(count_values(part) for part in value.chunk(parts)), whole)
    middle, smallest = (BINS - 2) // 2, 2.0**-32
    assert whole[middle] == (value.abs() < smallest).sum()
    assert whole[:middle].sum() == (value <= -smallest).sum()
    assert torch.equal(count_values(-value)[:-1], whole[:-1].flip(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_counts_of_other_dtypes_and_shapes(dtype):
    value = torch.randn(3, 4, 5).to(dtype).transpose(0, 2)
    assert torch.equal(count_values(value), count_values(value.float()))
    assert count_values(torch.empty(0, 3, dtype=dtype)).sum() == 0
    nested = torch.nested.nested_tensor([value[0], value[1, :2]], layout=torch.jagged)
    assert torch.equal(count_values(nested), count_values(value[0]) + count_values(value[1, :2]))


def test_a_large_tensor_is_counted_in_pieces():
    value = torch.linspace(-1, 1, 2 * CHUNK + 5)
    assert torch.equal(count_values(value), sum(count_values(part) for part in value.split(1_000_000)))


def test_edges_of_what_is_counted():
    histogram = count_values(torch.tensor([INF, -INF, NAN, 1e-40, -0.0, 1e38, -1e38]))
    assert histogram[-1] == 3
    assert histogram[(BINS - 2) // 2] == 2
    assert (histogram[-2], histogram[0]) == (1, 1)


def test_each_value_lies_in_its_bin():
    for exponent in (-31, -3, 0, 7, 30):
        value = 2.0**exponent * torch.linspace(1, 1.999, 50)
        for single in torch.cat([value, -value]):
            ends = [quantile(count_values(single[None]), share).item() for share in (0.0, 1.0)]
            assert ends[0] * (1 + 1e-6 * np.sign(-ends[0])) <= single.item() <= ends[1] * (1 + 1e-6 * np.sign(ends[1]))
            assert abs(ends[1] - ends[0]) <= abs(single.item()) * WIDTH * 1.001


@quick
@given(values(), st.sampled_from([0.75, 0.9, 0.99, 0.999, 1.0]))
def test_quantiles_are_numpys_to_the_width_of_a_bin(value, share):
    histogram = count_values(value)
    for part in (1 - share, share):
        end = quantile(histogram, part)
        array = np.sort(value.double().numpy())
        # A neighbour on either side allows for the definition of a quantile between two values.
        place = part * (len(array) - 1)
        below, above = array[max(int(place) - 1, 0)], array[min(int(np.ceil(place)) + 1, len(array) - 1)]
        slack = 1.01 * WIDTH * max(abs(below), abs(above))
        assert below - slack <= end.item() <= above + slack


def by_rounding(value, scale, zero_point, bits):
    """Mean squared error of each value rounded and clipped, in double precision."""
    array, scale, zero_point = value.double().numpy(), float(scale), float(zero_point)
    codes = np.clip(np.round(array / scale), -zero_point, 2**bits - 1 - zero_point)
    return np.mean((codes * scale - array) ** 2)


@quick
@given(values(), st.integers(2, 8), st.floats(0.05, 1.5))
def test_the_error_of_a_histogram_is_that_of_rounding_each_value(value, bits, share):
    low, high = value.min() * share, value.max() * share
    scale, zero_point = input_grid(low, high, bits)
    got = rounding_error(count_values(value), scale[None], zero_point[None], bits).item()
    assert got == pytest.approx(by_rounding(value, scale, zero_point, bits), rel=0.06)

"""Observers against numpy on the values themselves: counts, percentiles, and errors by rounding every value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.quantization.grid import input_grid, weight_scale
from lightning_compress.quantization.ranges import (
    BINS,
    count_values,
    join_extremes,
    least_error_range,
    least_error_scale,
    percentile_range,
    percentile_scale,
    require_counts,
    rounding_error,
)

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


def test_edges_of_what_is_counted():
    histogram = count_values(torch.tensor([INF, -INF, NAN, 1e-40, -0.0, 1e38, -1e38]))
    assert histogram[-1] == 3
    assert histogram[(BINS - 2) // 2] == 2
    assert (histogram[-2], histogram[0]) == (1, 1)


def test_each_value_lies_in_its_bin():
    for exponent in (-31, -3, 0, 7, 30):
        value = 2.0**exponent * torch.linspace(1, 1.999, 50)
        for single in torch.cat([value, -value]):
            ends = [end.item() for end in percentile_range(count_values(single[None]), 1.0)]
            assert ends[0] * (1 + 1e-6 * np.sign(-ends[0])) <= single.item() <= ends[1] * (1 + 1e-6 * np.sign(ends[1]))
            assert abs(ends[1] - ends[0]) <= abs(single.item()) * WIDTH * 1.001


@quick
@given(values(), st.sampled_from([0.75, 0.9, 0.99, 0.999, 1.0]))
def test_percentiles_are_numpys_to_the_width_of_a_bin(value, share):
    found = percentile_range(count_values(value), share)
    for end, part in zip(found, (1 - share, share), strict=True):
        assert end.dtype == torch.float32
        array = np.sort(value.double().numpy())
        # A neighbour on either side allows for the definition of a quantile between two values.
        place = part * (len(array) - 1)
        below, above = array[max(int(place) - 1, 0)], array[min(int(np.ceil(place)) + 1, len(array) - 1)]
        slack = 1.01 * WIDTH * max(abs(below), abs(above))
        assert below - slack <= end.item() <= above + slack


def test_the_share_is_checked():
    for share in (0.5, 1.5):
        with pytest.raises(ValueError, match=r"in \(0.5, 1\], got"):
            percentile_range(count_values(torch.ones(3)), share)


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


@settings(max_examples=12, deadline=None)
@given(values(), st.sampled_from([2, 3, 4, 8]))
def test_the_range_of_least_error_is_as_good_as_a_search_over_all_values(value, bits):
    low, high = least_error_range(count_values(value), bits)
    got = by_rounding(value, *input_grid(low, high, bits), bits)
    parts = np.linspace(0.04, 1.0, 25)
    pairs = [(value.min() * a, value.max() * b) for a in parts for b in parts]
    best = min(by_rounding(value, *input_grid(a, b, bits), bits) for a, b in pairs)
    assert got <= best * 1.1
    whole = by_rounding(value, *input_grid(value.min(), value.max(), bits), bits)
    assert got <= whole * 1.02


def test_the_range_of_zeros_is_empty():
    low, high = least_error_range(count_values(torch.zeros(9)))
    assert (low.item(), high.item()) == (0.0, 0.0)


def test_what_no_range_can_be_taken_from_is_named():
    counted = count_values(torch.ones(2))
    assert require_counts(counted, "fc") is counted
    with pytest.raises(ValueError, match="saw no value at the input of 'fc'; pass batches"):
        require_counts(count_values(torch.empty(0)), "fc")
    with pytest.raises(ValueError, match="saw 2 of 3 values infinite or NaN at the input of 'fc'"):
        require_counts(count_values(torch.tensor([NAN, INF, 0.0])), "fc")


@pytest.mark.parametrize(
    ("before", "pending", "after"),
    [
        ([NAN, NAN], [1.0, 2.0], [1.0, 2.0]),
        ([0.0, 3.0], [1.0, 2.0], [1.0, 3.0]),
        ([0.0, 1.0], [-INF, -INF], [0.0, 1.0]),
        ([NAN, NAN], [-INF, -INF], [NAN, NAN]),
        ([0.0, 1.0], [NAN, 5.0], [0.0, 1.0]),
        ([0.0, 1.0], [0.0, INF], [0.0, 1.0]),
    ],
)
def test_what_widens_a_range(before, pending, after):
    joined = join_extremes(torch.tensor([before, [3.0, 3.0]]), torch.tensor([pending, [5.0, 1.0]]))
    torch.testing.assert_close(joined, torch.tensor([after, [5.0, 3.0]]), equal_nan=True)


@quick
@given(st.integers(0, 10**6), st.integers(2, 8))
def test_weight_scales_of_least_error_against_a_loop(seed, bits):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 40, generator=generator) ** 3
    weight[2] = 0.0
    top = 2 ** (bits - 1) - 1
    got = least_error_scale(weight, bits)
    assert got.dtype == torch.float32
    assert got[2] == 1.0
    for row, scale in zip(weight[:2].double().numpy(), got[:2].double().numpy(), strict=True):
        tried = np.abs(row).max() / top * np.arange(1, 81) / 80
        errors = [np.sum((np.clip(np.round(row / s), -top, top) * s - row) ** 2) for s in tried]
        mine = np.sum((np.clip(np.round(row / scale), -top, top) * scale - row) ** 2)
        assert mine <= min(errors) * (1 + 1e-4)


@quick
@given(st.integers(0, 10**6), st.sampled_from([0.5, 0.9, 1.0]))
def test_weight_scales_of_percentiles_against_a_sort(seed, share):
    weight = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(seed))
    want = np.sort(np.abs(weight.numpy().reshape(3, -1)), axis=1)[:, round(share * 40) - 1] / 7
    np.testing.assert_allclose(percentile_scale(weight, 4, share).numpy(), want, rtol=1e-6)
    assert torch.equal(percentile_scale(weight, 4, 1.0), weight_scale(weight, 4))

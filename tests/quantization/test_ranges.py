"""Rules against numpy on all values at once: percentiles, the least error of many ranges, averages."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.errors import CompressError
from lightning_compress.quantization.grid import input_grid
from lightning_compress.quantization.histograms import count_values
from lightning_compress.quantization.ranges import (
    Seen,
    check_rule,
    mean_square_error,
    min_max,
    moving_average,
    percentile,
    reads_counts,
)
from tests.quantization.test_histograms import WIDTH, by_rounding, values

quick = settings(max_examples=25, deadline=None)


def seen_of(*batches: torch.Tensor) -> Seen:
    seen = Seen()
    for batch in batches:
        seen.add(batch)
    return seen


def heavy_tailed(seed: int, size: int = 4000) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, size).astype(np.float32))


@quick
@given(st.integers(0, 10_000), st.floats(0.0001, 0.2))
def test_percentile_leaves_out_its_share_at_either_end(seed: int, out: float) -> None:
    values = heavy_tailed(seed)
    low, high = percentile(seen_of(*values.split(1000)), share=1 - out)
    ordered = np.sort(values.numpy())
    most = int(out * len(ordered) + 1e-6)
    # A place on either side allows for the definition of a quantile between two values.
    places = np.array([[most - 1, most + 1], [len(ordered) - 2 - most, len(ordered) - most]])
    for end, (below, above) in zip((low, high), ordered[places.clip(0, len(ordered) - 1)], strict=True):
        assert below - 1.01 * WIDTH * abs(below) <= end <= above + 1.01 * WIDTH * abs(above)


def test_a_percentile_of_all_is_min_max() -> None:
    seen = seen_of(heavy_tailed(0), heavy_tailed(1))
    assert percentile(seen, share=1.0) == min_max(seen)


def test_moving_average_is_that_of_training() -> None:
    batches = [heavy_tailed(seed, 100) for seed in range(5)]
    low, high = float(batches[0].min()), float(batches[0].max())
    for batch in batches[1:]:
        low, high = low + 0.1 * (float(batch.min()) - low), high + 0.1 * (float(batch.max()) - high)
    assert moving_average(seen_of(*batches)) == pytest.approx((low, high), rel=1e-5)


def test_what_is_seen_of_all_dtypes_shapes_and_layouts() -> None:
    value = heavy_tailed(4, 240).view(2, 3, 40)
    wanted = [(float(value.min()), float(value.max()))]
    for other in (value, value.transpose(0, 2), value.double(), value.requires_grad_()):
        seen = seen_of(other)
        assert [tuple(ends.tolist()) for ends in seen.extremes] == wanted
        assert torch.equal(seen.counts, count_values(value))
        assert not seen.extremes[0].requires_grad
    nested = torch.nested.nested_tensor([value[0].detach(), value[1, :2].detach()], layout=torch.jagged)
    assert int(seen_of(nested).counts.sum()) == 200
    assert seen_of(torch.zeros(0, 3)).extremes == []
    uncounted = Seen()
    uncounted.add(value, counted=False)
    assert int(uncounted.counts.sum()) == 0
    assert min_max(uncounted) == wanted[0]


@settings(max_examples=8, deadline=None)
@given(values(), st.sampled_from([2, 3, 4, 8]))
def test_the_range_of_least_error_is_as_good_as_a_search_over_all_values(value, bits):
    low, high = map(torch.tensor, mean_square_error(seen_of(value), bits))
    got = by_rounding(value, *input_grid(low, high, bits), bits)
    parts = np.linspace(0.04, 1.0, 25)
    pairs = [(value.min() * a, value.max() * b) for a in parts for b in parts]
    best = min(by_rounding(value, *input_grid(a, b, bits), bits) for a, b in pairs)
    assert got <= best * 1.1
    whole = by_rounding(value, *input_grid(value.min(), value.max(), bits), bits)
    assert got <= whole * 1.02


@pytest.mark.parametrize("rule", [min_max, moving_average, percentile, mean_square_error])
def test_the_range_of_zeros_is_empty(rule) -> None:
    assert rule(seen_of(torch.zeros(9)), 8) == (0.0, 0.0)


@settings(max_examples=8, deadline=None)
@given(values(), st.sampled_from([percentile, mean_square_error]), st.integers(2, 5))
def test_a_rule_does_not_see_how_often_all_was_counted(value, rule, times):
    # as activation checkpointing counts twice what it computes twice
    once, often = seen_of(value), seen_of(value)
    often.counts *= times
    assert rule(often, 4) == pytest.approx(rule(once, 4), rel=1e-6)


def test_which_rules_read_counts() -> None:
    rules = [min_max, moving_average, percentile, mean_square_error]
    assert [reads_counts(rule) for rule in rules] == [False, False, True, True]
    assert not reads_counts(functools.partial(moving_average, momentum=0.5))
    assert reads_counts(lambda seen, bits: (0.0, 1.0))


def test_a_rule_that_cannot_observe_is_named_when_options_are_made() -> None:
    for rule in (min_max, percentile, mean_square_error, functools.partial(percentile, share=0.9)):
        check_rule(rule)
    for rule in (moving_average, functools.partial(moving_average, momentum=0.5)):
        with pytest.raises(ValueError, match=r"observer=moving_average is what None means.*give its momentum"):
            check_rule(rule)
    for share in (0.5, 1.5):
        with pytest.raises(ValueError, match=r"in \(0.5, 1\], got"):
            check_rule(functools.partial(percentile, share=share))
    with pytest.raises(CompressError, match=r"gave 'three values' the range \(nan, 0.0\)"):
        check_rule(lambda seen, bits: (float("nan"), 0.0))

"""Timing with a clock of our own, so that every number is known beforehand."""

from __future__ import annotations

import statistics
from itertools import cycle

import pytest

from lightning_compress.measure import latency
from lightning_compress.measure.latency import compare_latency, measure_latency


class Clock:
    """Stands still but for the work that calls do on it."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns

    def call(self, *milliseconds):
        """A call that takes these times in turn, and counts itself."""
        times = cycle(milliseconds)

        def work():
            work.calls += 1
            self.now_ns += round(next(times) * 1e6)

        work.calls = 0
        return work


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(latency, "perf_counter_ns", clock)
    return clock


def test_percentiles_are_those_of_the_timed_runs(clock):
    times = [5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 7.0, 8.0, 6.0, 30.0, 11.0]
    got = measure_latency(clock.call(*times), warmup=len(times), runs=len(times), threads=2)
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    assert (got.p10_ms, got.median_ms, got.p90_ms) == pytest.approx((deciles[0], deciles[4], deciles[8]))
    assert (got.min_ms, got.runs, got.threads, got.speedup) == (1.0, len(times), 2, None)


def test_warmup_is_run_and_not_timed(clock):
    call = clock.call(1000.0, 1000.0, 1.0, 1.0, 1.0)
    got = measure_latency(call, warmup=2, runs=3)
    assert call.calls == 5
    assert got.p90_ms == 1.0
    assert got.threads is None


def test_one_run_is_its_own_spread(clock):
    got = measure_latency(clock.call(2.5), warmup=0, runs=1)
    assert got.p10_ms == got.median_ms == got.p90_ms == got.min_ms == 2.5


def test_calls_take_turns():
    order = []
    compare_latency({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, warmup=1, runs=2)
    assert order == ["a", "b"] * 3


def test_the_speedup_is_the_median_of_the_ratios_of_rounds(clock):
    # the machine is ten times slower from the middle of the second round to the end of the fourth
    dense, int8 = (2.0, 2.0, 20.0, 20.0, 2.0), (1.0, 10.0, 10.0, 10.0, 1.0)
    assert statistics.median(dense) / statistics.median(int8) == 0.2  # what timing them apart would say
    got = compare_latency({"dense": clock.call(*dense), "int8": clock.call(*int8)}, warmup=0, runs=5)
    assert got["dense"].speedup == 1.0
    assert got["int8"].speedup == statistics.median(a / b for a, b in zip(dense, int8, strict=True)) == 2.0
    assert list(got) == ["dense", "int8"]


def test_a_clock_too_coarse_to_see_a_call_keeps_ratios_finite(clock):
    got = compare_latency({"a": clock.call(0.0), "b": clock.call(0.0)}, runs=3)
    assert got["b"].speedup == 1.0


def test_the_real_clock_runs():
    got = measure_latency(lambda: sum(range(1000)), warmup=1, runs=5)
    assert 0.0 < got.min_ms <= got.p10_ms <= got.median_ms <= got.p90_ms < 1000.0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"runs": 0}, "runs of at least 1, got runs=0"),
        ({"warmup": -1}, "warmup"),
        ({"threads": 0}, "threads"),
    ],
)
def test_bad_counts_are_named_before_any_call(clock, options, named):
    call = clock.call(1.0)
    with pytest.raises(ValueError, match=named):
        measure_latency(call, **options)
    with pytest.raises(ValueError, match=named):
        compare_latency({"a": call}, **options)
    assert call.calls == 0


def test_no_calls_is_an_error():
    with pytest.raises(ValueError, match="expected at least one call"):
        compare_latency({})

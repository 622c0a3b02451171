"""Timing with a clock of our own, so that every number is known beforehand."""

from __future__ import annotations

import dataclasses
import math
import shutil
import statistics
import time
from itertools import cycle

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.measure import latency
from lightning_compress.measure.latency import Latency, compare_latency, faster, latency_of, measure_latency


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


class Sleeper(nn.Module):
    """Takes a known time, and notes how it was called."""

    def __init__(self, milliseconds):
        super().__init__()
        self.inner = nn.Dropout()
        self.sleep_s = milliseconds / 1e3
        self.calls = 0
        self.seen = set()

    def forward(self, x, *, scale=1.0):
        self.calls += 1
        self.seen.add((self.training, torch.is_grad_enabled(), scale))
        time.sleep(self.sleep_s)
        return x * scale


def test_a_module_that_sleeps_20_ms_takes_20_ms():
    """Right within 5 %, though other programs run: a sleep ends late at times, which the median leaves out."""
    net = Sleeper(20.0).train()
    net.inner.eval()
    got = latency_of(net, (torch.zeros(6, 3),), {"scale": 2.0}, warmup=2, runs=25)
    assert got.median_ms == pytest.approx(20.0, rel=0.05)
    assert got.min_ms >= 20.0
    assert (got.runs, got.batch, got.device, got.how) == (25, 6, "cpu", "eager")
    assert got.threads == torch.get_num_threads()
    assert net.calls == 27
    assert net.seen == {(False, False, 2.0)}
    assert net.training, "modes are put back"
    assert not net.inner.training, "each layer's own"


def test_modes_are_put_back_when_a_forward_fails():
    net = Sleeper(0.0).train()
    with pytest.raises(TypeError):
        latency_of(net, ("no tensor", "and one too many"))
    assert net.training


def test_inputs_without_a_tensor_have_no_batch():
    assert latency_of(Sleeper(0.0), (3.0,), warmup=0, runs=1).batch is None
    assert latency_of(Sleeper(0.0), (torch.tensor(1.0),), warmup=0, runs=1).batch is None


COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")


@COMPILER
def test_a_compiled_module_is_compiled_in_the_warm_up_and_stays_as_it_was():
    net = nn.Linear(3, 2)
    before = dict(net.__dict__)
    got = latency_of(net, (torch.zeros(5, 3),), compiled=True, warmup=1, runs=5)
    assert got.how == "compiled"
    assert got.p90_ms < 500.0, "a compilation was timed"
    assert net.__dict__ == before
    with pytest.raises(ValueError, match="warmup"):
        latency_of(net, (torch.zeros(5, 3),), compiled=True, warmup=0)


class Noting(nn.Module):
    """Notes whether it was the compiled one that ran last; has nothing for the C++ compiler to do."""

    def __init__(self):
        super().__init__()
        self.compiled = None

    def forward(self, x):
        self.compiled = torch.compiler.is_compiling()
        return x.t()


@COMPILER
def test_models_beyond_the_limit_of_torch_are_compiled_too():
    """It compiles one piece of code for 8 models, and runs those after them eagerly; for one here, to save time."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for width in (1, 2, 3):
            net = Noting()
            latency_of(net, (torch.zeros(width, 2),), compiled=True, warmup=1, runs=2)
            assert net.compiled is True


def test_an_exported_program_is_timed_too():
    program = torch.export.export(nn.Linear(3, 2).eval(), (torch.zeros(5, 3),))
    assert latency_of(program.module(), (torch.zeros(5, 3),), runs=3).batch == 5


def timed(times_ms):
    return latency._summary(np.asarray(times_ms), 1)


DRAWS = {
    "normal": lambda rng, n: rng.normal(10.0, 1.0, n),
    "skewed": lambda rng, n: 5.0 + rng.exponential(1.0, n),
    "two speeds": lambda rng, n: np.where(rng.random(n) < 0.5, 5.0, 9.0) + rng.normal(0.0, 0.1, n),
    "rarely late": lambda rng, n: np.where(rng.random(n) < 0.08, 15.0, 5.0) + rng.normal(0.0, 0.01, n),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("runs", [10, 50])
def test_two_timings_of_one_thing_are_hardly_ever_ranked(name, runs):
    rng = np.random.default_rng(0)
    ranked = [faster(timed(DRAWS[name](rng, runs)), timed(DRAWS[name](rng, runs))) is not None for _ in range(300)]
    assert sum(ranked) <= 0.03 * len(ranked)


@pytest.mark.parametrize("name", ["normal", "skewed"])
def test_what_is_twice_as_slow_is_ranked(name):
    rng = np.random.default_rng(0)
    for _ in range(50):
        fast, slow = timed(DRAWS[name](rng, 50)), timed(2 * DRAWS[name](rng, 50))
        assert (faster(fast, slow), faster(slow, fast)) == (True, False)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (Latency(1.0, 0.9, 1.1, 0.9, 50), Latency(1.2, 1.15, 1.3, 1.1, 50), True),
        (Latency(1.2, 1.15, 1.3, 1.1, 50), Latency(1.0, 0.9, 1.1, 0.9, 50), False),
        (Latency(1.0, 0.9, 1.25, 0.9, 50), Latency(1.2, 1.15, 1.3, 1.1, 50), None),  # the fast one's p90 is above
        (Latency(1.0, 0.9, 1.1, 0.9, 50), Latency(1.2, 0.95, 1.3, 0.9, 50), None),  # the slow one's p10 is below
        (Latency(1.0, 1.0, 1.0, 1.0, 1), Latency(9.0, 9.0, 9.0, 9.0, 1), None),  # one run knows no noise
        (Latency(1.0, 1.0, 1.0, 1.0, 50), Latency(1.0, 1.0, 1.0, 1.0, 50), None),
    ],
)
def test_ranks(first, second, expected):
    assert faster(first, second) is expected


def test_a_busy_machine_is_not_ranked():
    """Two of the same, while the machine is held up for part of the runs of one of them."""
    quiet = timed([1.0, 1.1] * 25)
    busy = timed([1.0, 1.1] * 10 + [2.5] * 30)
    assert busy.median_ms == 2.5
    assert faster(quiet, busy) is None
    assert busy.spread == pytest.approx((2.5 - 1.0) / 2.5)


def test_the_noise_is_the_standard_error_of_the_median():
    rng = np.random.default_rng(0)
    samples = rng.normal(10.0, 1.0, (4000, 100))
    expected = np.median(samples, axis=1).std()
    assert statistics.fmean(timed(row).noise_ms for row in samples[:400]) == pytest.approx(expected, rel=0.05)
    assert timed(samples[0, :9]).noise_ms == math.inf


def test_a_latency_of_before_is_still_one():
    old = Latency(4.0, 3.5, 4.5, 3.4, 50, 1, 1.0)
    assert dataclasses.astuple(old)[7:] == (None,) * 5


@pytest.mark.parametrize("runs", [1, 7, 8, 50, 51])
def test_the_interval_of_the_speedup_is_that_of_order_statistics(clock, runs):
    """Narrowest of the intervals between the k-th smallest and k-th largest ratio that hold the median in 99 %."""
    ratios = np.random.default_rng(runs).lognormal(0.0, 0.3, runs)
    calls = {"dense": clock.call(*ratios * 1000), "int8": clock.call(*[1000.0] * runs)}
    got = compare_latency(calls, warmup=0, runs=runs)["int8"]
    missed = [2 * sum(math.comb(runs, i) for i in range(k)) / 2**runs for k in range(1, runs // 2 + 1)]
    k = sum(chance <= 0.01 for chance in missed)
    expected = (None, None) if k == 0 else (np.sort(ratios)[k - 1], np.sort(ratios)[-k])
    assert (got.speedup_low, got.speedup_high) == (pytest.approx(expected) if k else (None, None))
    assert (k > 0) == (runs >= 8)


def test_the_interval_holds_the_true_speedup_in_99_of_100():
    rng = np.random.default_rng(0)
    samples = 2.0 * rng.lognormal(0.0, 0.3, (1000, 30))  # their median is 2
    intervals = [latency._interval(row) for row in samples]
    assert sum(low <= 2.0 <= high for low, high in intervals) >= 985
    assert statistics.fmean(high - low for low, high in intervals) < 1.0

"""How fast: wall-clock time of a call, with its spread, and fair ratios between calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np

__all__ = ["Latency", "compare_latency", "measure_latency"]


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one call in milliseconds.

    `threads` is what the caller said it ran on, None where nothing was said. `speedup` is set by
    `compare_latency` only: how many times faster than the first call of that comparison.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    min_ms: float
    runs: int
    threads: int | None = None
    speedup: float | None = None


def measure_latency(
    call: Callable[[], object], *, warmup: int = 10, runs: int = 50, threads: int | None = None
) -> Latency:
    """Time `call` with `perf_counter_ns`, one sample a run, after `warmup` untimed runs.

    On an accelerator the call itself must wait for its work (`torch.cuda.synchronize()` as its last line): a
    kernel that was only launched has cost nothing yet. Prepare inputs outside the call.

    Args:
        call: What to time, without arguments.
        warmup: Untimed runs first: compilation, caches, clocks.
        runs: Timed runs.
        threads: How many threads the call computes on. It is recorded, not set: torch and ONNX Runtime each
            have their own switch.

    Raises:
        ValueError: `runs` or `threads` below 1, or `warmup` below 0.

    >>> measure_latency(lambda: None, runs=3, threads=1).runs
    3
    """
    _check(warmup, runs, threads)
    return _summary(_times_ms({"": call}, warmup, runs)[""], threads)


def compare_latency(
    calls: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 10,
    runs: int = 50,
    threads: int | None = None,
) -> dict[str, Latency]:
    """Time several calls in turns (A B A B ...), so that a machine that slows down slows all of them.

    `speedup` is the median over the rounds of first / this, both from the same round: it holds where the
    ratio of two medians taken minutes apart would not. On an accelerator each call must wait for its work, as
    in `measure_latency`.

    Args:
        calls: Name to call; the first is what the others are compared with.
        warmup: Untimed rounds first.
        runs: Timed rounds.
        threads: How many threads every one of the calls computes on; recorded, not set.

    Raises:
        ValueError: No calls, `runs` or `threads` below 1, or `warmup` below 0.

    >>> compare_latency({"dense": lambda: None, "int8": lambda: None}, runs=3)["dense"].speedup
    1.0
    """
    if not calls:
        raise ValueError("expected at least one call to time, got none; pass {'dense': call, 'int8': call}")
    _check(warmup, runs, threads)
    times_ms = _times_ms(calls, warmup, runs)
    first_ms = next(iter(times_ms.values()))
    return {
        name: _summary(own_ms, threads, speedup=float(np.median(first_ms / own_ms)))
        for name, own_ms in times_ms.items()
    }


def _check(warmup: int, runs: int, threads: int | None) -> None:
    least = {"warmup": (warmup, 0), "runs": (runs, 1), "threads": (1 if threads is None else threads, 1)}
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise ValueError(f"a latency needs {name} of at least {minimum}, got {name}={value}; raise it")


def _times_ms(calls: Mapping[str, Callable[[], object]], warmup: int, runs: int) -> dict[str, np.ndarray]:
    """Milliseconds of every run, by name; all calls take one turn before any takes its next."""
    nanoseconds: dict[str, list[int]] = {name: [] for name in calls}
    for _ in range(warmup + runs):
        for name, call in calls.items():
            start = perf_counter_ns()
            call()
            nanoseconds[name].append(perf_counter_ns() - start)
    # a coarse clock may read 0 ns for an empty call; 1 ns keeps the ratios finite
    return {name: np.maximum(values[warmup:], 1) / 1e6 for name, values in nanoseconds.items()}


def _summary(times_ms: np.ndarray, threads: int | None, speedup: float | None = None) -> Latency:
    p10, p50, p90 = (float(value) for value in np.percentile(times_ms, (10, 50, 90)))
    return Latency(p50, p10, p90, float(times_ms.min()), len(times_ms), threads, speedup)

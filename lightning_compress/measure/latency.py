"""How fast: wall-clock time of a call, with its spread, and fair ratios between calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter_ns
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Latency", "compare_latency", "faster", "latency_of", "measure_latency"]

FEWEST_RUNS = 10  # fewer say too little about their own spread
CONFIDENCE = 0.99
ERRORS = 3.0  # standard errors that a difference must be above


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one call in milliseconds.

    `threads` is what the caller said it ran on, None where nothing was said. `speedup` is set by
    `compare_latency` only: how many times faster than the first call of that comparison; it lies between `speedup_low`
    and `speedup_high` with 99 % confidence, None for fewer than 8 rounds. `batch`, `device` and `how` (eager or
    compiled) are set by `latency_of`.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    min_ms: float
    runs: int
    threads: int | None = None
    speedup: float | None = None
    batch: int | None = None
    device: str | None = None
    how: str | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None

    @property
    def spread(self) -> float:
        """(p90 - p10) / median: the width of the middle 80 % of the runs as a share of the median."""
        return (self.p90_ms - self.p10_ms) / self.median_ms

    @property
    def noise_ms(self) -> float:
        r"""The standard error of the median, from the spread and the number of runs.

        \sqrt{\pi / 2} \sigma / \sqrt{runs}, with \sigma = (p90 - p10) / 2.563 as of a normal distribution; infinite for
        fewer than 10 runs. Runs count as independent: a machine that is slower for minutes is not in it.
        """
        if self.runs < FEWEST_RUNS:
            return math.inf
        return math.sqrt(math.pi / 2) * (self.p90_ms - self.p10_ms) / 2.563 / math.sqrt(self.runs)


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
    ratio of two medians taken minutes apart would not. `speedup_low` and `speedup_high` are the 99 % interval of that
    median by order statistics, of whatever distribution: an interval with 1 in it ranks nothing. On an accelerator
    each call must wait for its work, as in `measure_latency`.

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
    found = {}
    for name, own_ms in times_ms.items():
        ratios = first_ms / own_ms
        low, high = _interval(ratios)
        summary = _summary(own_ms, threads, speedup=float(np.median(ratios)))
        found[name] = replace(summary, speedup_low=low, speedup_high=high)
    return found


def _interval(values: np.ndarray) -> tuple[float | None, float | None]:
    """Return the 99 % interval of the median: each value is above it or below it as a coin falls."""
    n, below, out = len(values), 0.0, 0
    while out < n and 2 * (below + math.comb(n, out) / 2**n) <= 1 - CONFIDENCE:
        below += math.comb(n, out) / 2**n
        out += 1
    if out == 0:
        return None, None
    ordered = np.sort(values)
    return float(ordered[out - 1]), float(ordered[n - out])


def faster(first: Latency, second: Latency) -> bool | None:
    """Say whether the first is faster than the second, or None: their difference is within the noise.

    They are ranked when each median lies outside the other's p10 to p90, and the medians differ by more than three
    standard errors of their difference (`Latency.noise_ms`). The errors alone would do if runs were independent, but a
    busy machine has slower and faster moments, which more runs do not average away. Small differences need
    `compare_latency`, where no moment is one model's alone: its `speedup_low` above 1 says faster.

    >>> faster(Latency(1.0, 0.9, 1.1, 0.8, runs=50), Latency(2.0, 1.9, 2.1, 1.8, runs=50))
    True
    >>> faster(Latency(1.0, 0.5, 3.0, 0.4, runs=50), Latency(1.1, 0.5, 3.0, 0.4, runs=50)) is None
    True
    """
    fast, slow = sorted((first, second), key=lambda each: each.median_ms)
    apart = fast.p90_ms < slow.median_ms and fast.median_ms < slow.p10_ms
    if not apart or slow.median_ms - fast.median_ms <= ERRORS * math.hypot(fast.noise_ms, slow.noise_ms):
        return None
    return first is fast


def latency_of(
    module: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    compiled: bool = False,
    warmup: int = 10,
    runs: int = 50,
) -> Latency:
    """Time a module's forward, in eval mode and without gradients, where its parameters are. Runs after training.

    On CUDA each run waits for its work. Layers get the mode they were in back. `threads` is torch's own number on a
    CPU, `batch` the first dimension of the first tensor among the inputs.

    Args:
        module: the model; what `torch.export` made of one too: `program.module()`.
        args: its inputs, on its device.
        kwargs: its inputs by name.
        compiled: time it under `torch.compile`, for these shapes, compiled in the warm-up; the module stays as it is.
        warmup: untimed runs first.
        runs: timed runs.

    Raises:
        ValueError: `runs` below 1, `warmup` below 0, or below 1 where it has to compile.

    >>> latency_of(nn.Linear(3, 2), (torch.zeros(5, 3),), runs=10).batch
    5
    """
    _check(warmup if not compiled else warmup - 1, runs, None)
    inputs = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
    device = next((tensor.device for tensor in (*module.parameters(), *inputs)), torch.device("cpu"))
    run = _compiled(module) if compiled else module

    def call() -> None:
        run(*args, **(kwargs or {}))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    threads = torch.get_num_threads() if device.type == "cpu" else None
    with _evaluating(module), torch.no_grad():
        timed = measure_latency(call, warmup=warmup, runs=runs, threads=threads)
    batch = next((tensor.shape[0] for tensor in inputs if tensor.dim()), None)
    return replace(timed, batch=batch, device=str(device), how="compiled" if compiled else "eager")


def _compiled(module: nn.Module) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    # Code of its own: torch compiles one piece of code for 8 models at most, and runs those after them eagerly.
    run.__code__ = run.__code__.replace()
    return torch.compile(run, dynamic=False)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(layer, layer.training) for layer in module.modules()]
    for layer, _ in modes:
        layer.training = False  # not eval(), which a module may have overridden
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training


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

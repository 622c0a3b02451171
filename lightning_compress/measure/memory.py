"""How much memory: the most bytes that lay in torch's allocator at one time while a call ran."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["PeakMemory", "peak_memory"]


@dataclass(frozen=True)
class PeakMemory:
    """The most bytes that lay there at one time beyond those from before the call; `how` says how they were counted."""

    peak_bytes: int
    how: str


def peak_memory(call: Callable[[], object], *, runs: int = 2, device: torch.device | str = "cpu") -> PeakMemory:
    """Run `call` and return the most memory that it held at one time.

    What lay there before the first run, such as the model's weights, is not counted; what one run leaves for the next,
    such as an optimizer's state, is. So the peak of a training step is that of its second run, with the state that the
    first has made; prepare nothing before, and give the whole step: zero_grad, forward, backward, step.

    On a CPU each allocation of torch's allocator is recorded by torch.profiler, to the byte: no memory of other
    libraries, nor of Python threads that the call starts. On CUDA it is torch's allocator's own peak, rounded up to its
    blocks of 512 bytes; memory of CUDA itself and of its libraries is not in it.

    Args:
        call: what to run, without arguments.
        runs: how often it is run.
        device: where the call computes, "cpu" or a CUDA device.

    Raises:
        ValueError: `runs` below 1, another kind of device, or nothing was allocated.

    >>> peak_memory(lambda: torch.zeros(1000)).peak_bytes
    4000
    """
    device = torch.device(device)
    if runs < 1:
        raise ValueError(f"expected at least one run, got runs={runs}; raise it")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"expected the device 'cpu' or 'cuda', got '{device}'; its allocator's peak is not known here")
    found = _on_cuda(call, runs, device) if device.type == "cuda" else _on_cpu(call, runs)
    if found.peak_bytes == 0:
        raise ValueError(f"the call allocated nothing on '{device}' in its own thread, so that nothing was measured")
    return found


def _on_cuda(call: Callable[[], object], runs: int, device: torch.device) -> PeakMemory:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(runs):
        call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return PeakMemory(peak, f"torch's CUDA allocator's peak, less what lay there before, over {runs} runs")


def _on_cpu(call: Callable[[], object], runs: int) -> PeakMemory:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            for _ in range(runs):
                call()
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    memory = (event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0)
    ordered = sorted(memory, key=lambda event: float(event["ts"]))
    peak = _peak_bytes(event["args"] for event in ordered)
    return PeakMemory(peak, f"every allocation of torch's CPU allocator, recorded over {runs} runs")


def _peak_bytes(events: Iterable[Mapping[str, Any]]) -> int:
    """Return the most that lay there at once; what was there before the first event is not told, nor its end."""
    held: dict[int, int] = {}
    now = peak = 0
    for event in events:
        address, size = int(event["Addr"]), int(event["Bytes"])
        if size > 0:
            held[address] = size
            now += size
        else:
            now -= held.pop(address, 0)
        peak = max(peak, now)
    return peak

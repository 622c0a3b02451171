"""How much energy: what the machine's own counters say, or nothing."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

__all__ = ["Energy", "measure_energy"]

log = logging.getLogger(__name__)

RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Energy:
    """Energy of the whole machine's processors while a call ran, in joules a call.

    `parts` has the joules of each counter that was read, `joules` is their sum. What the machine uses when idle, and
    for other programs meanwhile, is in it: it is not the call's alone. `seconds` is the time of one call.
    """

    joules: float
    seconds: float
    runs: int
    parts: Mapping[str, float]
    how: str


@dataclass(frozen=True)
class _Counter:
    """A counter of joules that begins again from 0 after `range_joules`; None is never."""

    name: str
    read: Callable[[], float]
    range_joules: float | None = None


def measure_energy(call: Callable[[], object], runs: int = 10, *, root: str | Path = RAPL) -> Energy | None:
    """Run `call` and return what the energy counters of the machine rose by, or None: then it was not measured.

    On Linux with Intel's or AMD's RAPL: the packages and their DRAM (cores and graphics are within their package, the
    platform's own counter `psys` covers the packages; neither is added to them). With NVIDIA's NVML, where `pynvml` is
    installed: each visible GPU. Counters are read before the first run and after each one, so a counter may wrap
    around between any two, if one run is shorter than its range (minutes); they tick about each millisecond (RAPL) or
    each 20 to 100 ms (NVML), so let all runs together take a second or more. The idle machine is not subtracted. On an
    accelerator the call itself must wait for its work.

    Counters that can't be read (RAPL's need root by default) are named in the log, and nothing is made up for them.

    Args:
        call: what to run, without arguments; it is not run where there is no counter.
        runs: how often.
        root: where the kernel shows RAPL's zones.

    Raises:
        ValueError: `runs` below 1.
    """
    if runs < 1:
        raise ValueError(f"expected at least one run, got runs={runs}; raise it")
    counters = [*_rapl(Path(root)), *_nvml()]
    if not counters:
        return None
    start = perf_counter()
    last = {counter: counter.read() for counter in counters}
    rose = dict.fromkeys(counters, 0.0)
    for _ in range(runs):
        call()
        now = {counter: counter.read() for counter in counters}
        for counter in counters:
            rose[counter] += _rise(last[counter], now[counter], counter.range_joules)
        last = now
    seconds = perf_counter() - start
    if not any(rose.values()):
        log.warning("energy is not measured: no counter moved in %.3f s; raise runs", seconds)
        return None
    parts = {counter.name: joules / runs for counter, joules in rose.items()}
    how = f"{', '.join(parts)}; mean of {runs} runs; the idle machine and other programs are in it"
    return Energy(sum(parts.values()), seconds / runs, runs, parts, how)


def _rise(before: float, after: float, range_joules: float | None) -> float:
    return after - before if after >= before or range_joules is None else after + range_joules - before


def _rapl(root: Path) -> list[_Counter]:
    """Return the packages' counters and those of their DRAM."""
    counters = []
    for zone in sorted(root.glob("intel-rapl:*")):
        name = _text(zone / "name")
        parent = _text(root / zone.name.rpartition(":")[0] / "name") if zone.name.count(":") == 2 else None
        if name is None or not (name.startswith("package") if parent is None else name == "dram"):
            continue
        energy, most = _text(zone / "energy_uj"), _text(zone / "max_energy_range_uj")
        if energy is None or most is None:
            log.warning("the energy of %s is not measured: %s can't be read by this user", name, zone / "energy_uj")
            continue
        label = name if parent is None else f"{parent} {name}"
        counters.append(_Counter(f"RAPL {label}", _microjoules(zone / "energy_uj"), int(most) / 1e6))
    return counters


def _microjoules(path: Path) -> Callable[[], float]:
    return lambda: int(path.read_text(encoding="ascii")) / 1e6


def _text(path: Path) -> str | None:
    """Return a file of the kernel's; None where it isn't there or isn't for this user."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None


def _nvml() -> list[_Counter]:
    """Return the counters of the GPUs that torch sees."""
    if not torch.cuda.is_available() or importlib.util.find_spec("pynvml") is None:
        return []
    nvml: Any = importlib.import_module("pynvml")
    nvml.nvmlInit()
    counters = []
    for index in range(torch.cuda.device_count()):
        uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except nvml.NVMLError as error:
            log.warning("the energy of GPU %d is not measured: %s", index, error)
            continue
        counters.append(_Counter(f"NVML GPU {index}", _millijoules(nvml, handle)))
    return counters


def _millijoules(nvml: Any, handle: Any) -> Callable[[], float]:
    return lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3

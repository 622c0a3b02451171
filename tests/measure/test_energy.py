"""Counters of energy, read from a tree of files as the kernel's is: what is parsed, added and wrapped around.

No test here measures joules: the machines that run them show no counters. What is tested is that the numbers are those
of the counters, and that without them there is no number.
"""

from __future__ import annotations

import json
import logging
import sys
import types
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from lightning_compress.measure import measure_energy

RANGE_UJ = 262_143_328_850


class Zones:
    """The files of /sys/class/powercap, and a call that lets the counters rise."""

    def __init__(self, root: Path, names: dict[str, str]) -> None:
        self.root = root
        for zone, name in names.items():
            (root / zone).mkdir()
            (root / zone / "name").write_text(f"{name}\n")
            (root / zone / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
            self.set(zone, 0)

    def set(self, zone: str, microjoules: int) -> None:
        (self.root / zone / "energy_uj").write_text(f"{microjoules}\n")

    def get(self, zone: str) -> int:
        return int((self.root / zone / "energy_uj").read_text())

    def call(self, **joules: float):
        """Each call adds these joules to the zones, which wrap around as the kernel's do."""

        def run():
            for zone in self.root.iterdir():
                added = joules.get(zone.name.replace("intel-rapl:", "z").replace(":", "_"), 0.0)
                self.set(zone.name, (self.get(zone.name) + round(added * 1e6)) % (RANGE_UJ + 1))

        return run


SERVER = {
    "intel-rapl:0": "package-0",
    "intel-rapl:0:0": "core",
    "intel-rapl:0:1": "dram",
    "intel-rapl:1": "package-1",
    "intel-rapl:2": "psys",
}


def test_packages_and_their_dram_are_added_and_nothing_twice(tmp_path):
    zones = Zones(tmp_path, SERVER)
    got = measure_energy(zones.call(z0=10.0, z0_0=4.0, z0_1=1.5, z1=7.0, z2=30.0), runs=4, root=tmp_path)
    assert got.parts == pytest.approx({"RAPL package-0": 10.0, "RAPL package-0 dram": 1.5, "RAPL package-1": 7.0})
    assert got.joules == pytest.approx(18.5)
    assert got.runs == 4
    assert got.seconds > 0.0
    assert "idle machine" in got.how
    assert json.loads(json.dumps(asdict(got)))["joules"] == got.joules


def test_a_counter_may_wrap_around_between_any_two_runs(tmp_path):
    zones = Zones(tmp_path, {"intel-rapl:0": "package-0"})
    zones.set("intel-rapl:0", RANGE_UJ - 5_000_000)
    # three runs, each of 0.6 of the range: it wraps around twice
    each = 0.6 * RANGE_UJ / 1e6
    got = measure_energy(zones.call(z0=each), runs=3, root=tmp_path)
    assert got.joules == pytest.approx(each, rel=1e-9)


def test_without_counters_nothing_is_run_and_nothing_made_up(tmp_path):
    assert measure_energy(lambda: pytest.fail("it ran"), root=tmp_path) is None
    assert measure_energy(lambda: pytest.fail("it ran"), root=tmp_path / "none") is None
    Zones(tmp_path, {"intel-rapl:0": "psys"})
    assert measure_energy(lambda: pytest.fail("it ran"), root=tmp_path) is None


def test_a_counter_that_is_not_for_this_user_is_named(tmp_path, caplog):
    Zones(tmp_path, {"intel-rapl:0": "package-0"})
    # as the kernel shows it to others than root: there, but not to be read (root, as in CI, may read any mode)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir()
    with caplog.at_level(logging.WARNING):
        assert measure_energy(lambda: pytest.fail("it ran"), root=tmp_path) is None
    assert "package-0 is not measured" in caplog.text
    assert "can't be read by this user" in caplog.text


def test_a_counter_that_stood_still_is_no_energy_of_zero(tmp_path, caplog):
    Zones(tmp_path, {"intel-rapl:0": "package-0"})
    with caplog.at_level(logging.WARNING):
        assert measure_energy(lambda: None, root=tmp_path) is None
    assert "no counter moved" in caplog.text


def test_runs_below_one_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one run, got runs=0"):
        measure_energy(lambda: None, 0, root=tmp_path)


class FakeNvml(types.ModuleType):
    """pynvml's calls that are used, over one GPU that takes 2 J a call and one that has no counter."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.__spec__ = types.SimpleNamespace()
        self.millijoules = 5_000_000

    def nvmlInit(self):  # noqa: N802 - NVML's own name
        self.started = True

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        if handle == "GPU-uuid-1":
            raise self.NVMLError("Not Supported")
        return self.millijoules


def test_gpus_are_read_through_nvml_and_those_without_a_counter_named(tmp_path, monkeypatch, caplog):
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid=f"uuid-{index}"))

    def call():
        nvml.millijoules += 2000

    with caplog.at_level(logging.WARNING):
        got = measure_energy(call, runs=5, root=tmp_path)
    assert got.parts == {"NVML GPU 0": 2.0}
    assert got.joules == 2.0
    assert "GPU 1 is not measured: Not Supported" in caplog.text


@pytest.mark.skipif(not list(Path("/sys/class/powercap").glob("intel-rapl:*")), reason="this machine has no RAPL")
def test_the_machine_s_own_counters_rise_or_are_not_measured():
    got = measure_energy(lambda: sum(range(1_000_000)), runs=20)
    assert got is None or 0.0 < got.joules / got.seconds < 5000.0

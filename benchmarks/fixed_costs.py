"""What is paid once: attaching to 1000 layers, and importing the package: `python benchmarks/fixed_costs.py`."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from torch import nn

from lightning_compress.quantization.attach import attach, detach

RUNS = 7


def attach_and_detach_ms(layers: int = 1000) -> float:
    """Fake-quantization on and off again, all layers of one kind."""
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        for layer in net:
            attach(layer)
        for layer in net:
            detach(layer)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def import_ms() -> float:
    """`import lightning_compress` where lightning is imported already; each time in a fresh interpreter."""
    code = (
        "import time, lightning.pytorch; s = time.perf_counter(); import lightning_compress; "
        "print((time.perf_counter() - s) * 1e3)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(RUNS)
    ]
    return statistics.median(map(float, runs))


def main() -> None:
    record = {
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "lightning")},
        "runs": RUNS,
        "attach_and_detach_1000_layers_ms": round(attach_and_detach_ms(), 1),
        "import_above_lightning_ms": round(import_ms(), 1),
    }
    out = Path(__file__).parent / "results" / "fixed_costs.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()

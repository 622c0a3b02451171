"""A mask update at BERT-base's size against torch.kthvalue, in time and memory: `python benchmarks/threshold.py`.

Both find the threshold of global magnitude pruning and write the masks into the bool tensors that training holds. They
take turns in a random order each round, on one thread. Memory is measured in a fresh process each: the most it ever
held (VmHWM, Linux) less what it held before the update, with weights and masks there already.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_compress.pruning.threshold import Piecewise, Scored, keep_masks

SPARSITY = 0.9
BERT_BASE = [
    (30522, 768),
    (512, 768),
    (2, 768),
    *[(768, 768), (768, 768), (768, 768), (768, 768), (3072, 768), (768, 3072)] * 12,
    (768, 768),
]
BILLION = [(2500, 4000)] * 100
Update = Callable[[list[Tensor], list[Tensor]], object]


def made(shapes: list[tuple[int, int]], dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Weights of a normal distribution, filled in place so that nothing else was ever held; and masks of ones."""
    torch.manual_seed(0)
    weights = [torch.empty(shape, dtype=dtype).normal_(std=0.02) for shape in shapes]
    return weights, [torch.ones(shape, dtype=torch.bool) for shape in shapes]


def dropped(weights: list[Tensor]) -> int:
    return round(SPARSITY * sum(weight.numel() for weight in weights))


def write(scores: list[Scored], k: int, masks: list[Tensor]) -> None:
    found, _ = keep_masks(scores, k)
    for mask, new in zip(masks, found, strict=True):
        mask.copy_(new)


def ours(weights: list[Tensor], masks: list[Tensor]) -> None:
    write([Piecewise(weight, torch.abs) for weight in weights], dropped(weights), masks)


def signed(weights: list[Tensor], masks: list[Tensor]) -> None:
    """Scores with signs, by a function of the whole tensor: what movement pruning asks for."""
    write([weight.neg for weight in weights], dropped(weights), masks)


def kthvalue(weights: list[Tensor], masks: list[Tensor]) -> None:
    scores = torch.cat([weight.abs().flatten() for weight in weights])
    threshold = scores.kthvalue(dropped(weights)).values
    for mask, part in zip(masks, torch.split(scores, [mask.numel() for mask in masks]), strict=True):
        torch.gt(part, threshold, out=mask.view(-1))


def topk(weights: list[Tensor], masks: list[Tensor]) -> None:
    """As torch.nn.utils.prune does it: equal scores fall one by one."""
    scores = torch.cat([weight.abs().flatten() for weight in weights])
    flat = torch.ones(scores.numel(), dtype=torch.bool)
    flat[torch.topk(scores, dropped(weights), largest=False, sorted=False).indices] = False
    for mask, part in zip(masks, torch.split(flat, [mask.numel() for mask in masks]), strict=True):
        mask.view(-1).copy_(part)


def floor(weights: list[Tensor], masks: list[Tensor]) -> None:
    """Read the weights three times (two digits, the masks) and write the masks: no update in two passes is faster."""
    for _ in range(3):
        for weight in weights:
            weight.sum()
    for mask in masks:
        mask.fill_(True)


MEMORY: dict[str, tuple[Update, list[tuple[int, int]], torch.dtype]] = {
    "ours": (ours, BERT_BASE, torch.float32),
    "ours, signed scores by a function": (signed, BERT_BASE, torch.float32),
    "ours, 1 billion weights": (ours, BILLION, torch.bfloat16),
    "kthvalue": (kthvalue, BERT_BASE, torch.float32),
    "topk": (topk, BERT_BASE, torch.float32),
}


def held_mib(which: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(which)) / 1024


def extra_memory(name: str) -> dict[str, float]:
    """Runs in a process of its own; the difference is never too small, since VmHWM >= VmRSS before the update too."""
    update, shapes, dtype = MEMORY[name]
    weights, masks = made(shapes, dtype)
    before, started = held_mib("VmRSS"), time.perf_counter()
    update(weights, masks)
    seconds = time.perf_counter() - started
    return {"extra_mib": round(held_mib("VmHWM") - before, 1), "held_mib": round(before), "once_s": round(seconds, 2)}


def in_a_fresh_process(name: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--memory", name]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def timed(rounds: int) -> dict[str, np.ndarray]:
    """Return, for each variant, (rounds, 2) seconds of CPU and wall clock."""
    weights, masks = made(BERT_BASE)
    variants: list[Update] = [ours, kthvalue, topk, floor]
    times: dict[str, list[tuple[float, float]]] = {update.__name__: [] for update in variants}
    order = random.Random(0)
    kept = set()
    for _ in range(rounds):
        for update in order.sample(variants, len(variants)):
            cpu, wall = time.thread_time(), time.perf_counter()
            update(weights, masks)
            times[update.__name__].append((time.thread_time() - cpu, time.perf_counter() - wall))
            if update is not floor:
                kept.add(sum(int(mask.sum()) for mask in masks) if update is not kthvalue else -1)
    if kept != {sum(weight.numel() for weight in weights) - dropped(weights), -1}:
        raise SystemExit(f"the masks differ: {kept}")
    return {name: np.array(seconds) for name, seconds in times.items()}


def ratio(times: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    low, middle, high = np.percentile(times / reference, [25, 50, 75], axis=0)
    return {
        "wall": round(float(middle[1]), 3),
        "wall_p25": round(float(low[1]), 3),
        "wall_p75": round(float(high[1]), 3),
        "cpu": round(float(middle[0]), 3),
        "cpu_p25": round(float(low[0]), 3),
        "cpu_p75": round(float(high[0]), 3),
    }


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--memory", choices=MEMORY, help="measure this alone, in this process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print(json.dumps(extra_memory(options.memory)))
        return
    load = [round(value, 1) for value in os.getloadavg()]
    times = timed(options.rounds)
    record = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{cpu_model()}, {os.cpu_count()} cores, 1 thread",
        "load_average_before_and_after": [load[0], round(os.getloadavg()[0], 1)],
        "versions": {"torch": version("torch")},
        "rounds": options.rounds,
        "weights": sum(a * b for a, b in BERT_BASE),
        "tensors": len(BERT_BASE),
        "sparsity": SPARSITY,
        "median_cpu_s": {name: round(float(np.median(seconds[:, 0])), 3) for name, seconds in times.items()},
        "median_wall_s": {name: round(float(np.median(seconds[:, 1])), 3) for name, seconds in times.items()},
        "ours_over": {name: ratio(times["ours"], times[name]) for name in ("kthvalue", "topk", "floor")},
        "memory": {name: in_a_fresh_process(name) for name in MEMORY},
    }
    out = Path(__file__).parent / "results" / "threshold.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()

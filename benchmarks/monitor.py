"""What CompressionMonitor adds to a training step at its default frequency: `python benchmarks/monitor.py`.

Two fits take steps in turn, each in its own thread: GradualPruning and QuantizationAwareTraining alone, and with the
monitor. A short run is the dear case: looks are at least 10 steps apart, and in a long one at most 41 in all. Two
answers are written: the ratio of the summed CPU seconds, with its spread over blocks of steps; and the CPU seconds
inside the monitor's own hooks over those of all steps, which does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import logging
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent))
from models import SentenceClassifier, sentence_batch
from overhead import ALLOCATOR, Stopwatch, Turns, in_turns
from training import Endless, quiet_trainer

from examples.images import Classifier
from lightning_compress import CompressionMonitor, GradualPruning, QuantizationAwareTraining

BUDGET = 1.01
BLOCKS = 6
HOOKS = ("on_train_batch_start", "on_train_batch_end", "on_validation_end")


class Timed(CompressionMonitor):
    """The monitor, with the CPU time of each of its hooks inside the steps."""

    def __init__(self, **options: Any) -> None:
        super().__init__(measure_size=False, **options)
        self.seconds: list[float] = []
        for name in HOOKS:
            setattr(self, name, self._timed(getattr(self, name)))

    def _timed(self, hook: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            started = time.thread_time()
            hook(*args)
            self.seconds.append(time.thread_time() - started)

        return run


def image_batch(size: int = 64) -> list[torch.Tensor]:
    """Images of one channel, as those of examples/images.py."""
    return [torch.randn(size, 1, 28, 28), torch.randint(10, (size,))]


class Images(Classifier):
    """The CNN of examples/images.py."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])


def measure(
    module: L.LightningModule, batch: Any, steps: int, folder: str, logger: Any, alone: bool = False
) -> dict[str, Any]:
    """Return CPU seconds of each step without (unless alone) and with the monitor, and those of the monitor's hooks."""
    monitor = Timed(folder=folder)
    names: dict[str, list[L.Callback]] = {"without": [], "with": [monitor]}
    if alone:
        del names["without"]
    turns = Turns(list(names))
    watches = {name: Stopwatch(name, turns, steps) for name in names}

    def fit(name: str) -> None:
        callbacks = [GradualPruning(0.9), QuantizationAwareTraining(), *names[name]]
        # The watch's first hook comes before all callbacks, its second after them.
        watched = [watches[name], *callbacks, End(watches[name])]
        trainer = quiet_trainer(watched, max_steps=steps, logger=logger(f"{folder}/{name}"))
        trainer.fit(copy.deepcopy(module), torch.utils.data.DataLoader(Endless(batch), batch_size=None))

    in_turns(turns, names, fit)
    found = {name: np.array(watch.steps)[:, 0] for name, watch in watches.items()}
    looks = len({row.step for row in monitor.rows})
    return {**found, "hooks": sum(monitor.seconds), "looks": looks, "longest": max(monitor.seconds)}


class End(L.Callback):
    """The last callback of the list: a step ends when all others have done their work."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch, self.end = watch, watch.on_train_batch_end
        watch.on_train_batch_end = lambda *_: None

    def on_train_batch_end(self, *args: Any) -> None:
        self.end(*args)


def summary(times: dict[str, Any]) -> dict[str, float]:
    """Put the two answers side by side."""
    pairs = [(np.array_split(times["with"], BLOCKS)[i].sum(), np.array_split(times["without"], BLOCKS)[i].sum())
             for i in range(BLOCKS)]  # fmt: skip
    ratios = [one / other for one, other in pairs]
    return {
        "steps": len(times["without"]),
        "looks": times["looks"],
        "step_cpu_ms": float(np.median(times["without"]) * 1e3),
        "ratio_of_sums": float(times["with"].sum() / times["without"].sum()),
        "ratio_of_blocks_p25": float(np.percentile(ratios, 25)),
        "ratio_of_blocks_p50": float(np.percentile(ratios, 50)),
        "ratio_of_blocks_p75": float(np.percentile(ratios, 75)),
        "own_cpu_share_of_steps": float(times["hooks"] / times["without"].sum()),
        "own_cpu_ms_longest_hook": times["longest"] * 1e3,
        "budget": BUDGET - 1.0,
    }


def own_share(times: dict[str, Any]) -> dict[str, float]:
    """The second answer alone."""
    return {
        "steps": len(times["with"]),
        "looks": times["looks"],
        "step_cpu_ms": float(np.median(times["with"]) * 1e3),
        "own_cpu_share_of_steps": float(times["hooks"] / (times["with"].sum() - times["hooks"])),
        "own_cpu_ms_longest_hook": times["longest"] * 1e3,
        "budget": BUDGET - 1.0,
    }


def wandb_logger(folder: str) -> Any:
    """An offline run: tables and histograms are made and written."""
    from lightning.pytorch.loggers import WandbLogger

    Path(folder).mkdir(parents=True)
    return WandbLogger(project="benchmark", save_dir=folder, offline=True)


def csv_logger(folder: str) -> Any:
    """Lightning's plainest logger."""
    from lightning.pytorch.loggers import CSVLogger

    return CSVLogger(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs=2, default=[400, 60], help="of the CNN, of BERT-mini")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "monitor.json"))
    parser.add_argument("--own-share", action="store_true", help="of BERT-mini, only the second answer: half the time")
    options = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (".*does not have many workers.*", ".*but have no `val_dataloader`.*", ".*has `__len__` defined.*"):
        warnings.filterwarnings("ignore", message=message)
    torch.manual_seed(0)
    cases = {
        "CNN of examples/images.py, batch 64": (Images(), image_batch(), options.steps[0]),
        "BERT-mini, 64 tokens, batch 16": (SentenceClassifier(), sentence_batch(), options.steps[1]),
    }
    os.environ["WANDB_SILENT"] = "true"
    record: dict[str, Any] = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, 1 thread",
        "versions": {name: version(name) for name in ("torch", "lightning", "transformers")},
        "cases": {},
    }
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for case, (module, batch, steps) in cases.items():
        paired = case.startswith("CNN") or not options.own_share
        with tempfile.TemporaryDirectory() as folder:
            times = measure(module, batch, steps, folder, csv_logger, alone=not paired)
            record["cases"][case] = summary(times) if paired else own_share(times)
            if case.startswith("CNN"):
                times = measure(module, batch, steps, folder + "/wandb", wandb_logger, alone=True)
                record["cases"][f"{case}, W&B offline"] = own_share(times)
        out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for case, found in record["cases"].items():
        print(f"\n{case}")
        for name, value in found.items():
            print(f"  {name:28} {value:.4f}")
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    if os.environ.get("MALLOC_ARENA_MAX") != "1":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    main()

"""Step time of each callback against the plain step: `python benchmarks/overhead.py`.

Each variant is a real `trainer.fit` in its own thread; a baton lets them take steps in turn, so that the machine's
drift hits all alike. A step is timed from the batch's start to its end, callbacks included. Printed are medians over
rounds of the ratio to the plain step of the same round, by CPU time of the thread and by wall clock, on one thread.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import logging
import os
import platform
import random
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from models import ImageClassifier, SentenceClassifier, image_batch, sentence_batch
from training import RUN_STEPS, Endless, quiet_trainer

from lightning_compress import Constant, Distillation, GradualPruning, QuantizationAwareTraining
from lightning_compress.distillation.details import Details as Teaching
from lightning_compress.distillation.features import attention_transfer, feature_mse
from lightning_compress.distillation.gradient_terms import GradientTerm
from lightning_compress.distillation.terms import LayerTerm
from lightning_compress.quantization.details import Details

WARMUP = 3
BUDGETS = {
    "pruning": 1.01,
    "fake-quant": 1.6,
    "fake-quant, compiled": 1.3,
    "fake-quant, ranges frozen": 1.1,
    "distillation / (student + teacher forward)": 1.02,
    "distillation with layers / (student + teacher forward)": 1.05,
    "distillation, teacher in bf16 / (student + teacher forward)": 0.75,
    "distillation, cached logits / plain": 1.02,
    "distillation, cached logits / (distillation - teacher forward)": 1.02,
    "distillation with layers, cached / (distillation with layers - teacher forward)": 1.02,
    "distillation of input gradients / (student + teacher forward)": None,
}
# glibc gives each thread a heap of its own and large tensors back to the system at once: page faults would then tell
# the variants apart. One heap that keeps its memory treats all alike.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}
Times = tuple[float, float]


class Turns:
    """Hands a baton round, in a new random order each round: exactly one variant's thread runs at a time."""

    def __init__(self, names: list[str]) -> None:
        self.locks = {name: threading.Semaphore(0) for name in names}
        self.random = random.Random(0)
        self.waiting: list[str] = []
        self.failure: BaseException | None = None

    def wait(self, name: str) -> None:
        self.locks[name].acquire()
        if self.failure is not None:
            raise SystemExit

    def pass_on(self) -> None:
        if not self.waiting:
            self.waiting = self.random.sample(list(self.locks), len(self.locks))
        self.locks[self.waiting.pop()].release()

    def fail(self, error: BaseException) -> None:
        self.failure = self.failure or error
        for lock in self.locks.values():
            lock.release()


class Stopwatch(L.Callback):
    """Times each step of one variant when its turn comes, and ends the fit; the last callback of the list."""

    def __init__(self, name: str, turns: Turns, steps: int, after: Callable[[Any], object] | None = None) -> None:
        self.name, self.turns, self.count, self.after = name, turns, steps, after
        self.steps: list[Times] = []
        self.extra: list[Times] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        self.turns.wait(self.name)
        self.started = now()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, out: Any, batch: Any, i: int
    ) -> None:
        self.steps.append(since(self.started))
        if self.after is not None:
            started = now()
            self.after(batch)
            self.extra.append(since(started))
        trainer.should_stop = len(self.steps) >= self.count
        self.turns.pass_on()


def now() -> Times:
    return time.thread_time(), time.perf_counter()


def since(started: Times) -> Times:
    cpu, wall = now()
    return cpu - started[0], wall - started[1]


def teacher_forward(teacher: torch.nn.Module) -> Callable[[Any], object]:
    teacher = copy.deepcopy(teacher).eval()

    def run(batch: Any) -> object:
        with torch.no_grad():
            if isinstance(batch, dict):
                return teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            return teacher(batch[0])

    return run


def layer_term(module: L.LightningModule) -> LayerTerm:
    """Hidden states of a transformer, feature maps of a CNN; by name, as an endless stream shows no examples."""
    if isinstance(module, SentenceClassifier):
        return LayerTerm(feature_mse, "net.bert.encoder.layer.?")
    return LayerTerm(attention_transfer, ["net.4", "net.6", "net.8", "net.10"])


def gradient_term(module: L.LightningModule) -> GradientTerm:
    is_text = isinstance(module, SentenceClassifier)
    return GradientTerm(student="net.bert.embeddings.word_embeddings" if is_text else None)


def variants(module: L.LightningModule, folder: str) -> dict[str, list[L.Callback]]:
    teacher = copy.deepcopy(module.net)
    # Masks from the first step on and no update meanwhile; fake-quant in its dearest phase: observing and rounding.
    qat = {"window": (0, 1, RUN_STEPS)}
    return {
        "plain": [],
        "pruning": [GradualPruning(Constant(0.9), window=(0, RUN_STEPS), frequency=RUN_STEPS)],
        "fake-quant": [QuantizationAwareTraining(**qat)],
        "fake-quant, compiled": [QuantizationAwareTraining(**qat, details=Details(compiled=True))],
        "fake-quant, ranges frozen": [QuantizationAwareTraining(window=(0, 1, WARMUP - 1))],
        "distillation": [Distillation(copy.deepcopy(teacher))],
        "distillation with layers": [Distillation(copy.deepcopy(teacher), layers=layer_term(module))],
        "distillation, teacher in bf16": [
            Distillation(copy.deepcopy(teacher), details=Teaching(precision="bf16-mixed"))
        ],
        "distillation, cached logits": [
            Distillation(copy.deepcopy(teacher), details=Teaching(cache=f"{folder}/logits"))
        ],
        "distillation with layers, cached": [
            Distillation(copy.deepcopy(teacher), layers=layer_term(module), details=Teaching(cache=f"{folder}/layers"))
        ],
        "distillation of input gradients": [
            Distillation(copy.deepcopy(teacher), student="net", layers=gradient_term(module))
        ],
    }


def in_turns(turns: Turns, names: Iterable[str], fit: Callable[[str], None]) -> None:
    """Run one fit a name in threads of their own, a step of each after the other; raise what one of them raised."""

    def guarded(name: str) -> None:
        torch.set_num_threads(1)  # the pool belongs to the thread
        try:
            fit(name)
        except BaseException as error:
            turns.fail(error)
            raise

    threads = [threading.Thread(target=guarded, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    turns.pass_on()
    for thread in threads:
        thread.join()
    if turns.failure is not None:
        raise turns.failure


def measure(
    make: Callable[[], L.LightningModule], batch: Any, rounds: int, folder: str, only: list[str]
) -> dict[str, np.ndarray]:
    """Return, for each variant, (rounds, 2) seconds of CPU and wall clock."""
    torch.manual_seed(0)
    module = make()
    table = variants(module, folder)
    if only:
        table = {name: own for name, own in table.items() if name in {"plain", "distillation", *only}}
    turns = Turns(list(table))
    extra = {"distillation": teacher_forward(module.net)}
    watches = {name: Stopwatch(name, turns, WARMUP + rounds, extra.get(name)) for name in table}

    def fit(name: str) -> None:
        trainer = quiet_trainer([*table[name], watches[name]], max_epochs=1)
        trainer.fit(copy.deepcopy(module), torch.utils.data.DataLoader(Endless(batch), batch_size=None))

    in_turns(turns, table, fit)
    times = {name: watch.steps for name, watch in watches.items()}
    times["teacher forward"] = watches["distillation"].extra
    return {name: np.array(steps[WARMUP:]) for name, steps in times.items()}


def ratios(times: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Median and quartiles of the per-round ratios, by CPU time and by wall clock."""
    plain = times["plain"]
    forward = times["teacher forward"]
    pairs = {}
    for name in BUDGETS:
        variant, _, reference = name.partition(" / ")
        taught = reference.strip("()").removesuffix(" - teacher forward")
        if variant not in times or taught not in {*times, "", "student + teacher forward"}:
            continue
        # A step that learns from values it is given for nothing is one with the teacher less its forward.
        against = {"": plain, "plain": plain, "student + teacher forward": plain + forward}
        pairs[name] = (times[variant], against[taught] if taught in against else times[taught] - forward)
    result = {}
    for name, (variant, reference) in pairs.items():
        low, middle, high = np.percentile(variant / reference, [25, 50, 75], axis=0)
        result[name] = {
            "cpu": float(middle[0]),
            "cpu_p25": float(low[0]),
            "cpu_p75": float(high[0]),
            "wall": float(middle[1]),
            "budget": BUDGETS[name],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT", help="beside plain and distillation")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "overhead.json"))
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    cases = {
        "ResNet-18, 32 x 32, batch 32": (ImageClassifier, image_batch()),
        "BERT-mini, 64 tokens, batch 16": (SentenceClassifier, sentence_batch()),
    }
    record: dict[str, Any] = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, 1 thread",
        "versions": {name: version(name) for name in ("torch", "lightning", "transformers")},
        "rounds": options.rounds,
        "cases": {},
    }
    for case, (make, batch) in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            times = measure(make, batch, options.rounds, folder, options.only)
        record["cases"][case] = {
            "plain_step_cpu_s": float(np.median(times["plain"][:, 0])),
            "ratios": ratios(times),
        }
        print(f"\n{case}: plain step {record['cases'][case]['plain_step_cpu_s']:.3f} s of CPU, {options.rounds} rounds")
        for name, ratio in record["cases"][case]["ratios"].items():
            spread = f"{ratio['cpu_p25']:.3f} to {ratio['cpu_p75']:.3f}"
            print(f"  {name:45} {ratio['cpu']:.3f} ({spread})  wall {ratio['wall']:.3f}  budget {ratio['budget']}")
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    if os.environ.get("MALLOC_ARENA_MAX") != "1":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    main()

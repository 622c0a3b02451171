"""Accuracy at sparsity: every pruning method from the same dense nets, `python benchmarks/accuracy.py`.

A dense net is trained first; each method then trains it for some steps more: batch 64, Adam at a constant 1e-3, the
same batches in the same order for all. Accuracy is of the test images after the last step. Each result is added to
results/accuracy.json, and what is there already is not run again; `--table` writes accuracy.md from it.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from cells import load, save
from images import DATA_DIR, Data, batches, digits, fashion_mnist
from methods import METHODS, WITHOUT_SPARSITY, Run
from networks import NETWORKS, Classifier, nonzero_count, weight_count
from tables import tables
from torch import nn
from training import quiet_trainer

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "accuracy.json"
LEARNING_RATE = 1e-3
LATER = 1000  # added to a seed after the dense phase: other batches than the dense net has seen first


@dataclass(frozen=True)
class Task:
    """A network on a data set, and how many steps it trains: dense, and then by each method."""

    network: str
    data: str = "Fashion-MNIST"
    dense_steps: int = 1000
    steps: int = 600

    @property
    def title(self) -> str:
        return f"{self.network}, {self.data}, {self.dense_steps} + {self.steps} steps"


TASKS = {
    "lenet-300-100": Task("LeNet-300-100"),
    "lenet5-caffe": Task("LeNet-5-Caffe"),
    "lenet5": Task("LeNet-5"),
    "resnet20": Task("ResNet-20"),
    "digits": Task("LeNet-300-100", data="5000 MNIST digits", steps=3000),
}


def fit(net: nn.Module, data: Data, seed: int, steps: int, callbacks: list[L.Callback], epoch: int | None) -> nn.Module:
    """Train by a Lightning Trainer; `epoch` cuts the run into epochs of so many steps, for callbacks that need them."""
    epochs = -1 if epoch is None else steps // epoch
    trainer = quiet_trainer(callbacks, max_steps=steps, max_epochs=epochs, limit_train_batches=epoch)
    torch.manual_seed(seed)
    trainer.fit(Classifier(net.train(), LEARNING_RATE), batches(data, seed))
    return net


@torch.no_grad()
def accuracy(net: nn.Module, data: Data) -> float:
    """Return the percentage of test images that are classified right."""
    net.eval()
    images, labels = data.test.tensors
    right = sum(int((net(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return round(100.0 * right / len(labels), 3)


def make(task: Task, width: float = 1.0) -> nn.Module:
    return NETWORKS[task.network](width).to(memory_format=torch.channels_last)  # a third faster on a CPU


def dense_net(name: str, data: Data, seed: int, cache: Path) -> nn.Module:
    """Return the trained dense net, from the cache if it was made before."""
    task, path = TASKS[name], cache / f"{name}-{seed}.pt"
    torch.manual_seed(seed)
    net = make(task)
    if path.is_file():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net
    fit(net, data, seed, task.dense_steps, [], None)
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), path)
    return net


def measure(name: str, method: str, sparsity: float, seed: int, data: Data, cache: Path) -> dict[str, Any]:
    """Train one cell of the table and measure it."""
    task, later = TASKS[name], seed + LATER
    dense = dense_net(name, data, seed, cache)
    run = Run(
        dense=dense,
        make=lambda width: make(task, width),
        sparsity=sparsity,
        steps=task.steps,
        dense_steps=task.dense_steps,
        learning_rate=LEARNING_RATE,
        fit=lambda net, steps, callbacks, epoch: fit(net, data, later, steps, callbacks, epoch),
        batches=lambda: batches(data, later),
    )
    started = time.perf_counter()
    torch.manual_seed(later)
    net = METHODS[method](run)
    seconds = time.perf_counter() - started
    return {
        "task": name,
        "method": method,
        "sparsity": sparsity,
        "seed": seed,
        "accuracy": accuracy(net, data),
        "dense_accuracy": accuracy(dense, data),
        "nonzero": nonzero_count(net) / weight_count(dense),
        "seconds": round(seconds, 1),
    }


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, str, float, int]]:
    for sparsity in options.sparsity:
        for method in options.only or METHODS:
            for seed in options.seeds:
                yield options.task, method, 0.0 if method in WITHOUT_SPARSITY else sparsity, seed


def key(cell: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[name] for name in ("task", "method", "sparsity", "seed"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="lenet-300-100")
    parser.add_argument("--only", nargs="+", choices=METHODS, metavar="METHOD", help=f"of: {'; '.join(METHODS)}")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.8, 0.9, 0.95, 0.98, 0.99])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data-dir", default=DATA_DIR, help="folder of Fashion-MNIST's four IDX files")
    parser.add_argument("--cache", type=Path, default=HERE.parent / "outputs" / "accuracy", help="for the dense nets")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only write accuracy.md from the results")
    options = parser.parse_args()
    if options.table:
        titles = {name: task.title for name, task in TASKS.items()}
        (HERE / "accuracy.md").write_text(tables(load(options.out), titles, METHODS), encoding="utf-8")
        return
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # lightning's advice on workers, loggers and epochs
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    fashion = fashion_mnist(options.data_dir) if TASKS[options.task].data == "Fashion-MNIST" else None
    for name, method, sparsity, seed in wanted(options):
        if (name, method, sparsity, seed) in map(key, load(options.out)):
            continue
        cell = measure(name, method, sparsity, seed, fashion or digits(seed), options.cache)
        save(options.out, sorted([*load(options.out), cell], key=key))
        print(f"{name} {method} {sparsity:g} seed {seed}: {cell['accuracy']:.2f} ({cell['seconds']:.0f} s)", flush=True)


if __name__ == "__main__":
    main()

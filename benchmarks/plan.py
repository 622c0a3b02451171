"""Plans of three models, and what became of them: expected sizes against the files of a real, short run.

python benchmarks/plan.py --weights FOLDER --data-dir FOLDER: MobileNetV2's ImageNet weights and Fashion-MNIST; needs
the MiniLM and reviews packages and Jane Austen's novels, as minilm.py and distilled_language_model.py do. Writes
results/plan.json and prints each plan.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from cells import load, save
from distilled_language_model import LanguageModel, configured
from distilled_language_model import fit as fit_language_model
from images import fashion_mnist
from minilm import RottenTomatoes, encoder_weights
from minilm_quantized import fit as fit_sentences
from minilm_quantized import fresh
from novels import DATA_DIR, novels
from quantized import TASKS
from quantized import fit as fit_images
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

from lightning_compress import GradualPruning, QuantizationAwareTraining, export_onnx, plan
from lightning_compress.measure.size import file_bytes, zipped_bytes
from lightning_compress.planning.table import Plan

RESULTS = Path(__file__).resolve().parent / "results" / "plan.json"
STEPS = 60
WINDOWS = {"pruning": (0.1, 0.6), "rounding": (0.2, 0.4, 0.9)}


def callbacks(**options: Any) -> list[L.Callback]:
    return [
        GradualPruning(0.9, WINDOWS["pruning"], **options),
        QuantizationAwareTraining(window=WINDOWS["rounding"], **options),
    ]


def sizes(module: nn.Module, ranges: Any, example: Any) -> dict[str, float]:
    """Measure what the plan has foretold."""
    counts = (int(torch.count_nonzero(p)) if p.dim() > 1 else p.numel() for p in module.parameters())
    found: dict[str, float] = {"weights that are not zero": sum(counts)}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        torch.save(module.state_dict(), weights)
        found |= {"weights file, bytes": file_bytes(weights), "weights file, zipped, bytes": zipped_bytes(weights)}
        if example is not None:
            file = export_onnx(module, Path(folder) / "int8.onnx", example, ranges=ranges)
            found |= {"int8 ONNX file, bytes": file_bytes(file), "int8 ONNX file zipped, bytes": zipped_bytes(file)}
    return found


def minilm(options: argparse.Namespace) -> tuple[Plan, dict[str, float]]:
    tokenizer = AutoTokenizer.from_pretrained(encoder_weights())
    data = RottenTomatoes(tokenizer, Namespace(seed=0, train_size=4000, test_size=1000, max_length=32, batch_size=32))
    model, ours = fresh(0), callbacks(include=["encoder.encoder"])
    batch = data.batch_of([data.train[index] for index in range(32)])
    example = {name: batch[name] for name in ("input_ids", "attention_mask")}
    found = plan(model, ours, example, steps=STEPS)
    fit_sentences(model, data, STEPS, 0, ours)
    return found, sizes(model, ours[1].ranges(), example)


def mobilenet(options: argparse.Namespace) -> tuple[Plan, dict[str, float]]:
    task, data = TASKS["mobilenetv2"], fashion_mnist(options.data_dir)
    net, ours = task.make(options.weights), callbacks()
    example = task.images(data.train.tensors[0][:8])
    found = plan(net, ours, example, steps=STEPS)
    fit_images(task, net, data, 0, STEPS, ours)
    ranges = {name.removeprefix("net."): trained for name, trained in ours[1].ranges().items()}
    return found, sizes(net, ranges, (example,))


def llama(options: argparse.Namespace) -> tuple[Plan, dict[str, float]]:
    text = novels(DATA_DIR)
    torch.manual_seed(0)
    model, ours = LanguageModel(LlamaForCausalLM(configured(len(text.characters))), 1e-3), callbacks()
    found = plan(model, ours, steps=STEPS)
    fit_language_model(model, text, STEPS, 0, ours)
    return found, sizes(model, None, None)


MODELS: dict[str, Callable[[argparse.Namespace], tuple[Plan, dict[str, float]]]] = {
    "MiniLM": minilm, "MobileNetV2": mobilenet, "Llama, 8 layers x 128": llama,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data-dir", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--only", choices=MODELS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    cells = load(RESULTS)
    for name, measure in MODELS.items():
        if options.only in (None, name):
            found, real = measure(copy.copy(options))
            print(f"## {name}\n\n{found}\n")
            for quantity, value in real.items():
                error = found.expects(quantity) / value - 1 if quantity in _known(found) else None
                print(f"{quantity}: expected {found.expects(quantity):,.0f}, real {value:,.0f}: {error:+.2%}")
                cells.append({"model": name, "quantity": quantity, "expected": found.expects(quantity), "real": value})
            save(RESULTS, cells)


def _known(found: Plan) -> set[str]:
    return {each.quantity for each in found.expected}


if __name__ == "__main__":
    main()

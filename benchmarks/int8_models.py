"""The networks of `int8.py`, with random weights, and the ranges that a few batches show: time needs no training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from models import BasicBlock
from torch import Tensor, nn

from lightning_compress.quantization.attach import QUANTIZABLE
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.outputs import OutputRange, Ranges, output_key
from lightning_compress.quantization.placement import Placement, find_outputs

Batch = dict[str, Tensor]


def resnet18() -> nn.Module:
    """ResNet-18 for 224 x 224: 11.7 M weights (He et al. 2016, table 1), but a 3 x 3 projection-free layout of ours."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    width = 64
    for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [BasicBlock(width, channels, stride), BasicBlock(channels, channels, 1)]
        width = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


class InvertedResidual(nn.Module):
    """Sandler et al. 2018, figure 3b."""

    def __init__(self, width_in: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = width_in * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [nn.Conv2d(width_in, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden)]
        layers += [nn.ReLU6(), nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width)]
        self.layers = nn.Sequential(*layers)
        self.adds = stride == 1 and width_in == width

    def forward(self, image: Tensor) -> Tensor:
        return image + self.layers(image) if self.adds else self.layers(image)


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 for 224 x 224: 3.5 M weights (Sandler et al. 2018, table 2)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
    before = 32
    for expansion, width, count, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for index in range(count):
            layers.append(InvertedResidual(before, width, 1 if index else stride, expansion))
            before = width
    layers += [nn.Conv2d(before, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000))


def bert(width: int, layers: int) -> nn.Module:
    """BERT as transformers builds it, without its 30 000 word embeddings, which are no part of what is compared."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width,
            vocab_size=1000, num_labels=10,
        )
    )  # fmt: skip


def images(count: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Ten smooth patterns in turn, with noise: (count, 3, 224, 224)."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.randn(10, 3, 7, 7, generator=generator)
    generator.manual_seed(seed)
    smooth = nn.functional.interpolate(coarse, size=224, mode="bilinear")[torch.arange(count) % 10]
    return (smooth + 0.5 * torch.randn(count, 3, 224, 224, generator=generator),)


def sentences(count: int, seed: int = 0) -> Batch:
    """128 tokens, each kind of sentence from words of its own, ten kinds in turn, without padding."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 100, (count, 128), generator=generator)
    ids = words + 100 * (torch.arange(count) % 10)[:, None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@dataclass(frozen=True)
class Network:
    """A network, its inputs, and the layers left in float."""

    make: Callable[[], nn.Module]
    inputs: Callable[..., Any]
    head: str
    least_speedup: float


NETWORKS: Mapping[str, Network] = {
    "ResNet-18": Network(resnet18, images, "14", 2.9),
    "MobileNetV2": Network(mobilenet_v2, images, "25", 1.8),
    "BERT-mini": Network(lambda: bert(256, 4), sentences, "classifier", 2.0),
    "BERT-base": Network(lambda: bert(768, 12), sentences, "classifier", 3.2),
}


def run(module: nn.Module, inputs: Any) -> Tensor:
    """Return the logits."""
    output = module(**inputs) if isinstance(inputs, dict) else module(*inputs)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


@torch.no_grad()
def settle(module: nn.Module, head: str, inputs: Any) -> None:
    """Give batch norms statistics and the head the centroids of ten kinds, so that outputs mean something.

    A deep network of random weights is chaotic: one code's difference grows from layer to layer until nothing agrees.
    Batch norms of small scale and positive bias keep the signal nearly linear, as training does.
    """
    for layer in module.modules():
        layer.training = isinstance(layer, nn.BatchNorm2d)
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
            layer.weight.uniform_(0.3, 0.8)
            layer.bias.normal_(0.7, 0.2)
        elif isinstance(layer, nn.Conv2d) and layer.groups > 1:  # a blur with noise, as trained ones are smooth
            layer.weight.normal_(1.0, 0.3)
    run(module, inputs)
    module.eval()
    last, features = module.get_submodule(head), []
    handle = last.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    run(module, inputs)
    handle.remove()
    kinds = torch.stack([features[0][kind::10].mean(0) for kind in range(10)])
    middle = kinds.mean(0)
    rows = (kinds - middle) / (kinds - middle).norm(dim=1, keepdim=True)
    last.weight.normal_(0, 1e-3)
    last.weight[:10] = rows
    last.bias.fill_(-100.0)
    last.bias[:10] = -rows @ middle


@torch.no_grad()
def calibrated(module: nn.Module, head: str, inputs: Any) -> tuple[Ranges, Placement]:
    """Return the ranges that one batch shows, of layers' inputs and of the outputs placed for them."""
    layers = {n: m for n, m in module.named_modules() if isinstance(m, QUANTIZABLE) and n != head}
    one = {n: v[:1] for n, v in inputs.items()} if isinstance(inputs, dict) else tuple(v[:1] for v in inputs)
    args, kwargs = ((), one) if isinstance(one, dict) else (one, {})
    placement = find_outputs(module, list(layers), args, kwargs)
    seen: dict[str, Range | OutputRange] = {}
    handles = []
    for name, layer in layers.items():

        def see(_: nn.Module, args: Any, name: str = name) -> None:
            seen[name] = Range(args[0].min().item(), args[0].max().item())

        handles.append(layer.register_forward_pre_hook(see))
    for place in placement.outputs:

        def look(_: nn.Module, args: Any, output: Tensor, place: Any = place) -> None:
            low, high = output.clamp(place.low, place.high).aminmax()
            seen[output_key(place.name)] = OutputRange(low.item(), high.item())

        handles.append(module.get_submodule(place.name).register_forward_hook(look))
    run(module.eval(), inputs)
    for handle in handles:
        handle.remove()
    for place in placement.outputs:  # as share_grids does in training
        own = seen[output_key(place.name)]
        seen.update({reader: Range(own.low, own.high) for reader in place.readers})
    return seen, placement

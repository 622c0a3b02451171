"""Small models, and the ranges their layers see; no training, and no callback of the package."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_compress.quantization.grid import Range


class ConvNet(nn.Module):
    """Conv, batch norm, ReLU, pooling, then a hidden Linear layer and a head that stays float."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 32), size: int = 24) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
            channels, size = width, size // 2
        self.body = nn.Sequential(*layers)
        self.hidden = nn.Linear(channels * size * size, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.body(image).flatten(1))))


def as_trained(module: nn.Module) -> nn.Module:
    """Give batch norms statistics and scales that are not those of the start, of either sign; start weights large."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5, 2)
                layer.weight.normal_(0, 1)
                layer.bias.normal_(0, 0.2)
            elif isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # so that inputs still tell at the end
    return module.eval()


def structured_images(count: int, size: int = 24) -> Tensor:
    """One of ten smooth patterns each, with noise."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(10, 1, 6, 6, generator=generator)
    patterns = nn.functional.interpolate(coarse, size=size, mode="bilinear")
    noise = 0.1 * torch.randn(count, 1, size, size, generator=generator)
    return (patterns[torch.arange(count) % 10] + noise).clamp(0, 1)


def seen_ranges(
    module: nn.Module, *args: Tensor, skip: tuple[str, ...] = ("head",), bits: int = 8, **kwargs: Tensor
) -> dict[str, Range]:
    """Range of the input of every Linear and Conv layer, over one forward in eval mode."""
    found: dict[str, Range] = {}
    handles = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d) and name not in skip:

            def see(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                low, high = inputs[0].min().item(), inputs[0].max().item()
                if name in found:
                    low, high = min(low, found[name].low), max(high, found[name].high)
                found[name] = Range(low, high, bits, bits)

            handles.append(layer.register_forward_pre_hook(see))
    with torch.no_grad():
        module.eval()(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found

"""The networks of the accuracy tables, for images of 28 x 28; `width` scales their hidden units for law 4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from models import BasicBlock
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LinearLR


def lenet_300_100(width: float = 1.0) -> nn.Module:
    """LeCun et al. 1998: 266 200 weights; the second hidden layer stays as wide as there are classes."""
    first, second = _scaled(width, 300, 100)
    second = max(10, second)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 10)
    )


def lenet5_caffe(width: float = 1.0) -> nn.Module:
    """LeNet-5 as Caffe ships it, and as most pruning papers mean it: 430 500 weights."""
    first, second, third = _scaled(width, 20, 50, 500)
    return nn.Sequential(
        nn.Conv2d(1, first, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * second, third),
        nn.ReLU(),
        nn.Linear(third, 10),
    )


def lenet5(width: float = 1.0) -> nn.Module:
    """LeCun et al. 1998 with ReLU and max-pooling: 61 470 weights."""
    first, second, third, fourth = _scaled(width, 6, 16, 120, 84)
    return nn.Sequential(
        nn.Conv2d(1, first, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(25 * second, third),
        nn.ReLU(),
        nn.Linear(third, fourth),
        nn.ReLU(),
        nn.Linear(fourth, 10),
    )


def resnet20(width: float = 1.0) -> nn.Module:
    """He et al. 2016, section 4.2, with projections as shortcuts: 270 608 weights.

    For one input channel, and with a first convolution of stride 2, which makes it four times cheaper.
    """
    widths = _scaled(width, 16, 32, 64)
    layers: list[nn.Module] = [nn.Conv2d(1, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    before = widths[0]
    for stage, channels in enumerate(widths):
        for block in range(3):
            layers.append(BasicBlock(before, channels, 2 if stage and not block else 1))
            before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def resnet8(width: float = 1.0) -> nn.Module:
    """One block a stage, twice as wide: 312 000 weights; its channels are multiples of what vector units take."""
    widths = _scaled(width, 32, 64, 128)
    layers: list[nn.Module] = [nn.Conv2d(1, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    before = widths[0]
    for stage, channels in enumerate(widths):
        layers.append(BasicBlock(before, channels, 2 if stage else 1))
        before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


NETWORKS: dict[str, Callable[[float], nn.Module]] = {
    "LeNet-300-100": lenet_300_100,
    "LeNet-5-Caffe": lenet5_caffe,
    "LeNet-5": lenet5,
    "ResNet-20": resnet20,
}


def _scaled(width: float, *units: int) -> list[int]:
    return [max(1, round(width * count)) for count in units]


def prunable(net: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """All Linear and Conv layers, the head too."""
    return [layer for layer in net.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]


def weight_count(net: nn.Module) -> int:
    """Weights of all Linear and Conv layers; no biases, no norms."""
    return sum(layer.weight.numel() for layer in prunable(net))


def nonzero_count(net: nn.Module) -> int:
    return sum(int(layer.weight.count_nonzero()) for layer in prunable(net))


class Classifier(L.LightningModule):
    """A network under plain cross-entropy and Adam at a constant rate."""

    def __init__(self, net: nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.net, self.learning_rate = net, learning_rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.learning_rate)


class Tuned(Classifier):
    """The same under a rate that falls to 0."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.learning_rate)
        falling = LinearLR(optimizer, 1.0, 1e-3, int(self.trainer.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}

"""The two models of the step-time benchmarks, with random weights: time does not depend on their values."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """He et al. 2016, figure 2, with batch norm and a projection where shapes change."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet18(classes: int = 10) -> nn.Module:
    """ResNet-18 for 32 x 32 images: 11.2 M weights."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    width = 64
    for channels, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [BasicBlock(width, channels, stride), BasicBlock(channels, channels, 1)]
        width = channels
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
    for layer in net.modules():
        # One scale for all, as batch norm allows: a global threshold over PyTorch's own initial weights would empty
        # the wide layers whole, which training never does, and Adam is slow on the zero moments of dead layers.
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.05)
    return net


class ImageClassifier(L.LightningModule):
    """ResNet-18 under plain cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet18()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


class SentenceClassifier(L.LightningModule):
    """BERT-mini, 4 layers of 256, as transformers builds it: 11.2 M weights, 3.2 M of them in encoder Linears."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
        self.net = BertForSequenceClassification(config)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return self.net(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


def image_batch(size: int = 32) -> tuple[Tensor, Tensor]:
    """Noise of 32 x 32 and labels."""
    return torch.randn(size, 3, 32, 32), torch.randint(0, 10, (size,))


def sentence_batch(size: int = 16, length: int = 64) -> dict[str, Tensor]:
    """Random tokens without padding, and labels."""
    return {
        "input_ids": torch.randint(0, 30000, (size, length)),
        "attention_mask": torch.ones(size, length, dtype=torch.long),
        "labels": torch.randint(0, 2, (size,)),
    }

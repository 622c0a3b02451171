"""Teachers and students of the distillation tables, for images of 28 x 28, and how they train."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import lightning.pytorch as L
import torch
from images import BATCH
from networks import Tuned
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from training import quiet_trainer


def convnet(first: int, second: int, third: int, hidden: int) -> nn.Module:
    """Three convolutions with batch norm, and dropout in the head."""
    return _named(
        stem=nn.Sequential(*_convolution(1, first, 5, 2), *_convolution(first, second, 3, 1)),
        features=nn.Sequential(*_convolution(second, third, 3, 2)),
        embedding=nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(49 * third, hidden), nn.ReLU()),
        head=nn.Sequential(nn.Dropout(0.3), nn.Linear(hidden, 10)),
    )


def patchnet(first: int, second: int, hidden: int) -> nn.Module:
    """Patches of 4 x 4, then one convolution: the work per image is a tenth of what its teachers do."""
    return _named(
        stem=nn.Sequential(nn.Conv2d(1, first, 4, 4), nn.ReLU()),
        features=nn.Sequential(nn.Conv2d(first, second, 3, 1, 1), nn.ReLU()),
        embedding=nn.Sequential(nn.Flatten(), nn.Linear(49 * second, hidden), nn.ReLU()),
        head=nn.Linear(hidden, 10),
    )


def _named(**parts: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(parts)).to(memory_format=torch.channels_last)


def _convolution(before: int, channels: int, size: int, stride: int) -> list[nn.Module]:
    weights = nn.Conv2d(before, channels, size, stride, size // 2, bias=False)
    return [weights, nn.BatchNorm2d(channels), nn.ReLU()]


class Pupil(Tuned):
    """The same on jittered images, if it has a seed for them: what a step draws depends on its number alone."""

    def __init__(self, net: nn.Module, learning_rate: float, jitter: int | None) -> None:
        super().__init__(net, learning_rate)
        self.jitter = jitter

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.jitter is None or not self.training:
            return batch
        return jittered(batch[0], 1_000_000 * self.jitter + self.trainer.global_step), batch[1]


def jittered(images: Tensor, seed: int) -> Tensor:
    """Turn each image by up to 15 degrees, and stretch, shear and shift it: by up to a tenth, a fifth and 3 pixels."""
    generator = torch.Generator().manual_seed(seed)
    drawn = 2.0 * torch.rand(6, len(images), generator=generator) - 1.0
    limits = torch.tensor([math.radians(15.0), 0.1, 0.1, 0.2, 0.2, 0.2])
    angle, wide, high, shear, right, down = drawn * limits.unsqueeze(1)
    rows = [angle.cos() + wide, shear - angle.sin(), right, angle.sin(), angle.cos() + high, down]
    grid = functional.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    background = images.min()
    return functional.grid_sample(images - background, grid, align_corners=False) + background


def batches(images: TensorDataset, seed: int) -> DataLoader:
    """Endless epochs of shuffled batches, the same for the same seed, that can be read by index too."""
    sampler = RandomSampler(images, generator=torch.Generator().manual_seed(seed))
    return DataLoader(images, BATCH, sampler=sampler, drop_last=True)


def fit(
    net: nn.Module,
    images: TensorDataset,
    seed: int,
    steps: int,
    learning_rate: float,
    callbacks: list[L.Callback],
    jitter: bool = False,
) -> nn.Module:
    """Train by a Lightning Trainer: Adam, its rate falling to 0 in a straight line."""
    torch.manual_seed(seed)
    pupil = Pupil(net.train(), learning_rate, seed if jitter else None)
    quiet_trainer(callbacks, max_steps=steps).fit(pupil, batches(images, seed))
    return net.eval()

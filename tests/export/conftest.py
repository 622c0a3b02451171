"""A small CNN as training leaves it, and the ranges that a few images show."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.quantization.grid import Range
from tests.export.models import ConvNet, as_trained, seen_ranges, structured_images


@pytest.fixture(scope="module")
def convnet() -> nn.Module:
    torch.manual_seed(0)
    return as_trained(ConvNet())


@pytest.fixture(scope="module")
def ranges(convnet: nn.Module) -> dict[str, Range]:
    return seen_ranges(convnet, structured_images(64))

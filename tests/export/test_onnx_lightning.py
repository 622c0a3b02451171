"""A LightningModule is exported like any module, under its own names."""

from __future__ import annotations

from pathlib import Path

import lightning
import torch
from torch import Tensor, nn

from lightning_compress.export.onnx import export_onnx, kernel_counts
from tests.export.models import seen_ranges


class Regressor(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 1)

    def forward(self, value: Tensor) -> Tensor:
        return self.head(self.net(value))


def test_a_lightning_module(tmp_path: Path) -> None:
    module, value = Regressor(), torch.randn(9, 6)
    ranges = seen_ranges(module, value)
    assert list(ranges) == ["net.0", "net.2"]
    path = export_onnx(module, tmp_path / "a.onnx", (value,), ranges=ranges)
    assert kernel_counts(path)["QGemm"] == 2
    part = export_onnx(module.net, tmp_path / "b.onnx", (value,), ranges={"0": ranges["net.0"], "2": ranges["net.2"]})
    assert kernel_counts(part)["QGemm"] == 2

"""Codes of negative values behind a ReLU: integer kernels all the same, and the same codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from lightning_compress.export.biases import round_biases
from lightning_compress.export.onnx import export_onnx, int8_report, run_onnx
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.outputs import Ranges, rounded_as_trained
from tests.export.test_int8_outputs import calibrated, images, settled
from tests.quantization.test_placement import Block


@pytest.fixture
def trained() -> tuple[torch.nn.Module, Ranges]:
    """A residual network whose grids all begin below zero, though a ReLU comes before most of them."""
    module = settled(Block(), Block())
    ranges = calibrated(module, images(64), head="10")
    below = {n: replace(r, low=-0.3 * r.high, bits=4) if isinstance(r, Range) and n != "0" else r
             for n, r in ranges.items() if isinstance(r, Range)}  # fmt: skip
    ranges = {**ranges, **below}
    round_biases(module, ranges, (images(8),))
    return module, ranges


def test_every_convolution_and_addition_is_integer(trained: tuple[torch.nn.Module, Ranges], tmp_path: Path) -> None:
    module, ranges = trained
    path = export_onnx(module, tmp_path / "int8.onnx", (images(8),), ranges=ranges)
    assert {each.layer for each in int8_report(path).floats} == {"10"}  # the head has no range
    clips = [node for node in onnx.load(path).graph.node if node.op_type == "Clip"]
    assert clips
    batch = images(40)
    with torch.no_grad(), rounded_as_trained(module, ranges):
        expected = module(batch).numpy()
    got = run_onnx(path, batch.numpy())[0]
    assert np.mean(got.argmax(1) == expected.argmax(1)) == 1.0
    np.testing.assert_allclose(got, expected, atol=2e-2 * np.abs(expected).max())

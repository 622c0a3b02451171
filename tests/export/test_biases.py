"""Biases on their kernels' grids: by hand, and a file that then equals the module it was made of."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.export.biases import round_biases
from lightning_compress.export.onnx import export_onnx, run_onnx
from lightning_compress.export.verify import sqnr_db
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.outputs import Ranges, rounded_as_trained
from lightning_compress.quantization.projections import projections_in
from tests.export.models import ConvNet, as_trained, seen_ranges, structured_images
from tests.export.test_int8_outputs import calibrated, images, settled
from tests.quantization.test_placement import Block


def agreement_db(module: nn.Module, ranges: Ranges, inputs: Tensor, path: Path) -> float:
    """Of the file to the module with every rounding, the constant part of the outputs taken out."""
    export_onnx(module, path, (inputs,), ranges=ranges, verify=False)
    with torch.no_grad(), rounded_as_trained(module, ranges):
        expected = module.eval()(inputs).numpy()
    middle = expected.mean(0)
    return sqnr_db(expected - middle, run_onnx(path, inputs.numpy())[0] - middle)


def test_a_linear_layer_by_hand() -> None:
    torch.manual_seed(0)
    module, trained = nn.Sequential(nn.Linear(6, 4)), Range(-1.0, 3.0, 4, 8)
    weight, bias = module[0].weight.detach().double().numpy(), module[0].bias.detach().double().numpy()
    step = np.abs(weight).max(1) / 127 * (4.0 / 15)
    expected = np.round(bias / step) * step
    moved = round_biases(module, {"0": trained}, (torch.zeros(1, 6),))
    np.testing.assert_allclose(module[0].bias.detach().numpy(), expected, rtol=1e-6, atol=1e-8)
    assert moved["0"] == pytest.approx(np.abs(expected - bias).max(), rel=1e-3)
    assert moved["0"] > 0


def test_a_norm_takes_what_its_convolution_lacks() -> None:
    """Equation 11 of Jacob et al. 2018 for the folded bias, in float64 by hand."""
    torch.manual_seed(0)
    module = as_trained(nn.Sequential(nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5)))
    conv, norm = module
    before, trained = copy.deepcopy(module.state_dict()), Range(0.0, 1.5, 4, 8)
    round_biases(module, {"0": trained}, (torch.zeros(1, 2, 4, 4),))
    factor = (norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()).detach()
    step = conv.weight.detach().abs().amax((1, 2, 3)).double() / 127 * factor.abs() * (1.5 / 15)
    codes = ((norm.bias.double() - norm.running_mean.double() * factor) / step).detach()
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
    changed = [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["1.bias"]
    assert bool(((norm.bias - before["1.bias"]).abs() <= 0.5001 * step).all())


@pytest.mark.parametrize("bits", [8, 4])
def test_the_file_of_rounded_biases_is_the_module(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, batch = as_trained(ConvNet()), structured_images(64)
    ranges: Ranges = dict(seen_ranges(module, batch, bits=bits))
    before = agreement_db(module, ranges, batch, tmp_path / "before.onnx")
    round_biases(module, ranges, (batch,))
    after = agreement_db(module, ranges, batch, tmp_path / "after.onnx")
    assert after > before + 10, (before, after)
    assert after > 50


def test_a_residual_network_with_rounded_outputs(tmp_path: Path) -> None:
    module = settled(Block(), Block())
    ranges, batch = calibrated(module, images(64), head="10"), images(40)
    before = agreement_db(module, ranges, batch, tmp_path / "before.onnx")
    moved = round_biases(module, ranges, (batch,))
    assert set(moved) == {name for name in ranges if ":" not in name}
    assert agreement_db(module, ranges, batch, tmp_path / "after.onnx") > before + 5
    again = round_biases(module, ranges, (batch,))
    assert max(again.values()) < 1e-3 * max(moved.values())


def test_attention_projections_have_biases_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    nn.init.normal_(module.self_attn.in_proj_bias)
    values = torch.randn(8, 5, 16)
    ranges: Ranges = {name: Range(-4.0, 4.0, 4, 8) for name in [*projections_in(module), "linear1", "linear2"]}
    keys = list(module.state_dict())
    moved = round_biases(module, ranges, (values,))
    assert moved["self_attn.in_proj"] > 0
    assert list(module.state_dict()) == keys
    assert agreement_db(module, ranges, values, tmp_path / "after.onnx") > 60


def test_shared_biases_and_norms_without_one_are_left() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, affine=False))
    module[1].bias = module[0].bias

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = module

        def forward(self, rows: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
            return self.parts[1](self.parts[0](rows)), self.parts[3](self.parts[2](image))

    whole, before = Parts(), copy.deepcopy(module.state_dict())
    ranges: Ranges = {f"parts.{index}": Range(0.0, 100.0) for index in range(3)}
    assert round_biases(whole, ranges, (torch.zeros(2, 4), torch.zeros(2, 1, 3, 3))) == {}
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name

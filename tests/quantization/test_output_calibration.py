"""Outputs' ranges from batches: by hand, and a file whose convolutions and additions are all integer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_compress.errors import CompressError
from lightning_compress.export.onnx import export_onnx, int8_report
from lightning_compress.quantization.calibration import calibrate
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.output_calibration import calibrate_outputs
from lightning_compress.quantization.outputs import OutputRange
from tests.export.test_int8_outputs import images, settled
from tests.quantization.test_placement import Block


def test_ranges_are_what_the_outputs_held() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    batches = [torch.randn(4, 1, 5, 5), 3 * torch.randn(2, 1, 5, 5)]
    ranges = calibrate(net, batches, exclude=["4"])
    found = calibrate_outputs(net, batches, ranges)
    with torch.no_grad():
        values = torch.cat([net[:2](batch) for batch in batches])
    assert set(found) == {"0", "1", "1:output"}
    assert found["1:output"] == OutputRange(min(0.0, float(values.min())), max(0.0, float(values.max())))
    assert {name: found[name] for name in ranges} == ranges


def test_every_kernel_of_a_residual_network_is_integer(tmp_path: Path) -> None:
    module, batch = settled(Block(), Block()), images(64)
    ranges = calibrate(module, [batch], exclude=["10"])
    state = {name: value.clone() for name, value in module.state_dict().items()}
    found = calibrate_outputs(module, batch.split(16), ranges)
    assert any(isinstance(each, OutputRange) for each in found.values())
    before = int8_report(export_onnx(module, tmp_path / "inputs.onnx", (batch[:8],), ranges=ranges))
    after = int8_report(export_onnx(module, tmp_path / "outputs.onnx", (batch[:8],), ranges=found))
    assert before.floats
    assert {each.layer for each in after.floats} == {"10"}  # the head has no range
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert not any(part._forward_hooks for part in module.modules())


def test_readers_share_the_range_of_what_they_read() -> None:
    module, batch = settled(Block(), Block()), images(64)
    ranges = calibrate(module, [batch], weight_bits=4, exclude=["10"])
    found = calibrate_outputs(module, [batch], ranges)
    changed = [name for name, old in ranges.items() if found[name] != old]
    for name in changed:
        new = found[name]
        assert isinstance(new, Range)
        assert new.weight_bits == 4
        assert any((new.low, new.high) == (o.low, o.high) for o in found.values() if isinstance(o, OutputRange))


def test_bad_input_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.AdaptiveAvgPool2d(1))
    ranges = {"0": Range(0.0, 1.0)}
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate_outputs(net, [], ranges)
    with pytest.raises(CompressError, match="infinity from '0'"):
        calibrate_outputs(net, [torch.full((1, 1, 2, 2), float("nan"))], ranges)

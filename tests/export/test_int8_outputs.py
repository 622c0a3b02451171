"""Residual networks in ONNX: integers on every side, on each profile; what is stored, and what is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from lightning_compress.errors import CompressError
from lightning_compress.export.kernels import int8_report
from lightning_compress.export.onnx import export_onnx, kernel_counts, onnx_session, run_onnx
from lightning_compress.export.profiles import profile_named
from lightning_compress.export.runtime import products_overflow
from lightning_compress.export.verify import sqnr_db
from lightning_compress.quantization.attach import Phase
from lightning_compress.quantization.grid import Range, integer_weight
from lightning_compress.quantization.outputs import (
    OutputRange,
    Ranges,
    attach_output,
    output_key,
    rounded_as_trained,
)
from lightning_compress.quantization.placement import find_outputs
from tests.export.models import seen_ranges
from tests.quantization.test_placement import Block, Branches


def images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return nn.functional.interpolate(torch.randn(count, 4, 4, 4, generator=generator), size=16, mode="bilinear")


def settled(*parts: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    stem = [nn.Conv2d(4, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    stem += [nn.Conv2d(16, 4, 1), nn.ReLU()]
    module = nn.Sequential(*stem, *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 1.5)
                layer.weight[1] *= -1
                layer.bias.normal_(0.3, 0.2)
        module(images(64))  # batch norms take their statistics
        module.eval()
        module[-1].weight.mul_(8)
        module[-1].bias -= module(images(64)).mean(0)  # every class the first for some images
    return module


@torch.no_grad()
def calibrated(module: nn.Module, batch: Tensor, head: str) -> Ranges:
    """Ranges of one batch, of inputs and of the outputs that are placed; readers share them."""
    ranges: dict[str, Range | OutputRange] = dict(seen_ranges(module, batch, skip=(head,)))
    placement = find_outputs(module, list(ranges), [batch])
    for place in placement.outputs:
        state = attach_output(module.get_submodule(place.name), low=place.low, high=place.high)
        state.phase = Phase.OBSERVE
    with torch.enable_grad():
        module(batch)
    for place in placement.outputs:
        part = module.get_submodule(place.name)
        state = part.__dict__.pop("_fake_quant_output")
        state.handles[0].remove()
        state.extremes = state.pending
        ranges[output_key(place.name)] = state.range
        ranges.update({reader: Range(state.range.low, state.range.high) for reader in place.readers})
    return ranges


@pytest.fixture(scope="module")
def residual() -> nn.Module:
    return settled(Block(), Block())


@pytest.fixture(scope="module")
def ranges(residual: nn.Module) -> Ranges:
    return calibrated(residual, images(64), head="10")


def rounded(module: nn.Module, ranges: Ranges, batch: Tensor) -> np.ndarray:
    with torch.no_grad(), rounded_as_trained(module, ranges):
        return np.asarray(module(batch))


def stored(path: Path) -> dict[str, np.ndarray]:
    return {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


def test_every_convolution_and_addition_runs_on_integers(residual: nn.Module, ranges: Ranges, tmp_path: Path) -> None:
    path = export_onnx(residual, tmp_path / "a.onnx", (images(3),), ranges=ranges)
    kernels = kernel_counts(path)
    assert (kernels["QLinearConv"], kernels["QLinearAdd"], kernels["QuantizeLinear"]) == (6, 2, 1)
    assert not {"Conv", "FusedConv", "Add", "Relu"} & set(kernels)
    batch = images(400)
    reference, output = rounded(residual, ranges, batch), run_onnx(path, batch.numpy())[0]
    assert len(np.unique(reference.argmax(1))) > 1
    assert (reference.argmax(1) == output.argmax(1)).mean() >= 0.995
    assert sqnr_db(reference - reference.mean(0), output - reference.mean(0)) > 30
    report = int8_report(path)
    assert [(each.layer, each.operator) for each in report.floats] == [("10", "Gemm")]
    assert "no range" in report.floats[0].reason
    assert report.text().startswith("8 of 9 nodes run on integers")


def test_without_output_ranges_the_report_says_what_is_missing(
    residual: nn.Module, ranges: Ranges, tmp_path: Path
) -> None:
    inputs_only = {name: trained for name, trained in ranges.items() if isinstance(trained, Range)}
    path = export_onnx(residual, tmp_path / "a.onnx", (images(3),), ranges=inputs_only)
    floats = {each.layer: each.reason for each in int8_report(path).floats}
    assert set(floats) == {"4", "6.conv2", "7.conv2", "10"}  # "4" feeds the first addition too
    assert "by Add: it needs an output range" in floats["6.conv2"]


@pytest.mark.parametrize("profile", ["cpu", "mobile", "tensorrt"])
def test_each_profile_loads_and_agrees(residual: nn.Module, ranges: Ranges, tmp_path: Path, profile: str) -> None:
    path = export_onnx(residual, tmp_path / "a.onnx", (images(3),), ranges=ranges, profile=profile)
    batch, chosen = images(100), profile_named(profile)
    reference = rounded(residual, chosen.grids(ranges), batch)
    assert sqnr_db(reference, run_onnx(path, batch.numpy())[0]) > 30
    graph, constants = onnx.load(path).graph, stored(path)
    points = {constants[node.input[2]].dtype for node in graph.node if node.op_type == "QuantizeLinear"}
    assert points == {np.dtype(np.int8 if chosen.signed else np.uint8)}
    zeros = {int(constants[node.input[2]]) for node in graph.node if node.op_type == "QuantizeLinear"}
    assert (zeros == {0}) == chosen.symmetric
    assert any(array.dtype == np.int32 for array in constants.values()) == chosen.integer_bias


def test_symmetric_grids_by_hand() -> None:
    grids = profile_named("tensorrt").grids({"a": Range(-0.5, 1.27), "a:output": OutputRange(-2.54, 1.0)})
    assert [each.zero_point for each in grids.values()] == [128, 128]
    assert [each.scale for each in grids.values()] == pytest.approx([0.01, 0.02])
    with pytest.raises(ValueError, match="got 4 for 'b'"):
        profile_named("tensorrt").grids({"b": Range(0.0, 1.0, bits=4)})
    with pytest.raises(ValueError, match=r"profile of .*got 'gpu'"):
        profile_named("gpu")


def test_no_float_copy_of_a_quantized_weight_and_all_zeros_of_pruning(tmp_path: Path) -> None:
    module = settled(Block())
    asked = {}
    with torch.no_grad():
        for name in ("4", "6.conv1", "6.conv2"):
            weight = module.get_parameter(f"{name}.weight")
            asked[name] = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.9
            weight.masked_fill_(asked[name], 0.0)
    path = export_onnx(module, tmp_path / "a.onnx", (images(8),), ranges=calibrated(module, images(64), head="9"))
    constants = stored(path)
    assert {a.size for a in constants.values() if a.dtype == np.float32 and a.ndim > 1} == {12}  # the head's weight
    for name, zeros in asked.items():
        codes = constants[f"{name}.weight:int"]
        assert codes.dtype == np.int8
        assert np.array_equal(codes == 0, (integer_weight(module.get_parameter(f"{name}.weight"))[0] == 0).numpy())
        assert not codes[zeros.numpy()].any()


@pytest.mark.parametrize("activation", [nn.Hardswish(), nn.SiLU(), nn.GELU()])
def test_concatenations_and_other_activations(tmp_path: Path, activation: nn.Module) -> None:
    module = settled(Branches(), nn.Conv2d(4, 4, 1), activation, nn.Conv2d(4, 4, 1), nn.ReLU())
    path = export_onnx(module, tmp_path / "a.onnx", (images(3),), ranges=calibrated(module, images(64), head="13"))
    kernels = kernel_counts(path)
    assert (kernels["QLinearConv"], kernels["QLinearConcat"]) == (7, 1)
    assert [each.layer for each in int8_report(path).floats] == ["13"]


def test_a_first_layer_of_three_channels_is_given_a_fourth(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 2))
    batch = torch.randn(20, 3, 8, 8)
    ranges = seen_ranges(module, batch, skip=())
    path = export_onnx(module, tmp_path / "a.onnx", (batch,), ranges=ranges)
    codes = stored(path)["0.weight:int"]
    assert codes.shape == (16, 4, 3, 3)
    assert not codes[:, 3].any()
    assert kernel_counts(path)["QLinearConv"] == 1
    assert sqnr_db(rounded(module, ranges, batch), run_onnx(path, batch.numpy())[0]) > 35
    mobile = export_onnx(module, tmp_path / "b.onnx", (batch,), ranges=ranges, profile="mobile")
    assert stored(mobile)["0.weight:int"].shape == (16, 3, 3, 3)


def test_outputs_with_errors_are_named(residual: nn.Module, ranges: Ranges, tmp_path: Path) -> None:
    def refused(match: str, error: type[Exception], **more: Any) -> None:
        with pytest.raises(error, match=match):
            export_onnx(residual, tmp_path / "a.onnx", (images(3),), ranges={**ranges, **more})

    refused(r"got \['gone:output'\]", ValueError, **{"gone:output": OutputRange(0.0, 1.0)})
    refused("finite low <= high", ValueError, **{"6.bn2:output": OutputRange(2.0, 1.0)})
    attach_output(residual[6].bn2)
    try:
        refused("attached to '6.bn2'", CompressError)
    finally:
        residual[6].bn2.__dict__.pop("_fake_quant_output").handles[0].remove()


def test_sums_of_large_codes_do_not_overflow(tmp_path: Path) -> None:
    """255 * 127 twice is beyond 16 bits, in which x86 processors without VNNI add by default."""
    layer = nn.Sequential(nn.Linear(64, 16, bias=False))
    with torch.no_grad():
        layer[0].weight.fill_(1.0)
    ones = torch.ones(8, 64)
    path = export_onnx(layer, tmp_path / "sums.onnx", (ones,), ranges={"0": Range(0.0, 1.0)})
    assert run_onnx(path, ones.numpy())[0] == pytest.approx(64.0, rel=1e-6)
    # The option that prevents it costs two thirds of the speed where nothing overflows, so it is set only where needed.
    plain = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    exact = plain.run(None, {plain.get_inputs()[0].name: ones.numpy()})[0] == pytest.approx(64.0, rel=1e-6)
    assert products_overflow() is not exact
    options = onnx_session(path).get_session_options()
    if exact:
        with pytest.raises(RuntimeError, match="x64quantprecision"):
            options.get_session_config_entry("session.x64quantprecision")
    else:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"


class Twice(nn.Module):
    """Two layers of one width, and one layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.again = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, value: Tensor) -> Tensor:
        return self.again(self.again(self.second(self.first(value).relu()).relu()).relu())


@pytest.mark.parametrize("low", [0.0, -1.0], ids=["codes from 0", "codes of negative values after a ReLU"])
def test_layers_of_one_width_and_one_called_twice_have_integer_kernels(tmp_path: Path, low: float) -> None:
    torch.manual_seed(0)
    module, value = Twice(), torch.rand(40, 8)
    ranges = {name: Range(low, 1.0) for name in ("first", "second", "again")}
    path = export_onnx(module, tmp_path / "twice.onnx", (value,), ranges=ranges)
    stored = [numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer]
    assert sum(array.dtype == np.int8 and array.ndim == 2 for array in stored) == 3
    assert kernel_counts(path)["QGemm"] == 4
    with torch.no_grad(), rounded_as_trained(module, ranges):
        assert run_onnx(path, value.numpy())[0] == pytest.approx(module(value).numpy(), abs=0.01)

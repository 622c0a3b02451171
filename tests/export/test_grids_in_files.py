"""Files of layers trained on other grids than the default ones: the codes that training had, or an error by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from lightning_compress.export.integer import folded_codes, scaled_codes
from lightning_compress.export.onnx import export_onnx, run_onnx
from lightning_compress.export.program import reference_module
from lightning_compress.export.verify import sqnr_db
from lightning_compress.quantization.attach import fake_quantized
from lightning_compress.quantization.dorefa import DoReFaWeights
from lightning_compress.quantization.formats import FloatInputs, FloatWeights
from lightning_compress.quantization.grid import FLOAT_BITS, Range
from lightning_compress.quantization.inputs import PerToken
from lightning_compress.quantization.learned_steps import LSQ, PACT, LSQPlus
from lightning_compress.quantization.levels import Levels
from lightning_compress.quantization.lowbit import Binary, Ternary, TrainedTernary
from lightning_compress.quantization.weights import Symmetric, WeightGrid
from tests.export.models import as_trained, seen_ranges, structured_images


def network() -> nn.Sequential:
    """Conv, batch norm with factors of either sign, ReLU, pooling, Linear, head; three input channels."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveMaxPool2d(4)]
    return as_trained(nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 24), nn.ReLU(), nn.Linear(24, 5)))


def images(count: int) -> Tensor:
    return structured_images(count).expand(-1, 3, -1, -1) * torch.tensor([1.0, -0.5, 2.0]).view(3, 1, 1)


def on_grids(module: nn.Module, weights: WeightGrid, inputs: LSQPlus | PACT | None = None) -> dict[str, Range]:
    """Ranges with learned values that moved away from their start, and from the observed range."""
    ranges = seen_ranges(module, images(40), skip=("7",))
    for name, trained in ranges.items():
        learned = weights.learned(module.get_parameter(f"{name}.weight").detach())
        learned = {key: 0.9 * value for key, value in learned.items()}
        trained = replace(trained, weight_bits=weights.bits, weights=weights, weights_learned=learned)
        if inputs is not None:
            ends = inputs.learned(torch.tensor(trained.low), torch.tensor(trained.high))
            ends = {key: 0.8 * value for key, value in ends.items()}
            trained = replace(trained, bits=inputs.bits, inputs=inputs, inputs_learned=ends)
        ranges[name] = trained
    return ranges


def stored(path: Path) -> dict[str, np.ndarray]:
    return {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


GRIDS = [LSQ(4), LSQ(8), LSQ(4, per_channel=True), Symmetric(8, "tensor"), Symmetric(4, "tensor"), Ternary(),
         Ternary(per_channel=True), DoReFaWeights(4), Levels(), Binary()]  # fmt: skip


@pytest.mark.parametrize("weights", GRIDS, ids=repr)
def test_the_file_holds_the_codes_of_training(weights: WeightGrid, tmp_path: Path) -> None:
    module = network()
    ranges = on_grids(module, weights, LSQPlus(8))
    path = export_onnx(module, tmp_path / "a.onnx", (images(3),), ranges=ranges)
    batch, constants = images(60), stored(path)
    with torch.no_grad(), fake_quantized(module, ranges):
        reference = module(batch).numpy()
    # Calibrated to the same inputs, the default grids would give another network than these do.
    assert sqnr_db(reference, run_onnx(path, batch.numpy())[0]) > 35
    factors = {"0": module[1].weight / (module[1].running_var + module[1].eps).sqrt(), "5": torch.ones(24)}
    for name, factor in factors.items():
        layer = module.get_submodule(name)
        with torch.no_grad(), fake_quantized(module, ranges):
            shadow: list[Tensor] = []
            handle = layer.register_forward_pre_hook(lambda layer, _, to=shadow: to.append(layer.weight.detach()))
            module(batch[:1])
            handle.remove()
        codes = constants[f"{name}.weight:int"].astype(np.float64)
        axis = 0 if codes.shape[0] == len(factor) else 1
        rows = np.moveaxis(codes, axis, 0).reshape(len(factor), -1)
        scale = constants[f"{name}.weight:scale"][:, None].astype(np.float64)
        expected = shadow[0].double() * factor.double().view(-1, *[1] * (shadow[0].dim() - 1))
        if name == "0":  # a first layer of three channels is given a fourth
            expected = nn.functional.pad(expected, (0, 0, 0, 0, 0, 1))
        expected = expected.detach().flatten(1).numpy()
        step = np.abs(expected[expected != 0]).min()
        # -128 has no opposite in int8; scales are float32
        assert np.abs(rows * scale - expected).max() <= (1.001 * scale.max() if weights == LSQ(8) else 1e-4 * step)


def test_ternary_weights_are_stored_as_three_values(tmp_path: Path) -> None:
    module = network()
    path = export_onnx(module, tmp_path / "a.onnx", (images(3),), ranges=on_grids(module, Ternary()))
    constants = stored(path)
    for name in ("0.weight:int", "5.weight:int"):
        assert set(np.unique(constants[name])) == {-64, 0, 64}


@pytest.mark.parametrize("weights", [LSQ(4), LSQ(8), Ternary()], ids=repr)
def test_the_reference_module_too(weights: WeightGrid) -> None:
    module, batch = network(), images(20)
    ranges = on_grids(module, weights, LSQPlus(8))
    with torch.no_grad(), fake_quantized(module, ranges):
        expected = module(batch)
    got = reference_module(module, ranges, (batch,))(batch)
    assert sqnr_db(expected.numpy(), got.numpy()) > 35


@pytest.mark.parametrize("profile", ["mobile", "tensorrt"])
def test_learned_inputs_on_other_profiles(profile: str, tmp_path: Path) -> None:
    module = network()
    ranges = on_grids(module, LSQ(8), LSQPlus(8))
    path = export_onnx(module, tmp_path / "a.onnx", (images(3),), ranges=ranges, profile=profile)
    scale = stored(path)["5.input:scale"]
    wider = 255 / 127 if profile == "tensorrt" else 1.0  # symmetric: from 0 .. high to -high .. high
    assert scale == pytest.approx(wider * ranges["5"].scale, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 1}, "inputs of 2 to 8 bits, got 1"),
        ({"bits": FLOAT_BITS}, "got an input that stays in floating point"),
        ({"inputs": PerToken()}, r"one affine grid a tensor, got PerToken\(bits=8"),
        ({"bits": 16, "inputs": FloatInputs()}, r"got 16 \(FloatInputs"),
        ({"inputs": FloatInputs("e4m3")}, r"one affine grid a tensor, got FloatInputs"),
        ({"weights": Symmetric(8, 4)}, r"got Symmetric\(bits=8, group=4\)"),
        ({"weights": TrainedTernary(), "weights_learned": {"positive": 1, "negative": 1}}, "TrainedTernary"),
        ({"weights": FloatWeights()}, "FloatWeights"),
        ({"weights": DoReFaWeights(8)}, "DoReFaWeights"),
        ({"weight_bits": 1}, "weights of 2 to 8 bits, got 1"),
    ],
)
def test_grids_without_integer_form_are_named(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    module = network()
    ranges = {"5": replace(Range(0.0, 4.0), **changes)}  # type: ignore[arg-type]
    for profile in ("cpu", "tensorrt"):
        with pytest.raises(ValueError, match=f"{words}.*'5'"):
            export_onnx(module, tmp_path / "a.onnx", (images(3),), ranges=ranges, profile=profile)
    with pytest.raises(ValueError, match=f"{words}.*'5'"):
        reference_module(module, ranges, (images(3),))


def test_a_weight_that_the_forward_changes_is_refused_by_name() -> None:
    weight = torch.randn(4, 6)
    trained = Range(0.0, 1.0, weight_bits=4, weights=LSQ(4), weights_learned={"step": torch.tensor(0.2)})
    codes, scale = folded_codes("fc", 2 * weight, weight, trained)
    assert torch.equal(scale, torch.full((4,), 0.4))
    assert torch.equal(codes, trained.codes(weight)[0])
    with pytest.raises(ValueError, match="the weight of 'fc', but the graph has another one"):
        folded_codes("fc", weight + 0.01, weight, trained)


def test_the_code_without_opposite() -> None:
    codes, scale = scaled_codes(torch.tensor([[-128, 5]], dtype=torch.int8), torch.tensor([0.5]), torch.tensor([-1.0]))
    assert codes.tolist() == [[127, -5]]
    assert scale.tolist() == [0.5]


def test_a_layer_of_one_channel_is_not_padded(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 4))
    path = export_onnx(module, tmp_path / "a.onnx", (torch.rand(4, 1, 8, 8),), ranges={"0": Range(0.0, 1.0)})
    assert stored(path)["0.weight:int"].shape == (32, 1, 3, 3)

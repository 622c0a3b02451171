"""ONNX files, run in ONNX Runtime: what they compute, with which kernels, and what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from lightning_compress.export.onnx import export_onnx, kernel_counts, run_onnx
from lightning_compress.export.verify import sqnr_db
from lightning_compress.measure.size import zipped_bytes
from lightning_compress.quantization.attach import fake_quantized
from lightning_compress.quantization.grid import Range, integer_weight
from tests.export.models import ConvNet, as_trained, seen_ranges, structured_images

FLOAT_KERNELS = {"Conv", "FusedConv", "MatMul", "FusedMatMul", "FusedGemm"}


@pytest.fixture(scope="module")
def convnet() -> nn.Module:
    torch.manual_seed(0)
    module = as_trained(ConvNet())
    with torch.no_grad():  # every class the first for some images, as after training
        module.head.bias -= module(structured_images(100)).mean(0)
    return module


@pytest.fixture(scope="module")
def ranges(convnet: nn.Module) -> dict[str, Range]:
    return seen_ranges(convnet, structured_images(64))


@pytest.fixture(scope="module")
def int8_file(convnet: nn.Module, ranges: dict[str, Range], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "convnet.onnx"
    return export_onnx(convnet, path, (structured_images(3),), ranges=ranges)


@pytest.fixture(scope="module")
def float_file(convnet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(convnet, tmp_path_factory.mktemp("float") / "convnet.onnx", (structured_images(3),))


def constants(path: Path) -> dict[str, np.ndarray]:
    return {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


def rounded(module: nn.Module, ranges: Mapping[str, Range], *args: Tensor, **kwargs: Tensor) -> Tensor:
    with torch.no_grad(), fake_quantized(module, ranges):
        output: Tensor = module(*args, **kwargs)
    return output


def exported(
    module: nn.Module, path: Path, *args: Tensor, batch: int = 3, bits: int = 8, skip: tuple[str, ...] = ("head",)
) -> tuple[dict[str, int], float]:
    """Export with seen ranges; return the kernels and the signal to noise over all of `args`, another batch."""
    ranges = seen_ranges(module, *args, bits=bits, skip=skip)
    export_onnx(module, path, tuple(each[:batch] for each in args), ranges=ranges)
    output = run_onnx(path, *(each.numpy() for each in args))[0]
    return kernel_counts(path), sqnr_db(rounded(module, ranges, *args).numpy(), output)


def test_the_whole_body_runs_in_int8_and_the_head_in_float(int8_file: Path, float_file: Path) -> None:
    kernels = kernel_counts(int8_file)
    assert kernels["QLinearConv"] == 3
    assert kernels["QGemm"] == 1
    assert kernels["Gemm"] == 1
    assert not FLOAT_KERNELS & set(kernels)
    assert "DequantizeLinear" not in kernels
    assert kernels["QuantizeLinear"] == 1
    assert "QLinearConv" not in kernel_counts(float_file)


def test_argmax_agrees_with_the_fake_quantized_module(
    convnet: nn.Module, ranges: dict[str, Range], int8_file: Path
) -> None:
    images = structured_images(600)
    reference = rounded(convnet, ranges, images).numpy()
    output = run_onnx(int8_file, images.numpy())[0]
    assert len(np.unique(reference.argmax(1))) > 4
    assert (reference.argmax(1) == output.argmax(1)).mean() >= 0.995
    assert sqnr_db(reference, output) > 35
    assert not np.allclose(convnet(images).detach().numpy(), output, atol=1e-4)  # really rounded


def test_the_float_file_is_the_module(convnet: nn.Module, float_file: Path) -> None:
    images = structured_images(50)
    torch.testing.assert_close(torch.from_numpy(run_onnx(float_file, images.numpy())[0]), convnet(images).detach())


@pytest.mark.parametrize("count", [1, 7])
def test_any_batch_size_runs(int8_file: Path, float_file: Path, count: int) -> None:
    images = structured_images(20).numpy()
    for path in (int8_file, float_file):
        alone, together = run_onnx(path, images[:count])[0], run_onnx(path, images)[0]
        np.testing.assert_allclose(alone, together[:count], atol=1e-5)


def test_weights_in_the_file_are_the_unfolded_weights_codes(convnet: nn.Module, int8_file: Path) -> None:
    """Per-channel abs-max commutes with batch-norm folding: q * sign(gamma)."""
    stored = constants(int8_file)
    for index in (0, 4, 8):
        weight, norm = convnet.get_parameter(f"body.{index}.weight"), convnet.get_submodule(f"body.{index + 1}")
        expected = integer_weight(weight)[0] * norm.weight.sign().view(-1, 1, 1, 1).to(torch.int8)
        off = np.abs(stored[f"body.{index}.weight:int"].astype(int) - expected.numpy().astype(int))
        assert off.max() <= 1  # a tie may fall the other way once folded
        assert (off > 0).mean() < 1e-3


def test_zeros_of_pruning_stay_zeros_and_shrink_the_zip(tmp_path: Path, float_file: Path) -> None:
    torch.manual_seed(1)
    module, images, masks = as_trained(ConvNet()), structured_images(32), {}
    with torch.no_grad():
        for name in ("body.0", "body.4", "body.8", "hidden"):
            weight = module.get_parameter(f"{name}.weight")
            masks[name] = torch.rand_like(weight) > 0.9
            weight.mul_(masks[name])
        module.get_parameter("hidden.weight")[3] = 0  # and one whole row
    path = export_onnx(module, tmp_path / "sparse.onnx", (images,), ranges=seen_ranges(module, images))
    stored = constants(path)
    for name in masks:
        weight = module.get_parameter(f"{name}.weight").detach()
        codes = stored[f"{name}.weight:int"]
        assert codes.dtype == np.int8
        assert np.array_equal(codes == 0, (integer_weight(weight)[0] == 0).numpy())
        assert not codes[(weight == 0).numpy()].any()
        assert stored[f"{name}.weight:scale"].min() > 0
    assert zipped_bytes(float_file) > 7 * zipped_bytes(path)  # a third of the small file is its names


def test_depthwise_and_grouped_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = as_trained(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6(),
            nn.Conv2d(16, 16, 3, padding=1, stride=2, groups=16), nn.BatchNorm2d(16), nn.ReLU6(),
            nn.Conv2d(16, 32, 3, padding="same", groups=4), nn.ReLU(),
            nn.Conv2d(32, 32, 1), nn.Flatten(), nn.Linear(32 * 64, 4),
        )
    )  # fmt: skip
    kernels, ratio_db = exported(module, tmp_path / "a.onnx", torch.randn(40, 3, 16, 16))
    assert (kernels["QLinearConv"], kernels["QGemm"]) == (4, 1)
    assert ratio_db > 30


def test_one_dimensional_convolution(tmp_path: Path) -> None:
    module = as_trained(
        nn.Sequential(
            nn.Conv1d(4, 8, 5, padding=2, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(8, 8, 3, dilation=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 12, 3),
        )
    )  # fmt: skip
    kernels, ratio_db = exported(module, tmp_path / "a.onnx", torch.randn(40, 4, 32))
    assert (kernels["QLinearConv"], kernels["QGemm"]) == (2, 1)
    assert ratio_db > 30


def test_linear_on_more_dimensions_runs_as_qgemm_with_any_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 12, bias=False)
            self.last = nn.Linear(12, 5)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.last(torch.relu(self.second(nn.functional.gelu(self.first(tokens)))))

    kernels, ratio_db = exported(Tokens(), tmp_path / "a.onnx", torch.randn(40, 6, 2, 8))
    assert kernels["QGemm"] == 3
    assert not FLOAT_KERNELS & set(kernels)
    assert ratio_db > 30


class ReadTwice(nn.Module):
    """Two layers on one tensor, one of them called again on another."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, value: Tensor) -> Tensor:
        return self.left(value) - self.right(value) + self.left(-value)


@pytest.mark.parametrize(("right", "pairs"), [(Range(-3, 3), 2), (Range(-2, 3), 3)], ids=["same", "other"])
def test_equal_ranges_share_one_rounding(tmp_path: Path, right: Range, pairs: int) -> None:
    module, value = ReadTwice(), torch.randn(30, 6)
    ranges = {"left": Range(-3, 3), "right": right}
    path = export_onnx(module, tmp_path / "a.onnx", (value,), ranges=ranges)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("QuantizeLinear") == pairs
    assert sum(array.dtype == np.int8 and array.ndim == 2 for array in constants(path).values()) == 2
    assert kernel_counts(path)["QGemm"] == 3
    np.testing.assert_allclose(run_onnx(path, value.numpy())[0], rounded(module, ranges, value), atol=2e-4)


def test_of_two_tied_layers_only_the_one_with_a_range_is_quantized(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    module[2].weight = module[0].weight
    value = torch.randn(30, 6)
    ranges = {"2": seen_ranges(module, value)["2"]}
    path = export_onnx(module, tmp_path / "a.onnx", (value,), ranges=ranges)
    matrices = [array.dtype for array in constants(path).values() if array.ndim == 2]
    assert sorted(map(str, matrices)) == ["float32", "int8"]
    assert kernel_counts(path)["QGemm"] == 1
    np.testing.assert_allclose(run_onnx(path, value.numpy())[0], rounded(module, ranges, value), atol=2e-4)


@pytest.mark.parametrize(("bits", "least_db"), [(8, 35), (4, 12)])
def test_narrow_codes_stay_in_int8_kernels_and_inputs_clip_where_training_clips(
    tmp_path: Path, bits: int, least_db: float
) -> None:
    torch.manual_seed(0)
    module, images = as_trained(ConvNet()), structured_images(60)
    seen = seen_ranges(module, images)
    ranges = {name: Range(0.0, 0.7 * each.high, bits, weight_bits=4) for name, each in seen.items()}
    path = export_onnx(module, tmp_path / "a.onnx", (images,), ranges=ranges)
    assert kernel_counts(path)["QLinearConv"] == 3
    assert kernel_counts(path)["QGemm"] == 1
    assert sqnr_db(rounded(module, ranges, images).numpy(), run_onnx(path, images.numpy())[0]) > least_db
    codes = constants(path)["body.4.weight:int"]
    assert len(np.unique(codes)) == 15  # 4 bits, symmetric
    assert np.abs(codes).max() == 7 * 16


def test_one_layer_with_narrow_codes_is_exact(tmp_path: Path) -> None:
    layer, value = nn.Sequential(nn.Linear(8, 5, bias=False)), torch.randn(40, 8)
    ranges = {"0": Range(-1.5, 1.0, bits=3, weight_bits=2)}
    path = export_onnx(layer, tmp_path / "a.onnx", (value,), ranges=ranges)
    np.testing.assert_allclose(run_onnx(path, value.numpy())[0], rounded(layer, ranges, value), atol=1e-5)


def test_a_tiny_weight_beside_a_large_bias_and_an_empty_channel(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 3))
    with torch.no_grad():
        module[0].weight[1] = 1e-9
        module[0].weight[2] = 0
        module[0].bias.copy_(torch.tensor([0.1, 3.0, 0.34]))
        module[2].weight.copy_(torch.eye(3))
    value = torch.rand(20, 6)
    path = export_onnx(module, tmp_path / "a.onnx", (value,), ranges={"0": Range(0.0, 1.0)})
    output = run_onnx(path, value.numpy())[0] - module[2].bias.detach().numpy()
    np.testing.assert_allclose(output[:, 1:], [[3.0, 0.34]] * 20, rtol=1e-4)


def test_files_repeat_to_the_byte_and_carry_no_notes(
    convnet: nn.Module, ranges: dict[str, Range], int8_file: Path, float_file: Path, tmp_path: Path
) -> None:
    images = structured_images(3)
    again = export_onnx(convnet, tmp_path / "again.onnx", (images,), ranges=ranges)
    assert again.read_bytes() == int8_file.read_bytes()
    for path in (int8_file, float_file):
        model, text = onnx.load(path), path.read_bytes()
        assert b"pkg.torch" not in text
        assert __file__.encode() not in text
        parameters = sum(each.numel() for each in convnet.parameters()) * (4 if path == float_file else 1)
        assert len(text) < 1.3 * parameters + 8192
        assert not model.graph.value_info


def test_names_of_inputs_and_outputs(tmp_path: Path) -> None:
    value = torch.randn(3, 6)
    path = export_onnx(
        nn.Linear(6, 2), tmp_path / "made" / "a.onnx", (value,), ranges={"": Range(-3, 3)},
        input_names=["features"], output_names=["scores"], dynamic_batch=False,
    )  # fmt: skip
    graph = onnx.load(path).graph
    assert ([each.name for each in graph.input], [each.name for each in graph.output]) == (["features"], ["scores"])
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3


def test_a_compiled_module_is_exported_as_the_module_it_wraps(tmp_path: Path) -> None:
    module, value = nn.Sequential(nn.Linear(6, 2)), torch.randn(3, 6)
    compiled = torch.compile(module, backend="eager")
    path = export_onnx(compiled, tmp_path / "a.onnx", (value,), ranges={"0": Range(-3, 3)})
    assert kernel_counts(path)["QGemm"] == 1

"""OpenVINO IRs, run by OpenVINO itself: what they compute, with which kernels, and when none is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from lightning_compress.errors import CompressError
from lightning_compress.export import openvino as ours
from lightning_compress.export.checked import Checked
from lightning_compress.export.openvino import export_openvino, openvino_kernels, openvino_model, run_openvino
from lightning_compress.export.verify import sqnr_db
from lightning_compress.quantization.grid import Range, integer_weight
from lightning_compress.quantization.outputs import rounded_as_trained
from tests.export.models import seen_ranges, structured_images

openvino = pytest.importorskip("openvino", reason='pip install "lightning-compress[openvino]"')


@pytest.fixture(scope="module")
def int8_file(convnet: nn.Module, ranges: dict[str, Range], tmp_path_factory: pytest.TempPathFactory) -> Checked:
    path = tmp_path_factory.mktemp("int8") / "made" / "convnet.xml"
    return export_openvino(convnet, path, (structured_images(8),), ranges=ranges)


def rounded(module: nn.Module, ranges: dict[str, Range], *args: Tensor) -> Tensor:
    with torch.no_grad(), rounded_as_trained(module, ranges):
        output: Tensor = module(*args)
    return output


def test_an_int8_file_computes_what_was_trained_at_any_batch(
    convnet: nn.Module, ranges: dict[str, Range], int8_file: Checked
) -> None:
    assert sorted(each.name for each in int8_file.path.parent.iterdir()) == ["convnet.bin", "convnet.xml"]
    model = openvino.Core().compile_model(openvino.Core().read_model(int8_file.path), "CPU")
    for count in (1, 30):
        images = structured_images(count)
        assert sqnr_db(rounded(convnet, ranges, images).numpy(), model(images.numpy())[0]) > 35


def test_the_body_runs_on_integers_and_the_head_in_float(int8_file: Checked) -> None:
    assert openvino_kernels(int8_file) == {"Convolution u8": 3, "FullyConnected u8": 1, "FullyConnected f32": 1}


def test_the_file_holds_the_trained_codes(convnet: nn.Module, ranges: dict[str, Range], int8_file: Checked) -> None:
    stored = [
        op.data for op in openvino.Core().read_model(int8_file.path).get_ops() if op.get_type_name() == "Constant"
    ]
    codes = [each for each in stored if each.dtype == np.int8 and each.size > 1]
    assert sorted(each.size for each in codes) == sorted(convnet.get_parameter(f"{n}.weight").numel() for n in ranges)
    expected = integer_weight(convnet.hidden.weight.detach(), 8)[0].numpy()
    hidden = next(each for each in codes if each.ndim == 2)
    assert np.array_equal(hidden if hidden.shape == expected.shape else hidden.T, expected)


def test_what_was_found_is_that_of_the_file(convnet: nn.Module, ranges: dict[str, Range], int8_file: Checked) -> None:
    parts = (int8_file.path, int8_file.path.with_suffix(".bin"))
    assert int8_file.size_bytes == sum(part.stat().st_size for part in parts)
    images = structured_images(8)
    images = torch.cat([images, images[:1]])  # the check tries another batch size
    expected, (got,) = rounded(convnet, ranges, images).numpy(), run_openvino(int8_file, images.numpy())
    assert int8_file.sqnr_db == pytest.approx(sqnr_db(expected, got))
    assert int8_file.agreement == (expected.argmax(1) == got.argmax(1)).mean()
    assert int8_file.latency.threads == 1
    assert int8_file.latency.runs == int8_file.module_latency.runs == 20


def test_floats_and_halves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, inputs = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)), torch.randn(5, 64)
    whole = export_openvino(module, tmp_path / "whole.xml", (inputs,))
    half = export_openvino(module, tmp_path / "half.xml", (inputs,), half=True, dynamic_batch=False)
    expected = module(inputs).detach().numpy()
    for file, tolerance in ((whole, 1e-5), (half, 1e-2)):
        (got,) = run_openvino(file, inputs.numpy())
        np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max())
    sizes = [(tmp_path / f"{name}.bin").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.55 * sizes[0]
    assert whole.agreement == 1.0


def test_two_inputs_with_open_sequences(tmp_path: Path) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.hidden, self.head = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            hidden = torch.relu(self.hidden(self.embedding(ids))) * mask[..., None]
            return self.head(hidden.sum(1))

    torch.manual_seed(0)
    module = Words().eval()
    batch = {"ids": torch.randint(50, (6, 9)), "mask": torch.ones(6, 9)}
    ranges = seen_ranges(module, **batch)
    file = export_openvino(module, tmp_path / "words.xml", batch, ranges=ranges, dynamic_sequence=True)
    other = {"ids": torch.randint(50, (2, 17)), "mask": torch.rand(2, 17).round()}
    with torch.no_grad(), rounded_as_trained(module, ranges):
        expected = module(**other).numpy()
    assert sqnr_db(expected, run_openvino(file, *(each.numpy() for each in other.values()))[0]) > 30
    with pytest.raises(ValueError, match=r"expected 2 arrays .*, got 1"):
        run_openvino(file, other["ids"].numpy())


def test_zeros_kept_compressed_change_nothing(int8_file: Checked) -> None:
    images = structured_images(4).numpy()
    plain, sparse = openvino_model(int8_file)(images)[0], openvino_model(int8_file, sparse_rate=0.1)(images)[0]
    assert np.array_equal(plain, sparse)


def written(op: str) -> Any:
    """An exporter that writes one operator, whatever the module."""

    def export_onnx(module: nn.Module, path: Path, *args: object, **options: object) -> Path:
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2, 2]) for name in "ab"]
        values[1] = values[1] if op != "Det" else helper.make_tensor_value_info("b", TensorProto.FLOAT, ["batch"])
        graph = helper.make_graph([helper.make_node(op, ["a"], ["b"])], "one operator", values[:1], values[1:])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
        return path

    return export_onnx


@pytest.mark.parametrize(("ranges", "text"), [({"0": Range(-3, 3)}, "dB of signal"), (None, "of its largest value")])
def test_a_file_that_disagrees_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranges: dict[str, Range] | None, text: str
) -> None:
    monkeypatch.setattr(ours, "export_onnx", written("Relu"))
    (tmp_path / "a.xml").write_text("of before")
    with pytest.raises(CompressError, match=f"OpenVINO file is not the .*{text}"):
        export_openvino(nn.Sequential(nn.Linear(2, 2)), tmp_path / "a.xml", (torch.randn(4, 2, 2),), ranges=ranges)
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("a.xml", "of before")]


def test_an_operator_that_openvino_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "export_onnx", written("Det"))
    with pytest.raises(CompressError, match=r"OpenVINO has no operator for Det-20 .* write that part of forward"):
        export_openvino(nn.Identity(), tmp_path / "a.xml", (torch.randn(3, 2, 2),))
    assert list(tmp_path.iterdir()) == []


def test_refusals_name_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"got .*a\.onnx; end it in \.xml"):
        export_openvino(nn.Linear(2, 2), tmp_path / "a.onnx", (torch.ones(1, 2),))
    with pytest.raises(FileNotFoundError, match=r"found none at .*none\.xml"):
        openvino_model(tmp_path / "none.xml")
    with pytest.raises(ValueError, match="threads of at least 1, got 0"):
        openvino_model(tmp_path / "none.xml", 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lightning-compress\[openvino\]"):
        openvino_model(tmp_path / "none.xml")

"""Bad input ends in one named error; the module and the folder stay as they were, whatever happens."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_compress.errors import CompressError, IncompatibleCallbacks, NothingToCompress
from lightning_compress.export import qdq
from lightning_compress.export.onnx import export_onnx, kernel_counts, onnx_session, run_onnx
from lightning_compress.quantization.attach import attach
from lightning_compress.quantization.grid import Range

VALUE = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Half(nn.Module):
    """Has a layer that forward leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.drop = nn.Linear(6, 4), nn.Linear(6, 4), nn.Dropout(0.5)

    def forward(self, value: Tensor) -> Tensor:
        return self.drop(self.used(value))


class FixedBatch(nn.Linear):
    def forward(self, value: Tensor) -> Tensor:
        return super().forward(value.reshape(5, 6))


class Branching(nn.Linear):
    def forward(self, value: Tensor) -> Tensor:
        return super().forward(value) if value.sum() > 0 else value


class Random(nn.Linear):
    def forward(self, value: Tensor) -> Tensor:
        return super().forward(value) + torch.rand(4)


@pytest.mark.parametrize(
    ("ranges", "error", "match"),
    [
        ({}, NothingToCompress, "empty ranges"),
        ({"usde": Range(0, 1)}, ValueError, r"got \['usde'\].*named_modules"),
        ({"drop": Range(0, 1)}, ValueError, r"Linear, Conv or Embedding.*\['drop'\]"),
        ({"used": Range(0, 1), "unused": Range(0, 1)}, ValueError, r"MatMul of \['unused'\]"),
        ({"used": Range(float("nan"), 1)}, ValueError, "finite low <= high in the range of 'used'"),
        ({"used": Range(1, 0)}, ValueError, "finite low <= high"),
        ({"used": Range(0, 1, bits=16)}, ValueError, "inputs of 2 to 8 bits, got 16"),
        ({"used": Range(0, 1, weight_bits=1)}, ValueError, "2 to 8 bits"),
    ],
)
def test_bad_ranges(tmp_path: Path, ranges: dict[str, Range], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        export_onnx(Half(), tmp_path / "a.onnx", (VALUE,), ranges=ranges)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "error", "match"),
    [
        (FixedBatch(6, 4), CompressError, "dynamic_batch=False"),
        (Branching(6, 6), CompressError, "cannot export Branching"),
        (Random(6, 4), CompressError, "differs by .* of its largest value"),
        (nn.Linear(6, 4).bfloat16(), ValueError, "float32 parameters, got torch.bfloat16 in 'weight'"),
    ],
)
def test_bad_modules(tmp_path: Path, module: nn.Module, error: type[Exception], match: str) -> None:
    path = tmp_path / "a.onnx"
    path.write_text("an older file")
    with pytest.raises(error, match=match):
        export_onnx(module, path, (VALUE,))
    assert [each.name for each in tmp_path.iterdir()] == ["a.onnx"]
    assert path.read_text() == "an older file"


def test_a_fixed_batch_is_exported_when_asked_for(tmp_path: Path) -> None:
    module = FixedBatch(6, 4)
    path = export_onnx(module, tmp_path / "a.onnx", (VALUE,), dynamic_batch=False)
    np.testing.assert_allclose(run_onnx(path, VALUE.numpy())[0], module(VALUE).detach(), atol=1e-5)


def test_inputs_of_two_batch_sizes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one first size, got \[4, 6\]"):
        export_onnx(nn.Bilinear(3, 3, 2), tmp_path / "a.onnx", (torch.rand(4, 3), torch.rand(6, 3)))


def test_a_module_in_training_or_reparametrized(tmp_path: Path) -> None:
    module = Half()
    attach(module.used)
    with pytest.raises(CompressError, match="attached to 'used'"):
        export_onnx(module, tmp_path / "a.onnx", (VALUE,))
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4)))
    with pytest.raises(IncompatibleCallbacks, match=r"0\.weight"):
        export_onnx(normed, tmp_path / "a.onnx", (VALUE,), ranges={"0": Range(-3, 3)})


@pytest.mark.parametrize("scale", [1.5, 0.5], ids=["too wide", "too narrow"])
def test_the_check_refuses_a_file_with_wrong_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    right = qdq.integer_layer

    def wrong(*args: object) -> tuple[Tensor, Tensor, Tensor | None]:
        codes, scales, bias = right(*args)  # type: ignore[arg-type]
        return codes, scales * scale, bias

    monkeypatch.setattr(qdq, "integer_layer", wrong)
    ranges = {"used": Range(-3, 3)}
    with pytest.raises(CompressError, match=r"output 0 has -?\d+\.\d dB of signal to noise, expected at least 20"):
        export_onnx(Half(), tmp_path / "a.onnx", (VALUE,), ranges=ranges)
    assert list(tmp_path.iterdir()) == []
    assert export_onnx(Half(), tmp_path / "a.onnx", (VALUE,), ranges=ranges, verify=False).exists()


@pytest.mark.parametrize("fails", [False, True])
def test_the_module_is_left_as_it_was(tmp_path: Path, fails: bool) -> None:
    module = Half()
    module.drop.eval()
    before = {name: (layer.training, set(vars(layer))) for name, layer in module.named_modules()}
    state = {name: (id(value), value.clone()) for name, value in module.named_parameters()}
    ranges = {"used": Range(-3, 3), **({"unused": Range(0, 1)} if fails else {})}
    try:
        export_onnx(module, tmp_path / "a.onnx", (VALUE,), ranges=ranges)
    except ValueError:
        assert fails
    assert before == {name: (layer.training, set(vars(layer))) for name, layer in module.named_modules()}
    assert module.training
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
    assert torch.is_grad_enabled()
    for name, value in module.named_parameters():
        assert id(value) == state[name][0]
        assert torch.equal(value, state[name][1])
        assert value.grad is None


def test_a_missing_package_is_named_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    cure = r"need onnxruntime; pip install 'lightning-compress\[onnx\]'"
    with pytest.raises(ImportError, match=cure):
        export_onnx(Half(), tmp_path / "a.onnx", (VALUE,))
    with pytest.raises(ImportError, match=cure):
        kernel_counts(tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []
    assert export_onnx(Half(), tmp_path / "a.onnx", (VALUE,), verify=False).exists()


def test_run_and_session_check_their_arguments(tmp_path: Path) -> None:
    path = export_onnx(Half(), tmp_path / "a.onnx", (VALUE,))
    with pytest.raises(ValueError, match=r"1 arrays for the inputs \['value'\].*got 2"):
        run_onnx(path, VALUE.numpy(), VALUE.numpy())
    with pytest.raises(ValueError, match="threads of at least 1, got 0"):
        onnx_session(path, threads=0)


def test_the_exporter_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_onnx(Half(), tmp_path / "a.onnx", (VALUE,), ranges={"used": Range(-3, 3)})
    assert capfd.readouterr() == ("", "")


def test_the_callback_instead_of_its_ranges_names_the_cure(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"pass qat\.ranges\(\), not qat"):
        export_onnx(nn.Linear(2, 2), tmp_path / "m.onnx", (torch.zeros(1, 2),), ranges=object())

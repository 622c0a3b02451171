"""The reference module: the fake-quantized module's outputs from int8 buffers, as torch.export keeps it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressError
from lightning_compress.export.program import ReferenceLayer, export_program, reference_module
from lightning_compress.export.verify import sqnr_db
from lightning_compress.quantization.grid import Range, integer_weight
from lightning_compress.quantization.outputs import OutputRange, Ranges, rounded_as_trained
from tests.export.models import ConvNet, as_trained, seen_ranges, structured_images
from tests.export.test_int8_outputs import calibrated, images, settled
from tests.quantization.test_placement import Block


def rounded(module: nn.Module, ranges: Ranges, *args: Tensor) -> Tensor:
    with torch.no_grad(), rounded_as_trained(module, ranges):
        output: Tensor = module(*args)
    return output


@pytest.mark.parametrize("bits", [8, 4])
def test_one_layer_by_hand(bits: int) -> None:
    torch.manual_seed(0)
    module, value = nn.Sequential(nn.Linear(8, 5)), torch.randn(30, 8)
    ranges = {"0": Range(-2.0, 2.0, bits, bits)}
    reference = reference_module(module, ranges, (value,))
    layer = reference[0]
    assert isinstance(layer, ReferenceLayer)
    codes, scales = integer_weight(module[0].weight, bits)
    assert torch.equal(layer.codes, codes)
    inputs = torch.fake_quantize_per_tensor_affine(value, ranges["0"].scale, ranges["0"].zero_point, 0, 2**bits - 1)
    expected = inputs @ (codes * scales[:, None]).T + module[0].bias
    torch.testing.assert_close(reference(value), expected.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(reference(value), rounded(module, ranges, value), atol=1e-5, rtol=0)
    assert [name for name, each in reference.state_dict().items() if each.dtype == torch.int8] == ["0.codes"]


def test_a_residual_network_with_norms_folded() -> None:
    module = settled(Block(), Block())
    ranges, batch = calibrated(module, images(64), head="10"), images(40)
    before = copy.deepcopy(module.state_dict())
    reference = reference_module(module, ranges, (batch,))
    assert not any(isinstance(part, nn.BatchNorm2d) for part in reference.modules())
    expected = rounded(module, ranges, batch)
    assert sqnr_db((expected - expected.mean(0)).numpy(), (reference(batch) - expected.mean(0)).numpy()) > 30
    assert torch.equal(copy.deepcopy(reference)(batch), reference(batch))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_program_file_runs_at_any_batch_and_holds_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, batch = as_trained(ConvNet(widths=(32, 64, 128))), structured_images(30)
    ranges = seen_ranges(module, batch)
    found = export_program(module, tmp_path / "made" / "a.pt2", (batch[:3],), ranges=ranges)
    path = found.path
    program = torch.export.load(path)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {
        "quantized_decomposed.quantize_per_tensor.default",
        "quantized_decomposed.dequantize_per_channel.default",
    } <= targets
    for count in (1, 30):
        expected = rounded(module, ranges, batch[:count])
        assert sqnr_db(expected.numpy(), program.module()(batch[:count]).detach().numpy()) > 35
    weights = [each for name, each in program.state_dict.items() if name.endswith(".codes")]
    assert [each.dtype for each in weights] == 4 * [torch.int8]
    stored_bytes = sum(each.numel() for each in weights)
    assert path.stat().st_size < stored_bytes + 200_000  # the graph itself is some 130 kB
    assert [each.name for each in path.parent.iterdir()] == ["a.pt2"]
    assert found.size_bytes == path.stat().st_size
    assert found.sqnr_db > 35
    assert found.agreement == 1.0
    assert found.latency.runs == 20


def test_a_program_of_floats(tmp_path: Path) -> None:
    module, value = nn.Sequential(nn.Linear(4, 3), nn.Dropout()), torch.randn(5, 4)
    found = export_program(module, tmp_path / "a.pt2", (value,))
    assert module.training
    larger = export_program(module, tmp_path / "b.pt2", (torch.randn(20_000, 4),))
    assert larger.size_bytes < found.size_bytes + 1000  # the example is no part of it, but for two rows
    torch.testing.assert_close(torch.export.load(found).module()(value[:1]), module.eval()(value[:1]))


class Branching(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * value if value.sum() > 0 else value


def test_what_cannot_be_traced_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"cannot trace Branching: Could not guard on .*; write forward without br"):
        export_program(Branching(), tmp_path / "a.pt2", (torch.ones(2, 2),))
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_disagrees_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_compress.export import program

    right = program.layer_codes
    monkeypatch.setattr(program, "layer_codes", lambda *args: (right(*args)[0], 2 * right(*args)[1]))
    with pytest.raises(CompressError, match="dB of signal to noise, expected at least 20"):
        export_program(
            nn.Sequential(nn.Linear(4, 2)), tmp_path / "a.pt2", (torch.randn(3, 4),), ranges={"0": Range(-3, 3)}
        )
    assert list(tmp_path.iterdir()) == []


class Foreign(nn.Linear):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * super().forward(value)


@pytest.mark.parametrize("layer", [Foreign(4, 4), nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")])
def test_layers_with_a_forward_of_their_own_are_refused(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match="plain Linear or zero-padded Conv layer in '0'"):
        reference_module(nn.Sequential(layer), {"0": Range(-1, 1)}, (torch.randn(2, 4, 4),))


def test_an_output_range_alone_rounds_that_output() -> None:
    module, value = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(9, 4)
    ranges = {"0": Range(-3.0, 3.0), "1:output": OutputRange(-1.0, 1.0, 4)}
    reference = reference_module(module, ranges, (value,))
    torch.testing.assert_close(reference(value), rounded(module, ranges, value), atol=1e-5, rtol=0)
    assert len(reference(value).unique()) <= 16

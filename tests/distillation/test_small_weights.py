"""A teacher with int8 weights: its bytes, its outputs, and a fit that it teaches."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress import CompressError, Distillation
from lightning_compress.distillation.details import Details
from lightning_compress.distillation.own_teachers import MeanTeacher, StartingModel
from lightning_compress.distillation.running import RunningTeacher
from lightning_compress.distillation.small_weights import shrink_weights, weight_bytes
from lightning_compress.distillation.terms import LayerTerm
from lightning_compress.errors import NothingToCompress
from tests.callbacks.test_distillation_layers import Recorded, fit

INT8 = Details(precision="int8")


def bytes_of(module: nn.Module) -> int:
    """The bytes of the storages that a module holds."""
    tensors = (*module.parameters(), *module.buffers())
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def networks() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    return {
        "linear": (nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64)), torch.randn(4, 256)),
        "convolution": (nn.Sequential(nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64)), torch.randn(2, 32, 8, 8)),
        "attention": (
            nn.Sequential(nn.Embedding(50, 64), nn.TransformerEncoderLayer(64, 4, batch_first=True, dropout=0.0)),
            torch.arange(10).view(2, 5),
        ),
    }


@pytest.mark.parametrize("name", ["linear", "convolution", "attention"])
def test_a_quarter_of_the_bytes_and_outputs_near_those_of_floats(name: str) -> None:
    module, inputs = networks()[name]
    module.eval()
    with torch.no_grad():
        wanted = module(inputs)
    whole = bytes_of(module)
    running = RunningTeacher(module, INT8)
    assert bytes_of(running.module) <= 0.29 * whole
    assert weight_bytes(running.module) == bytes_of(running.module)
    assert bytes_of(module) == whole, "the one that was given stays"
    got = running("", (inputs,), {})
    assert float((got - wanted).norm() / wanted.norm()) < 0.02
    assert not torch.equal(got, wanted)


def test_each_weight_is_the_nearest_point_of_its_rows_grid() -> None:
    layer = nn.Linear(40, 8)
    before = layer.weight.detach().numpy().copy()
    shrink_weights(layer)
    step = np.abs(before).max(axis=1, keepdims=True) / 127
    np.testing.assert_allclose(layer.weight.detach().numpy(), np.round(before / step) * step, rtol=1e-5, atol=1e-7)


def test_an_int8_teacher_teaches_logits_and_layers_nearly_as_the_float_one() -> None:
    torch.manual_seed(7)
    teacher = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    runs = []
    for details in (INT8, Details()):
        torch.manual_seed(0)
        student = Recorded()
        callback = Distillation(
            copy.deepcopy(teacher), layers=LayerTerm(student="model.0", teacher="0"), details=details
        )
        fit(student, callback)
        runs.append(student.losses)
    assert runs[0] == pytest.approx(runs[1], rel=0.02)
    assert runs[0] != runs[1]


def test_the_teacher_runs_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = networks()["linear"]
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda given: whole(given, backend="aot_eager"))
    compiled = RunningTeacher(module, Details(precision="int8", compiled=True))
    plain = RunningTeacher(module, INT8)
    torch.testing.assert_close(compiled("", (inputs,), {}), plain("", (inputs,), {}))


def test_what_cannot_be_int8_is_named() -> None:
    for own in (StartingModel(), MeanTeacher(), None):
        with pytest.raises(ValueError, match="expected a teacher of its own weights"):
            Distillation(own, details=INT8)
    with pytest.raises(NothingToCompress, match="leave precision out"):
        shrink_weights(nn.LayerNorm(4))
    broken = nn.Linear(2, 2)
    nn.init.constant_(broken.weight, float("nan"))
    with pytest.raises(CompressError, match="finite weights"):
        shrink_weights(broken)

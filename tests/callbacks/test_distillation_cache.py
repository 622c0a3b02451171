"""Distillation from a cache of logits and layers: the same run as with the teacher, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_compress import CompressError, Distillation
from lightning_compress.distillation.cache import LogitCache
from lightning_compress.distillation.details import Details
from lightning_compress.distillation.features import feature_mse
from lightning_compress.distillation.keys import KEY_BYTES, example_keys
from lightning_compress.distillation.own_teachers import StartingModel
from lightning_compress.distillation.relations import similarity_preserving
from lightning_compress.distillation.terms import LayerTerm
from tests.callbacks.test_distillation import Net, data


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)), 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += len(inputs)
        return self.net(inputs)


class Augmented(Dataset[Any]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        inputs, label = data()[index]
        return inputs + torch.randn(4), label


def fit(callback: Distillation, epochs: int = 3, source: Any = None) -> tuple[Net, L.Trainer]:
    torch.manual_seed(0)
    student = Net()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(student, DataLoader(source or data(), 8, shuffle=True, generator=torch.Generator().manual_seed(1)))
    return student, trainer


@pytest.fixture
def teacher() -> Counted:
    torch.manual_seed(7)
    return Counted()


def test_a_cached_run_is_the_run_with_the_teacher(teacher: Counted, tmp_path: Path) -> None:
    plain, _ = fit(Distillation(copy.deepcopy(teacher)))
    details = Details(cache=LogitCache(str(tmp_path / "kept"), dtype="float32"))
    cached, _ = fit(Distillation(teacher, details=details))
    assert teacher.calls == 2 + 32, "two examples before the first batch, and each once"
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5)
    later, trainer = fit(Distillation(None, details=details))
    assert later.losses == pytest.approx(plain.losses, rel=1e-5)
    assert 0.0 <= trainer.logged_metrics["compress/agreement"] <= 1.0


def test_the_agreement_of_an_epoch_is_counted_over_all_of_it(teacher: Counted) -> None:
    student, trainer = fit(Distillation(teacher), epochs=1)
    logits = torch.cat(student.logits[-4:])
    inputs = torch.cat([batch[0] for batch in DataLoader(
        data(), 8, shuffle=True, generator=torch.Generator().manual_seed(1))])  # fmt: skip
    share = (logits.argmax(1) == teacher.eval()(inputs).argmax(1)).float().mean()
    assert trainer.logged_metrics["compress/agreement"] == pytest.approx(float(share))


def test_random_augmentation_is_refused_in_the_second_epoch(teacher: Counted, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="augmentation"):
        fit(Distillation(teacher, details=Details(cache=str(tmp_path / "kept"))), source=Augmented())


def test_a_cache_of_other_data_or_of_another_teacher_is_refused(teacher: Counted, tmp_path: Path) -> None:
    details = Details(cache=str(tmp_path / "kept"))
    fit(Distillation(teacher, details=details), epochs=1)
    other = TensorDataset(*(value.flip(-1) + 1 if index == 0 else value for index, value in enumerate(data().tensors)))
    with pytest.raises(CompressError, match="knows 0 of 8 examples of this batch, and there is no teacher to ask"):
        fit(Distillation(None, details=details), source=other)
    with pytest.raises(CompressError, match="teacher"):
        fit(Distillation(Counted(), details=details), epochs=1)


def test_what_cannot_be_cached_is_named_when_it_is_made(tmp_path: Path) -> None:
    details = Details(cache=str(tmp_path / "kept"))
    with pytest.raises(ValueError, match="what a teacher says that stays as it is"):
        Distillation(StartingModel(), details=details)
    with pytest.raises(ValueError, match="pass details=Details"):
        Distillation(None)


# Values of layers


def hints() -> list[LayerTerm]:
    """A hidden layer, with a projection, by name; the logits' layer; and relations of another."""
    return [
        LayerTerm(feature_mse, "model.0", "net.0", weight=2.0),
        LayerTerm(feature_mse, "model.2", "net.2", read="input"),
        LayerTerm(similarity_preserving, "model.1", "net.?", weight=0.5),
    ]


@pytest.mark.parametrize("weight", [0.5, 0.0], ids=["logits too", "layers alone"])
def test_cached_layers_teach_as_the_teacher_does(teacher: Counted, tmp_path: Path, weight: float) -> None:
    plain, _ = fit(Distillation(copy.deepcopy(teacher), weight, layers=hints()))
    details = Details(cache=LogitCache(str(tmp_path / "kept"), dtype="float32"))
    cached, _ = fit(Distillation(teacher, weight, layers=hints(), details=details))
    assert teacher.calls == 2 + 32, "two examples before the first batch, and each once"
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5)
    later, trainer = fit(Distillation(None, weight, layers=hints(), details=details))
    assert later.losses == pytest.approx(plain.losses, rel=1e-5)
    assert trainer.logged_metrics["compress/loss/similarity_preserving"] > 0
    header = json.loads((tmp_path / "kept" / "header.json").read_text())
    assert (header["shape"], header["layers"]) == (
        [3] if weight else None, {"output of net.0": [[16]], "input of net.2": [[16]], "output of net.2": [[3]]}
    )  # fmt: skip


def test_the_file_holds_the_layers_values_of_each_example(teacher: Counted, tmp_path: Path) -> None:
    details = Details(cache=LogitCache(tmp_path / "kept", dtype="float32"))
    fit(Distillation(teacher, layers=LayerTerm(feature_mse, "model.1", "net.1"), details=details), epochs=1)
    rows = np.fromfile(tmp_path / "kept" / "values-0.bin", np.dtype([("logits", "<f4", 3), ("hidden", "<f4", 16)]))
    keys = (tmp_path / "kept" / "keys-0.bin").read_bytes()
    places = [keys.index(key) // KEY_BYTES for key in example_keys((data().tensors[0],), {})]
    with torch.no_grad():
        hidden = teacher.net[:2](data().tensors[0])
        np.testing.assert_allclose(rows["hidden"][places], hidden, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(rows["logits"][places], teacher.net[2](hidden), rtol=1e-5, atol=1e-6)


def test_a_later_run_may_read_less_and_names_what_is_not_there(teacher: Counted, tmp_path: Path) -> None:
    details = Details(cache=str(tmp_path / "kept"))
    fit(Distillation(teacher, layers=hints()[:2], details=details), epochs=1)
    fit(Distillation(None, layers=LayerTerm(feature_mse, "model.0", "net.?"), details=details), epochs=1)
    fit(Distillation(None, details=details), epochs=1)
    for term, match in [
        (LayerTerm(feature_mse, "model.0", "net.1"), "the cache holds output of net.0, input of net.2"),
        (LayerTerm(feature_mse), "names of the student's layers"),
        (LayerTerm(feature_mse, "model.0"), "the teacher has no layer 'model.0'"),
        (LayerTerm(feature_mse, "model.?", "net.0"), "matches 3 and 'net.0' 1"),
    ]:
        with pytest.raises(ValueError, match=match):
            fit(Distillation(None, layers=term, details=details), epochs=1)
    with pytest.raises(CompressError, match=r"has layers \['input of net.2', 'output of net.0'\], this run has layers"):
        fit(Distillation(teacher, layers=hints()[:1], details=details), epochs=1)
    with pytest.raises(CompressError, match="has logits True, this run has logits False"):
        fit(Distillation(teacher, 0.0, layers=hints()[:2], details=details), epochs=1)


def test_a_layer_that_is_called_twice_is_held_twice(tmp_path: Path) -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head, self.calls = nn.Linear(4, 4), nn.Linear(4, 3), 0

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += len(inputs)
            return self.head(self.inner(self.inner(inputs)))

    class Student(Net):
        def __init__(self) -> None:
            super().__init__()
            self.model = Again()

    torch.manual_seed(3)
    teacher, losses = Again(), []
    details = Details(cache=LogitCache(tmp_path / "kept", dtype="float32"))
    for source, kept in ((copy.deepcopy(teacher), Details()), (teacher, details), (None, details)):
        torch.manual_seed(0)
        student = Student()
        callback = Distillation(source, layers=LayerTerm(feature_mse, "model.inner", "inner"), details=kept)
        L.Trainer(
            accelerator="cpu", max_epochs=2, callbacks=[callback], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(student, DataLoader(data(), 8))  # fmt: skip
        losses.append(student.losses)
    assert teacher.calls == 2 + 32
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_a_layer_that_gives_no_value_an_example_is_refused(tmp_path: Path) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all, self.head = nn.Linear(4, 8), nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            self.all(inputs.mean(dim=0, keepdim=True))
            return self.head(inputs)

    term = LayerTerm(lambda student, teacher: (student.mean() - teacher.mean()).square(), "model.0", "all")
    with pytest.raises(ValueError, match=r"expected output of all of shape \(8, \.\.\.\).*got \(1, 8\)"):
        fit(Distillation(Pooled(), layers=term, details=Details(cache=str(tmp_path / "kept"))), epochs=1)

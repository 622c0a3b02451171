"""Distillation from cached logits: the same run as with the teacher, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_compress import CompressError, Distillation
from lightning_compress.distillation.cache import LogitCache
from lightning_compress.distillation.details import Details
from lightning_compress.distillation.own_teachers import StartingModel
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


def test_what_cannot_be_cached_is_named_when_it_is_made(teacher: Counted, tmp_path: Path) -> None:
    details = Details(cache=str(tmp_path / "kept"))
    with pytest.raises(ValueError, match="a teacher that stays as it is"):
        Distillation(teacher, layers=LayerTerm(), details=details)
    with pytest.raises(ValueError, match="a teacher that stays as it is"):
        Distillation(StartingModel(), details=details)
    with pytest.raises(ValueError, match="pass details=Details"):
        Distillation(None)

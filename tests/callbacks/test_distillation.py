from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_compress import CompressError, Distillation, TeacherCheckpoint
from lightning_compress.distillation.details import Details
from lightning_compress.distillation.losses import logit_mse
from tests.distillation.kl_by_hand import softened_kl


class Net(L.LightningModule):
    """Keeps, for each step, the loss that the optimizer saw and the logits."""

    def __init__(self, classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, classes))
        self.batches = 0
        self.losses: list[float] = []
        self.tasks: list[float] = []
        self.logits: list[torch.Tensor] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(inputs)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        logits = self.model(batch[0])
        if self.training:
            self.batches += 1
        task = functional.cross_entropy(logits, batch[1])
        self.logits.append(logits.detach())
        self.tasks.append(task.item())
        return task

    def on_before_backward(self, loss: torch.Tensor) -> None:
        self.losses.append(loss.item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class TwoTowers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 3)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return functional.cross_entropy(self.model(batch[0]) + self.other(batch[0]), batch[1])


class Loudly(Net):
    """Calls loss.backward() itself, where nothing can be added."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        functional.cross_entropy(self.model(batch[0]), batch[1]).backward()
        self.optimizers().step()


class Stream(IterableDataset):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return iter(self.data)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(32, 4, generator=generator), torch.randint(0, 3, (32,), generator=generator))


def fit(module: L.LightningModule, *callbacks: L.Callback, stream: bool = False, **options: Any) -> None:
    trainer = L.Trainer(
        max_steps=4,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    source = Stream(data()) if stream else data()
    trainer.fit(module, DataLoader(source, batch_size=8))


@pytest.fixture
def teacher() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))


@pytest.fixture
def student() -> Net:
    torch.manual_seed(0)
    return Net()


def test_the_loss_is_the_weighted_sum_by_hand(student: Net, teacher: nn.Module) -> None:
    fit(student, Distillation(teacher, weight=0.3, temperature=4.0))
    inputs = data().tensors[0]
    teacher.eval()
    first = slice(-4, None)  # a trial step at setup comes before
    for index, (loss, task, logits) in enumerate(
        zip(student.losses, student.tasks[first], student.logits[first], strict=True)
    ):
        wanted = teacher(inputs[8 * index : 8 * index + 8]).detach()
        term = softened_kl(logits.numpy(), wanted.numpy(), 4.0)
        assert loss == pytest.approx(0.7 * task + 0.3 * term, rel=1e-5)


def test_a_loss_without_a_temperature_is_called_without(student: Net, teacher: nn.Module) -> None:
    fit(student, Distillation(teacher, weight=0.25, loss=logit_mse))
    wanted = teacher.eval()(data().tensors[0][:8]).detach()
    term = float((student.logits[-4] - wanted).square().sum(dim=1).mean())
    assert student.losses[0] == pytest.approx(0.75 * student.tasks[-4] + 0.25 * term, rel=1e-5)


def test_a_loss_that_needs_more_is_named_when_it_is_made(teacher: nn.Module) -> None:
    def needs_more(student: torch.Tensor, teacher: torch.Tensor, *, extra: int) -> torch.Tensor:
        return student.sum() * extra

    with pytest.raises(ValueError, match=r"needs_more.*missing a required.*extra.*functools.partial"):
        Distillation(teacher, loss=needs_more)
    with pytest.raises(ValueError, match="takes no temperature"):
        Distillation(teacher, temperature=3.0, loss=logit_mse)


def test_the_teacher_is_left_as_it_came(student: Net, teacher: nn.Module) -> None:
    before = copy.deepcopy(teacher.state_dict())
    teacher[2].eval()  # a mix of modes comes back as a mix
    fit(student, Distillation(teacher))
    assert [module.training for module in teacher] == [True, True, False, True]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not teacher._forward_hooks
    assert not any(id(p) == id(q) for p in student.parameters() for q in teacher.parameters())


def test_wrong_classes_are_named_before_the_first_batch(student: Net) -> None:
    with pytest.raises(ValueError, match=r"\(2, 5\) from the teacher Sequential and \(2, 3\) from the student 'model'"):
        fit(student, Distillation(nn.Sequential(nn.Linear(4, 5))))
    assert student.batches == 0


def test_a_stream_is_not_consumed_and_the_first_step_names_wrong_classes(student: Net) -> None:
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=r"\(8, 5\) from the teacher"):
        fit(student, Distillation(nn.Sequential(nn.Linear(4, 5))), stream=True)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_a_trial_run_leaves_random_numbers_and_modes_alone(student: Net, teacher: nn.Module) -> None:
    torch.manual_seed(3)
    plain = copy.deepcopy(student)
    fit(plain)
    torch.manual_seed(3)
    fit(student, Distillation(teacher, loss=lambda s, t, temperature: s.sum() * 0.0, weight=1e-9))
    for one, other in zip(plain.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_teacher_that_needs_other_inputs_is_named(student: Net) -> None:
    class NeedsMask(nn.Module):
        def forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return inputs[:, :3] * attention_mask

    with pytest.raises(TypeError, match=r"NeedsMask cannot be called.*\(2, 4\).*attention_mask.*inputs="):
        fit(student, Distillation(NeedsMask()))
    assert student.batches == 0
    fit(Net(), Distillation(NeedsMask(), details=Details(inputs=lambda batch: (batch[0], torch.ones(1)))))


def test_two_towers_ask_which_one() -> None:
    with pytest.raises(CompressError, match=r"several models, 'model', 'other'.*student="):
        fit(TwoTowers(), Distillation(nn.Linear(4, 3)))
    fit(TwoTowers(), Distillation(nn.Linear(4, 3), student="model"))


def test_a_step_that_calls_backward_itself_is_named() -> None:
    with pytest.raises(CompressError, match=r"self\.manual_backward\(loss\)"):
        fit(Loudly(), Distillation(nn.Linear(4, 3)))


def test_a_named_student_that_is_never_called_is_named(student: Net, teacher: nn.Module) -> None:
    student.extra = nn.Linear(4, 3)
    with pytest.raises(CompressError, match="'extra'"):
        fit(student, Distillation(teacher, student="extra"))


@pytest.mark.parametrize("given", ["path", "checkpoint", "callable"])
def test_every_kind_of_teacher(given: str, student: Net, tmp_path: Path) -> None:
    torch.manual_seed(5)
    big, path = Net(width=32), tmp_path / "big.ckpt"
    saving = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    saving.strategy.connect(big)
    saving.save_checkpoint(path)
    source = {"path": str(path), "checkpoint": TeacherCheckpoint(str(path), Net), "callable": lambda: big}[given]
    other = copy.deepcopy(student)
    fit(student, Distillation(source))
    fit(other, Distillation(big))
    assert student.losses == pytest.approx(other.losses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 1.5}, "share in .0, 1., got 1.5"),
        ({"weight": float("nan")}, "got nan"),
        ({"temperature": 0.0}, "positive number, got 0.0"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(nn.Linear(1, 1), **options)


def test_teaching_itself_and_missing_files_are_named(student: Net) -> None:
    with pytest.raises(ValueError, match=r"copy\.deepcopy"):
        fit(student, Distillation(student.model))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        fit(student, Distillation("nowhere.ckpt"))
    with pytest.raises(TypeError, match=r"return a torch\.nn\.Module, got ndarray"):
        fit(student, Distillation(lambda: np.zeros(3)))


class Lossless(Net):
    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> Any:
        return {"lost": super().training_step(batch, batch_idx)}


def test_a_step_without_a_loss_gets_lightnings_own_message(teacher: nn.Module) -> None:
    with pytest.raises(MisconfigurationException, match="the 'loss' key needs to be present"):
        fit(Lossless(), Distillation(teacher))

"""Terms balanced by the norms of their gradients: closed forms, the loss of a fit by hand, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_compress import CompressError, Distillation
from lightning_compress.distillation.balancing import RunningSizes, gradient_norm
from lightning_compress.distillation.details import Details
from lightning_compress.distillation.features import feature_mse
from lightning_compress.distillation.losses import logit_mse, soft_targets
from lightning_compress.distillation.projections import projection
from lightning_compress.distillation.terms import LayerTerm
from tests.callbacks.test_distillation import Net, data
from tests.callbacks.test_distillation_layers import Recorded, at, fit

BY_GRADIENT = Details(balanced="gradient")


@pytest.fixture
def teacher() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.fixture
def student() -> Recorded:
    torch.manual_seed(0)
    return Recorded()


@settings(deadline=None)
@given(some.floats(0.1, 10.0), some.floats(-50.0, -0.1), some.floats(0.5, 5.0), some.floats(0.5, 5.0))
def test_two_parabolas_in_closed_form(first: float, second: float, left: float, right: float) -> None:
    """Of a/2 |z - c|^2 the gradient is a (z - c): norms |a| |z - c|, whatever the values of the losses."""
    z = torch.tensor([left, -right], dtype=torch.float64, requires_grad=True)
    task = abs(second) * 0.5 * (z**2).sum() + 1000.0
    term = first * 0.5 * ((z - 9.0) ** 2).sum()
    sizes = RunningSizes()
    first_step = sizes.scale_gradients(task, {"kd": term}, {"kd": [z]}, step=0)["kd"]
    assert first_step.item() == 0.0, "nothing is known yet"
    sizes.settle()
    scaled = sizes.scale_gradients(task, {"kd": term}, {"kd": [z]}, step=1)["kd"]
    norm = abs(second) * (left**2 + right**2) ** 0.5
    own = first * ((left - 9.0) ** 2 + (right + 9.0) ** 2) ** 0.5
    assert scaled.item() == pytest.approx(term.item() * norm / own, rel=1e-5)
    assert gradient_norm(scaled, [z]).item() == pytest.approx(norm, rel=1e-5)


def test_norms_are_followed_slowly_and_zeros_are_left_out() -> None:
    z = torch.tensor([1.0], requires_grad=True)
    sizes = RunningSizes()
    terms = [2.0 * z.sum(), 6.0 * z.sum(), 0.0 * z.sum()]
    factors = []
    for step, term in enumerate(terms):
        scaled = sizes.scale_gradients(z.sum(), {"kd": term}, {"kd": [z]}, step)["kd"]
        factors.append(scaled.item() / max(term.item(), 1e-30))
        sizes.settle()
    assert factors == pytest.approx([0.0, 1 / 2, 0.0])
    assert sizes.sizes == pytest.approx({"kd": 2.04, "task at kd": 1.0})


def test_layers_are_measured_every_tenth_step() -> None:
    z = torch.tensor([1.0], requires_grad=True)
    sizes = RunningSizes()
    seen = []
    for step in range(21):
        sizes.scale_gradients(z.sum(), {"hint": (step + 1.0) * z.sum()}, {"hint": [z]}, step)
        sizes.settle()
        seen.append(sizes.sizes["hint"])
    assert seen[:10] == [1.0] * 10
    assert seen[10:20] == pytest.approx([0.99 + 0.11] * 10)
    assert seen[20] == pytest.approx(0.99 * 1.1 + 0.21)


def test_a_fit_by_hand(student: Recorded, teacher: nn.Sequential) -> None:
    """Logits and a hint, each against the task where it reads, with autograd written out."""
    term = LayerTerm(feature_mse, "model.0", "2", weight=2.0, project=True)
    callback = Distillation(teacher, weight=0.25, layers=term, details=BY_GRADIENT)
    fit(student, callback, max_steps=2)
    own = projection("feature_mse: model.0 -> 2", 8, 3)  # its first step has no gradient
    values = []
    for step in range(2):
        model, inputs, labels = at(student, step)
        hidden = model[0](inputs)
        logits = model[1:](hidden)
        with torch.no_grad():
            wanted = teacher(inputs)
        task, kd = functional.cross_entropy(logits, labels), soft_targets(logits, wanted, 2.0)
        hint = functional.mse_loss(own(hidden), wanted)

        def norm(loss: Tensor, place: Tensor) -> float:
            return float(torch.autograd.grad(loss, place, retain_graph=True)[0].norm())

        ratios = norm(task, logits) / norm(kd, logits), norm(task, hidden) / norm(hint, hidden)
        values.append((task.item(), kd.item(), hint.item(), ratios))
    (task, *_, (by_logits, by_hidden)), (later_task, later_kd, later_hint, _) = values
    assert student.losses[0] == pytest.approx(0.75 * task, rel=1e-5), "the first step is the task's alone"
    expected = 0.75 * later_task + 0.25 * later_kd * by_logits + 2.0 * later_hint * by_hidden
    assert student.losses[1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("balanced", ["gradient", True])
def test_accumulated_parts_are_the_whole_batch(teacher: nn.Sequential, balanced: Any) -> None:
    """Logits, and a hint whose norms are measured every tenth step: 24 steps in one batch of 8, or in four of 2."""
    weights = []
    for batch in (8, 2):
        torch.manual_seed(0)
        module, term = Net(), LayerTerm(feature_mse, "model.1", weight=0.5)
        callback = Distillation(copy.deepcopy(teacher), layers=term, details=Details(balanced=balanced))
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=6, callbacks=[callback], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=8 // batch,
        )  # fmt: skip
        trainer.fit(module, DataLoader(data(), batch))
        assert trainer.global_step == 24
        weights.append(dict(module.named_parameters()) | callback.state_dict()["sizes"])
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)


def test_a_task_that_does_not_reach_the_outputs_is_refused(teacher: nn.Sequential) -> None:
    class Apart(Net):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(4, 3)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.model(batch[0])
            return functional.cross_entropy(self.other(batch[0]).detach(), batch[1])

    callback = Distillation(teacher, student="model", details=BY_GRADIENT)
    with pytest.raises(CompressError, match="no finite gradient by what the term 'kd' reads"):
        fit(Apart(), callback)
    with pytest.raises(ValueError, match="expected balanced to be"):
        Details(balanced="gradients")  # type: ignore[arg-type]


class SaveAt(L.Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_epoch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_accumulation_and_a_resume_are_the_same_run(teacher: nn.Sequential, tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"

    def run(resumed: bool) -> Net:
        torch.manual_seed(0)
        module, layers = Net(), LayerTerm(feature_mse, "model.1")
        callback = Distillation(copy.deepcopy(teacher), loss=logit_mse, layers=layers, details=BY_GRADIENT)
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=7, callbacks=[callback, SaveAt(path, 6 if not resumed else -1)], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            accumulate_grad_batches=2,
        )  # fmt: skip
        trainer.fit(module, DataLoader(data(), 8), ckpt_path=path if resumed else None)
        return module

    straight, again = run(resumed=False), run(resumed=True)
    assert len(straight.losses) == 28
    assert again.losses == straight.losses[-16:]
    for own, other in zip(again.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)

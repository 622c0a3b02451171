"""Matching of input gradients in a fit: the loss of each step by torch.func, and what has no second derivative."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import CompressError, Distillation
from lightning_compress.callbacks.teachable import strategies_of
from lightning_compress.distillation.details import Details
from lightning_compress.distillation.gradient_terms import GradientTerm, PlacedTerm
from lightning_compress.distillation.losses import soft_targets
from lightning_compress.distillation.own_teachers import StartingModel
from lightning_compress.distillation.terms import LayerTerm
from tests.callbacks.test_distillation import data
from tests.callbacks.test_distillation_layers import Recorded, at, fit
from tests.conformance.modules import Bert, Causal


@pytest.fixture
def teacher() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))


class Smooth(Recorded):
    """A student whose second derivatives are not zero nearly everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.model[1] = nn.Tanh()


@pytest.fixture
def student() -> Smooth:
    torch.manual_seed(0)
    return Smooth()


def rows(model: nn.Module, weights: dict[str, Tensor], inputs: Tensor, classes: Tensor) -> Tensor:
    """The rows of the Jacobian of these classes, by forward-over-reverse of torch.func."""
    jacobian = vmap(jacrev(lambda value: functional_call(model, weights, (value,))))(inputs)
    return jacobian[torch.arange(len(inputs)), classes]


def matched(model: nn.Module, weights: dict[str, Tensor], teacher: nn.Module, inputs: Tensor) -> Tensor:
    classes = teacher(inputs).argmax(dim=1)
    own, wanted = (
        functional.normalize(rows(net, named, inputs, classes))
        for net, named in ((model, weights), (teacher, dict(teacher.state_dict())))
    )
    return (own - wanted).square().sum(dim=1).mean()


def test_each_step_of_a_fit_by_torch_func(student: Smooth, teacher: nn.Sequential) -> None:
    """In float64: the loss that the optimizer saw, and the weights after a step of gradient descent on it."""
    callback = Distillation(teacher, weight=0.25, layers=GradientTerm(weight=3.0))
    trainer = fit(student, callback, precision="64-true", max_steps=4)
    assert trainer.logged_metrics["compress/loss/gradient_matching"] > 0
    teacher = teacher.double()
    for step in range(3):
        model, inputs, labels = at(student, step)
        inputs = inputs.double()

        def loss(weights: dict[str, Tensor], model=model, inputs=inputs, labels=labels) -> Tensor:
            logits = functional_call(model, weights, (inputs,))
            kd = soft_targets(logits, teacher(inputs), 2.0)
            matching = matched(model, weights, teacher, inputs)
            return 0.75 * functional.cross_entropy(logits, labels) + 0.25 * kd + 3.0 * matching

        weights = dict(model.named_parameters())
        assert student.losses[step] == pytest.approx(loss(weights).item(), rel=1e-10)
        gradients = torch.autograd.grad(loss(weights), tuple(weights.values()))
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            torch.testing.assert_close(student.before[step + 1][name], weight - 0.1 * gradient, rtol=1e-9, atol=1e-10)


def test_its_gradient_is_that_of_finite_differences(student: Smooth, teacher: nn.Sequential) -> None:
    callback = Distillation(teacher, weight=0.0, layers=GradientTerm(), details=Details(task_weight=0.0))
    fit(student, callback, precision="64-true", max_steps=2)
    model, inputs, _ = at(student, 0)
    weights, teacher, small = dict(model.state_dict()), teacher.double(), 1e-6
    moved = (weights["0.weight"] - student.before[1]["0.weight"]) / 0.1
    for place in [(0, 0), (3, 2), (7, 1)]:
        values = []
        for sign in (1.0, -1.0):
            shifted = {**weights, "0.weight": weights["0.weight"].clone()}
            shifted["0.weight"][place] += sign * small
            values.append(matched(model, shifted, teacher, inputs.double()))
        assert float(moved[place]) == pytest.approx(float(values[0] - values[1]) / (2 * small), rel=1e-5)


def test_it_teaches_and_stands_beside_layers_and_many_calls(teacher: nn.Sequential) -> None:
    class Twice(Smooth):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.batch = batch
            return sum(functional.cross_entropy(self.model(part), labels) for part, labels in self.halves())

        def halves(self) -> Any:
            return zip(*(value.chunk(2) for value in self.batch), strict=True)

    torch.manual_seed(0)
    student = Twice()
    layers = [LayerTerm(student="model.1", teacher="1"), GradientTerm(weight=2.0, normalize=False)]
    trainer = fit(student, Distillation(teacher, layers=layers), max_steps=1)
    before = dict(at(student, 0)[0].named_parameters())
    model, values = at(student, 0)[0], []
    for inputs, _ in student.halves():
        classes = teacher(inputs).argmax(dim=1)
        own, wanted = rows(model, before, inputs, classes), rows(teacher, teacher.state_dict(), inputs, classes)
        values.append((own - wanted).square().sum(dim=1).mean())
    expected = sum(values).item() / 2
    assert float(trainer.logged_metrics["compress/loss/gradient_matching"]) == pytest.approx(expected, rel=1e-4)
    assert {"compress/loss/feature_mse", "compress/loss/kd"} <= trainer.logged_metrics.keys()


@pytest.mark.parametrize("details", [Details(), Details(precision="int8"), Details(precision="bf16-true")], ids=str)
def test_gradient_descent_on_it_alone_turns_the_students_gradients(teacher: nn.Sequential, details: Details) -> None:
    torch.manual_seed(0)
    student = Smooth()
    alone = Details(task_weight=0.0, precision=details.precision)
    fit(student, Distillation(teacher, weight=0.0, layers=GradientTerm(), details=alone), max_steps=80)
    assert sum(student.losses[-4:]) < 0.7 * sum(student.losses[:4])


def test_a_starting_model_and_a_schedule(student: Smooth) -> None:
    term = GradientTerm(weight=lambda progress: 1.0 - progress)
    trainer = fit(student, Distillation(StartingModel(), layers=term), max_steps=1)
    assert float(trainer.logged_metrics["compress/loss/gradient_matching"]) == pytest.approx(0.0, abs=1e-10)


def embedded(module: L.LightningModule) -> str:
    return "model.embedding" if isinstance(module, Causal) else "model.bert.embeddings.word_embeddings"


@pytest.mark.parametrize("kind", [Causal, Bert])
def test_tokens_are_refused_with_the_layer_to_name_which_works(kind: type[L.LightningModule]) -> None:
    """Both call fused attention, whose kernels have no second derivative."""
    torch.manual_seed(0)
    module = kind()
    teacher = copy.deepcopy(module.model)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    layer = embedded(module)
    with pytest.raises(TypeError, match=rf"floating point.*int64.*GradientTerm\(student='{layer}'\)"):
        _fit_tokens(module, Distillation(teacher, layers=GradientTerm()))
    trainer = _fit_tokens(module, Distillation(teacher, layers=GradientTerm(student=layer)))
    assert 0.0 < float(trainer.logged_metrics["compress/loss/gradient_matching"]) < 4.0


def _fit_tokens(module: L.LightningModule, callback: Distillation) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module)
    return trainer


class Once(torch.autograd.Function):
    """A foreign function without a second derivative."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class Squares(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return Once.apply(value)


def test_what_cannot_work_is_named(teacher: nn.Sequential, student: Smooth) -> None:
    def refused(match: str, module: Any, error: type[Exception] = CompressError, **options: Any) -> None:
        with pytest.raises(error, match=match):
            fit(module, Distillation(teacher, layers=GradientTerm(**options)), stream=isinstance(module, ByKeyword))

    odd = Smooth()
    odd.model[1] = Squares()
    refused("second derivatives of the student, and a part of it has none", odd)
    refused("expected GradientTerm to name one layer, 'Linear' matches 2", student, ValueError, student="Linear")
    refused("called its student 1 times, .* met 0 times", _with_spare(), student="spare", teacher="0")
    refused("pass student='model' to Distillation", ByKeyword())
    with pytest.raises(ValueError, match="one GradientTerm at most"):
        Distillation(teacher, layers=[GradientTerm(), GradientTerm(2.0)])
    with pytest.raises(ValueError, match=r"Details\(balanced=True\)"):
        Distillation(teacher, layers=GradientTerm(), details=Details(balanced="gradient"))
    with pytest.raises(ValueError, match="a cache holds no gradients"):
        Distillation(teacher, layers=GradientTerm(), details=Details(cache="folder"))
    with pytest.raises(ValueError, match="at least 0, got -1"):
        GradientTerm(-1.0)
    with pytest.raises(ValueError, match="without student"):
        GradientTerm(teacher="0")


class ByKeyword(Smooth):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.model(input=batch[0]), batch[1])


def test_no_sharded_student_is_differentiated_twice() -> None:
    assert strategies_of(None, Details(), [GradientTerm()]) == ((), "teach layers instead: LayerTerm()")
    assert strategies_of(None, Details(), [LayerTerm()])[0]


def test_tokens_of_padding_do_not_count() -> None:
    """Logits of (batch, tokens, classes), whose masked token would have another gradient."""
    torch.manual_seed(0)
    inputs = torch.randn(2, 3, 4, requires_grad=True)
    own, other = nn.Linear(4, 5), nn.Linear(4, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    term = PlacedTerm(GradientTerm(normalize=False), own)
    (given,), _ = term.asked(((inputs.detach(),), {}), other)
    value = term.value(inputs, own(inputs), other(given), mask)
    classes = other(inputs).argmax(dim=-1)
    gaps = (own.weight[classes] - other.weight[classes]).square().sum(dim=-1)  # of linear logits the gradient is a row
    torch.testing.assert_close(value, (gaps * mask).sum(dim=1).mean())


def _with_spare() -> Smooth:
    module = Smooth()
    module.spare = nn.Linear(4, 4)
    return module


@pytest.mark.parametrize("name", ["model", None])
def test_no_trial_is_needed(teacher: nn.Sequential, student: Smooth, name: str | None) -> None:
    """Of data that cannot be read by index, the first step itself finds the student."""
    trainer = fit(student, Distillation(teacher, student=name, layers=GradientTerm()), stream=True, max_steps=2)
    model, inputs, _ = at(student, 1)
    logged = float(trainer.logged_metrics["compress/loss/gradient_matching"])
    assert logged == pytest.approx(float(matched(model, dict(model.state_dict()), teacher, inputs)), rel=1e-4)


def test_inputs_by_keyword_are_found_by_the_trial(teacher: nn.Sequential) -> None:
    trainer = fit(ByKeyword(), Distillation(teacher, layers=GradientTerm()), max_steps=1)
    assert trainer.logged_metrics["compress/loss/gradient_matching"] > 0


def test_inputs_of_another_size_than_the_teachers_are_named(student: Smooth) -> None:
    wide = nn.Linear(8, 3)
    details = Details(inputs=lambda batch: torch.cat([batch[0], batch[0]], dim=1))
    with pytest.raises(ValueError, match=r"one shape, got \(2, 4\) and \(2, 8\); give student and teacher the same"):
        fit(student, Distillation(wide, layers=GradientTerm(), details=details))


def test_the_users_batch_is_left_alone(teacher: nn.Sequential) -> None:
    class Looks(Smooth):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.found = batch[0].requires_grad
            return loss

    module = Looks()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, callbacks=[Distillation(teacher, layers=GradientTerm())], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*data().tensors), 8))
    assert module.found is False

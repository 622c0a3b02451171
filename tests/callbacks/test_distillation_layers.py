"""Terms of layers, schedules, and teachers that come from the student: the loss of each step by hand."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_compress import CompressError, Distillation, GradualPruning, IncompatibleCallbacks, StructuredPruning
from lightning_compress.distillation.details import Details
from lightning_compress.distillation.features import attention_transfer, feature_mse
from lightning_compress.distillation.losses import decoupled, logit_mse, soft_targets
from lightning_compress.distillation.own_teachers import MeanTeacher, Peer, StartingModel
from lightning_compress.distillation.projections import projection
from lightning_compress.distillation.relations import similarity_preserving
from lightning_compress.distillation.terms import LayerTerm
from lightning_compress.schedule import Linear
from tests.callbacks.test_distillation import Net, Stream, data

INPUTS, LABELS = data().tensors


class Recorded(Net):
    """Keeps its weights before each step of training."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width=width)
        self.before: list[dict[str, Tensor]] = []

    def on_before_backward(self, loss: Tensor) -> None:
        super().on_before_backward(loss)
        self.before.append({name: value.clone() for name, value in self.model.state_dict().items()})


def fit(module: L.LightningModule, *callbacks: L.Callback, stream: bool = False, **options: Any) -> L.Trainer:
    options = {"max_steps": 4} | options
    trainer = L.Trainer(
        accelerator="cpu", callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Stream(data()) if stream else data(), batch_size=8))
    return trainer


@pytest.fixture
def teacher() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.fixture
def student() -> Recorded:
    torch.manual_seed(0)
    return Recorded()


def at(student: Recorded, step: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """The student as it was before a step, and the step's batch."""
    model = copy.deepcopy(student.model)
    model.load_state_dict(student.before[step])
    return model, INPUTS[8 * step : 8 * step + 8], LABELS[8 * step : 8 * step + 8]


def test_a_hint_with_a_projection_by_hand(student: Recorded, teacher: nn.Sequential) -> None:
    term = LayerTerm(feature_mse, "model.1", weight=2.0)
    callback = Distillation(teacher, weight=0.25, layers=term)
    projected: list[nn.Linear] = []

    class Watch(L.Callback):
        def on_before_backward(self, *args: Any) -> None:
            (found,) = callback.lesson.teaching.terms
            projected.append(copy.deepcopy(next(iter(found.projections.modules.values()))))

    fit(student, callback, Watch())
    for step in range(4):
        model, inputs, labels = at(student, step)
        with torch.no_grad():
            hidden, wanted = model[:2](inputs), teacher[:2](inputs)
            hint = functional.mse_loss(projected[step](hidden), wanted)
            kd = soft_targets(model(inputs), teacher(inputs), 2.0)
            task = functional.cross_entropy(model(inputs), labels)
        assert student.losses[step] == pytest.approx(float(0.75 * task + 0.25 * kd + 2.0 * hint), rel=1e-5)
    assert not torch.equal(projected[0].weight, projected[3].weight), "it learns"
    assert not any(id(p) in {id(q) for q in student.parameters()} for p in projected[0].parameters())
    assert set(student.state_dict()) == {f"model.{index}.{kind}" for index in (0, 2) for kind in ("weight", "bias")}


def test_the_projection_steps_as_adam_does(student: Recorded, teacher: nn.Sequential) -> None:
    """Its first step against torch.optim.Adam on the gradient of the same loss."""
    callback = Distillation(teacher, weight=0.0, layers=LayerTerm(feature_mse, "model.1", weight=3.0))
    kept: list[nn.Linear] = []

    class Watch(L.Callback):
        def on_before_zero_grad(self, *args: Any) -> None:
            (found,) = callback.lesson.teaching.terms
            if found.projections.modules:
                kept.append(copy.deepcopy(next(iter(found.projections.modules.values()))))

    fit(student, callback, Watch(), max_steps=2)
    own = projection("feature_mse: model.1 -> 1", 8, 16)
    optimizer = torch.optim.Adam(own.parameters(), 1e-3)
    model, inputs, _ = at(student, 0)
    (3.0 * functional.mse_loss(own(model[:2](inputs).detach()), teacher[:2](inputs).detach())).backward()
    optimizer.step()
    torch.testing.assert_close(kept[1].weight, own.weight)  # Lightning clears gradients before the backward


def test_relations_take_any_width_and_several_terms_have_names(student: Recorded, teacher: nn.Sequential) -> None:
    terms = [LayerTerm(similarity_preserving, "model.1"), LayerTerm(similarity_preserving, "model.0", weight=0.5)]
    callback = Distillation(teacher, weight=0.0, layers=terms)
    trainer = fit(student, callback)
    model, inputs, labels = at(student, 3)
    with torch.no_grad():
        first = similarity_preserving(model[:2](inputs), teacher[:2](inputs))
        second = similarity_preserving(model[:1](inputs), teacher[:1](inputs))
        task = functional.cross_entropy(model(inputs), labels)
    assert student.losses[3] == pytest.approx(float(task + first + 0.5 * second), rel=1e-5)
    logged = trainer.logged_metrics
    assert logged["compress/loss/similarity_preserving"] == pytest.approx(float(first), rel=1e-5)
    assert logged["compress/loss/similarity_preserving_2"] == pytest.approx(float(second), rel=1e-5)
    assert "compress/loss/kd" not in logged


class Convolutional(Net):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        layers = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, width, 3, padding=1)]
        self.model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 4, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        image = batch[0].repeat(1, 4).view(-1, 1, 4, 4)
        return functional.cross_entropy(self.model(image), batch[1])


def test_layers_of_a_cnn_pair_by_size_without_names() -> None:
    torch.manual_seed(0)
    student, teacher = Convolutional(), Convolutional(8).model
    callback = Distillation(teacher, weight=0.0, layers=LayerTerm(attention_transfer))
    pairs: list[Any] = []

    class Watch(L.Callback):
        def on_train_start(self, *args: Any) -> None:
            pairs.extend(callback.lesson.teaching.terms[0].pairs)

    fit(student, callback, Watch())
    assert pairs == [("model.1", "1"), ("model.3", "3")]
    assert not any(part._forward_hooks for part in (*student.modules(), *teacher.modules()))


def test_weight_and_temperature_follow_a_schedule(student: Recorded, teacher: nn.Sequential) -> None:
    details = Details(task_weight=Linear(0.0, 1.0))
    fit(student, Distillation(teacher, Linear(1.0, 0.2), Linear(2.0, 4.0), details=details))
    for step in range(4):
        model, inputs, labels = at(student, step)
        share = step / 4
        with torch.no_grad():
            kd = soft_targets(model(inputs), teacher(inputs), 4.0 - 2.0 * share)
            task = functional.cross_entropy(model(inputs), labels)
        assert student.losses[step] == pytest.approx(float((1 - share) * task + (0.2 + 0.8 * share) * kd), rel=1e-5)


class Unlabelled(Recorded):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.model(batch[0])


def test_pure_distillation_needs_no_labels(teacher: nn.Sequential) -> None:
    torch.manual_seed(0)
    student = Unlabelled()
    fit(student, Distillation(teacher, 1.0, loss=logit_mse, details=Details(task_weight=0.0)))
    model, inputs, _ = at(student, 2)
    with torch.no_grad():
        assert student.losses[2] == pytest.approx(float(logit_mse(model(inputs), teacher(inputs))), rel=1e-5)


def test_a_loss_gets_the_labels_of_the_batch(student: Recorded, teacher: nn.Sequential) -> None:
    fit(student, Distillation(teacher, 1.0, 4.0, loss=decoupled))
    model, inputs, labels = at(student, 1)
    with torch.no_grad():
        wanted = decoupled(model(inputs), teacher(inputs), 4.0, labels=labels)
    assert student.losses[1] == pytest.approx(float(wanted), rel=1e-5)


def test_balanced_terms_have_the_size_of_the_tasks_loss(student: Recorded, teacher: nn.Sequential) -> None:
    def hundredfold(got: Tensor, wanted: Tensor) -> Tensor:
        return 100.0 * logit_mse(got, wanted)

    details = Details(balanced=True, task_weight=0.0)
    fit(student, Distillation(teacher, 1.0, loss=hundredfold, details=details), max_steps=2)
    with torch.no_grad():
        terms = [
            float(hundredfold(model(inputs), teacher(inputs))) for model, inputs, _ in (at(student, 0), at(student, 1))
        ]
    ratio = student.tasks[-2] / terms[0]  # of the step before; in the first one nothing is known
    assert student.losses == pytest.approx([0.0, terms[1] * ratio], rel=1e-5)


def test_the_starting_model_teaches_as_a_copy_does(student: Recorded) -> None:
    other = copy.deepcopy(student)
    pruning = {"sparsity": 0.5, "window": (1, 2), "frequency": 1}
    fit(student, Distillation(StartingModel()), GradualPruning(**pruning))
    fit(other, Distillation(copy.deepcopy(other.model)), GradualPruning(**pruning))
    assert student.losses == pytest.approx(other.losses)


def test_the_mean_teacher_follows_by_hand(student: Recorded) -> None:
    callback, kept = Distillation(MeanTeacher(0.5), loss=logit_mse), []

    class Watch(L.Callback):
        def on_before_backward(self, *args: Any) -> None:
            kept.append(copy.deepcopy(callback.teacher.model))

    fit(student, callback, Watch())
    expected = student.before[0]["0.weight"]
    for step in range(1, 4):  # the warm-up's first step is min(1 - 1 / 2, 0.5)
        expected = 0.5 * expected + 0.5 * student.before[step]["0.weight"]
        torch.testing.assert_close(kept[step][0].weight, expected)
    model, inputs, labels = at(student, 3)
    with torch.no_grad():
        kd, task = logit_mse(model(inputs), kept[3](inputs)), functional.cross_entropy(model(inputs), labels)
    assert student.losses[3] == pytest.approx(float(0.5 * task + 0.5 * kd), rel=1e-5)


class Two(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)
        self.losses: list[float] = []
        self.before: list[tuple[nn.Module, nn.Module]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum(functional.cross_entropy(model(batch[0]), batch[1]) for model in (self.first, self.second))

    def on_before_backward(self, loss: Tensor) -> None:
        self.losses.append(loss.item())
        self.before.append((copy.deepcopy(self.first), copy.deepcopy(self.second)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_two_students_teach_each_other() -> None:
    """Zhang et al. 2018, equations 3 and 5, both losses in one step."""
    torch.manual_seed(0)
    module, details = Two(), Details(task_weight=1.0)
    once = functools.partial(Distillation, weight=1.0, temperature=1.0, details=details)
    fit(module, once(Peer("second"), student="first"), once(Peer("first"), student="second"))
    for step, (first, second) in enumerate(module.before):
        inputs, labels = INPUTS[8 * step : 8 * step + 8], LABELS[8 * step : 8 * step + 8]
        one, other = first(inputs), second(inputs)
        kl = functools.partial(functional.kl_div, log_target=True, reduction="batchmean")
        mutual = kl(one.log_softmax(1), other.log_softmax(1)) + kl(other.log_softmax(1), one.log_softmax(1))
        task = functional.cross_entropy(one, labels) + functional.cross_entropy(other, labels)
        assert module.losses[step] == pytest.approx(float((task + mutual).detach()), rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: Distillation(t, layers=LayerTerm(feature_mse, "9")),
         r"student's layers pattern '9' matches no module; near names: "),
        (lambda t: Distillation(t, layers=LayerTerm(feature_mse, "model.1", "nothing*")),
         r"teacher's layers pattern 'nothing\*' matches no module"),
        (lambda t: Distillation(t, layers=LayerTerm(feature_mse, "model.1", project=False)),
         r"feature_mse cannot compare 'model.1' of the student, \(2, 8\), with '1' of the teacher, \(2, 16\)"),
        (lambda t: Distillation(t, layers=LayerTerm(attention_transfer)), "blocks of one kind or feature maps"),
        (lambda t: Distillation(Peer("model"), student="model"), "another submodule than the student 'model'"),
    ],
)  # fmt: skip
def test_wrong_layers_are_named_before_the_first_batch(
    make: Any, message: str, student: Recorded, teacher: nn.Sequential
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(student, make(teacher))
    assert not student.before
    assert not any(part._forward_hooks for part in (*student.modules(), *teacher.modules()))


def test_options_out_of_range_are_named(teacher: nn.Sequential) -> None:
    with pytest.raises(ValueError, match=r"share in \[0, 1\], got 1.5 from Linear.* at progress 1.0"):
        Distillation(teacher, Linear(1.5))
    with pytest.raises(ValueError, match="layer term's weight is at least 0, got -1"):
        LayerTerm(weight=-1.0)
    with pytest.raises(ValueError, match="task_weight multiplies"):
        Details(task_weight=-0.5)
    with pytest.raises(ValueError, match="pass student='name'"):
        Distillation(Peer("other"))
    with pytest.raises(ValueError, match=r"old average's weight in \[0, 1\), got 1.0"):
        MeanTeacher(1.0)


def test_a_stream_needs_names_of_layers(student: Recorded, teacher: nn.Sequential) -> None:
    fit(student, Distillation(teacher, layers=LayerTerm(feature_mse, "model.1")), stream=True)
    with pytest.raises(ValueError, match=r"name them: LayerTerm\(loss, student=...\)"):
        fit(Recorded(), Distillation(teacher, layers=LayerTerm(feature_mse)), stream=True)


def test_a_teacher_of_nan_is_named_before_the_first_batch(student: Recorded, teacher: nn.Sequential) -> None:
    with torch.no_grad():
        teacher[0].weight.fill_(float("nan"))
    with pytest.raises(CompressError, match="the teacher Sequential gives NaN"):
        fit(student, Distillation(teacher))
    assert not student.before


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_a_teacher_has_its_own_precision(precision: Any, student: Recorded, teacher: nn.Sequential) -> None:
    seen: list[torch.dtype] = []
    teacher[0].register_forward_hook(lambda layer, args, output: seen.append(output.dtype))
    fit(student, Distillation(teacher, details=Details(precision=precision)))
    assert set(seen) == {torch.float32 if precision == "32-true" else torch.bfloat16}
    assert teacher[0].weight.dtype == torch.float32


@pytest.mark.parametrize("source", [lambda t: Distillation(MeanTeacher(0.9)),
                                    lambda t: Distillation(t, layers=LayerTerm(feature_mse, "model.1"))])  # fmt: skip
def test_a_checkpoint_has_the_modules_keys_and_loads_alone(source: Any, teacher: nn.Sequential, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = Net()
    trainer = fit(student, source(teacher))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == list(Net().state_dict())
    assert len(saved["optimizer_states"][0]["param_groups"][0]["params"]) == 4
    again = Net.load_from_checkpoint(tmp_path / "last.ckpt", strict=True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in student.state_dict().items())


def test_channels_that_go_and_what_cannot_follow_them_are_named(student: Recorded, teacher: nn.Sequential) -> None:
    pruning = StructuredPruning(0.3, window=(1, 3), frequency=1)
    with pytest.raises(IncompatibleCallbacks, match="which MeanTeacher cannot follow"):
        fit(student, pruning, Distillation(MeanTeacher()))
    with pytest.raises(IncompatibleCallbacks, match="the term feature_mse cannot follow"):
        fit(student, pruning, Distillation(teacher, layers=LayerTerm(feature_mse, "model.1")))
    fit(student, pruning, Distillation(StartingModel(), layers=LayerTerm(similarity_preserving, "model.1")))
    assert student.model[0].out_features < 8


def saved_bytes(width: int) -> int:
    """What autograd keeps for the backwards of a short run with a teacher of this width."""
    torch.manual_seed(0)
    student = Net()
    teacher = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
    kept = 0

    def pack(value: Tensor) -> Tensor:
        nonlocal kept
        kept += value.numel() * value.element_size()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        fit(student, Distillation(teacher, layers=LayerTerm(similarity_preserving, "model.1", weight=0.1)))
    return kept


def test_the_teachers_activations_add_no_autograd_memory() -> None:
    small, large = saved_bytes(8), saved_bytes(4096)
    assert small > 0
    assert large == small

"""Taps find the student of a step however it is called, collect nothing else, and leave no hook behind."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

from lightning_compress.distillation.taps import StudentSeen, Tap, logits_of


class Step(nn.Module):
    """Stands for a LightningModule: a student, a frozen feature extractor, a metric without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x):
        return self.model(x)


def global_hooks():
    """Every hook of all modules that is left; torch keeps several books on them."""
    books = [book for name, book in vars(torch_module).items() if name.startswith("_global_")]
    assert len(books) >= 6
    return [dict(book) for book in books if isinstance(book, dict)]


def listen(root, run, name=None, **options):
    before = global_hooks()
    tap = Tap(open=True, **options)
    remove = tap.attach_outermost(root) if name is None else tap.attach(root, name)
    try:
        run()
    finally:
        remove()
    assert global_hooks() == before
    assert not any(module._forward_hooks for module in root.modules())
    return tap.take()


X = torch.ones(5, 3)


@pytest.mark.parametrize(
    ("run", "names"),
    [
        (lambda step: step(X), [""]),
        (lambda step: step.model(X), ["model"]),
        (lambda step: step.model(input=X), ["model"]),
        (lambda step: step.loss(step.model(X), torch.zeros(5, dtype=torch.long)), ["model"]),
        (lambda step: step.model(step.frozen(X)), ["model"]),
        (lambda step: (step.model(X), step.model(X)), ["model", "model"]),
        (lambda step: step.model[2](step.model[0](X)), ["model.0", "model.2"]),
        (lambda step: nn.Linear(3, 2)(X), []),  # a module of nobody, such as a teacher
        (lambda step: step.frozen(X), []),
        (lambda step: torch.no_grad()(step.model)(X), []),
    ],
    ids=["self", "submodule", "keyword", "loss", "frozen", "twice", "two", "stranger", "only frozen", "no_grad"],
)
def test_which_call_is_the_students(run, names):
    step = Step()
    calls = listen(step, lambda: run(step))
    assert [call.name for call in calls] == names


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)


def test_two_towers_are_both_seen_and_one_can_be_named():
    step = TwoTowers()

    def run():
        return step.left(X) @ step.right(X).T

    assert [call.name for call in listen(step, run)] == ["left", "right"]
    assert [call.name for call in listen(step, run, name="right")] == ["right"]


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 2)

    def forward(self, input_ids, labels=None):
        return {"loss": torch.zeros(()), "logits": self.body(input_ids)}


def test_arguments_and_output_of_the_call_are_the_steps_own():
    step = nn.ModuleDict({"net": ByKeyword()})
    batch, outputs = {"input_ids": X, "labels": torch.zeros(5)}, []
    (call,) = listen(step, lambda: outputs.append(step["net"](**batch)))
    assert call.name == "net"
    assert call.args == ()
    assert call.kwargs == batch
    assert call.output is outputs[0]
    assert call.output["logits"].requires_grad


def test_a_closed_tap_collects_nothing():
    step, tap = Step(), Tap()
    removes = tap.attach_outermost(step), tap.attach(step, "model")
    step(X)
    assert tap.take() == []
    tap.open = True
    step.model(X)
    assert len(tap.take()) == 2
    assert tap.take() == []
    for remove in removes:
        remove()


def test_stopping_at_the_first_call_passes_a_broad_except():
    step, reached = Step(), []

    def run():
        try:
            step.model(X)
        except Exception:  # noqa: BLE001 - a user's step may be that broad
            reached.append("caught")
        reached.append("went on")

    tap = Tap(open=True, stop=True)
    remove = tap.attach_outermost(step)
    with pytest.raises(StudentSeen):
        run()
    remove()
    assert reached == []
    assert [call.name for call in tap.calls] == ["model"]


class Fragile(nn.Linear):
    def forward(self, x):
        if len(x) > 3:
            raise RuntimeError("too large")
        return super().forward(x)


def test_a_step_that_survives_its_students_error_and_tries_again():
    step = nn.ModuleDict({"model": Fragile(3, 2)})

    def run():
        with pytest.raises(RuntimeError, match="too large"):
            step["model"](X)
        step["model"](X[:2])

    calls = listen(step, run)
    assert [len(call.output) for call in calls] == [2]


@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's look
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_compiled_student_is_seen_once_by_each_call(wrapped):
    step = Step()
    if wrapped:
        step.model = torch.compile(step.model, backend="eager")
    else:
        step.model.compile(backend="eager")
    for _ in range(2):
        assert [call.name for call in listen(step, lambda: step.model(X))] == ["model"]
    assert [call.name for call in listen(step, lambda: step.model(X), name="model")] == ["model"]


LOGITS = torch.zeros(2, 3)


class ModelOutput(dict):
    """Like a transformers ModelOutput: the loss comes first."""


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        {"logits": LOGITS},
        ModelOutput(loss=torch.zeros(()), logits=LOGITS),
        SimpleNamespace(logits=LOGITS),
        (LOGITS, torch.ones(1)),
        [LOGITS],
    ],
    ids=["tensor", "dict", "model output", "attribute", "tuple", "list"],
)
def test_logits_are_found(output):
    assert logits_of(output) is LOGITS


@pytest.mark.parametrize("output", [None, {}, {"loss": LOGITS}, (), ("a",), object()])
def test_an_output_without_logits_is_named_with_its_cure(output):
    with pytest.raises(TypeError, match="outputs=a function from the model's output to its logits"):
        logits_of(output)


def test_a_tapped_submodule_pickles_and_its_copy_is_not_heard():
    step, tap = Step(), Tap()
    tap.attach(step, "model")
    again = pickle.loads(pickle.dumps(step.model))
    tap.open = True
    again(torch.zeros(1, 3))
    assert tap.calls == []
    step.model(torch.zeros(1, 3))
    assert [call.name for call in tap.calls] == ["model"]

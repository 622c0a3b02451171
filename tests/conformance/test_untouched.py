"""The module is the user's before, during and after: names, classes, copies, and nothing left behind."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from tests.conformance.cases import Row, promise
from tests.conformance.modules import EVERY_MODULE, Small
from tests.conformance.running import Do, Run, build, differing, identity, traces, train


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("kind", EVERY_MODULE, ids=lambda kind: kind.__name__)
@promise("acts on any module")
def test_acts_on_any_module_and_leaves_no_trace(row: Row, kind: type[L.LightningModule], tmp_path: Path) -> None:
    module = build(kind)
    run = train(module, row.make(module), tmp_path, watched=True)
    row.acted(run)
    plain = train(build(kind), [], tmp_path)
    assert traces(module, run.trainer.optimizers) == traces(plain.module, plain.trainer.optimizers)
    assert identity(module) == identity(plain.module)


class Look(L.Callback):
    """Compares the module's names and classes at every event between batches."""

    def __init__(self, expected: dict[str, Any]) -> None:
        self.expected, self.looks = expected, 0

    def look(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.looks += 1
        assert identity(pl_module) == self.expected

    on_train_start = on_train_batch_start = on_train_batch_end = look
    on_validation_start = on_validation_batch_end = on_fit_end = look


@promise("keys, names and classes stay")
def test_names_and_classes_stay_during_a_run(row: Row, tmp_path: Path) -> None:
    module = build(Small)
    look = Look(identity(module))
    train(module, row.make(module), tmp_path, extra=[look])
    assert look.looks > 40


@promise("no trace after fit")
def test_no_hook_is_left_after_fit(row: Row, tmp_path: Path) -> None:
    module = build(Small)
    fresh = traces(module)
    run = train(module, row.make(module), tmp_path)
    assert traces(module)["globals"] == fresh["globals"]
    assert traces(module.model) == traces(build(Small).model)
    assert traces(module, run.trainer.optimizers)["optimizer 0"] == [0] * 6


class Breaks(nn.Module):
    """Breaks in its n-th call, in the middle of the network's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 30:
            raise RuntimeError("broken on purpose")
        return value


class BreakingLinear(nn.Linear):
    """Breaks inside a layer that is being compressed."""

    calls = 0

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 30:
            raise RuntimeError("broken on purpose")
        return super().forward(value)


class BreaksAt(L.Callback):
    def __init__(self, event: str) -> None:
        setattr(self, event, self.fail)

    def fail(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("broken on purpose")


EVENTS = ("setup", "on_fit_start", "on_train_start", "on_validation_end", "on_train_batch_end", "on_before_zero_grad")


@pytest.mark.parametrize("where", ["between layers", "inside a layer", *EVENTS])
@promise("no trace after an exception")
def test_no_trace_after_an_exception(row: Row, where: str, tmp_path: Path) -> None:
    def broken_run(callbacks: bool) -> dict[str, Any]:
        module = build(Small)
        if where == "between layers":
            module.model[5] = Breaks()
        if where == "inside a layer":
            module.model[7] = BreakingLinear(16, 16)
        made = row.make(module) if callbacks else []
        with pytest.raises(RuntimeError, match="broken on purpose"):
            train(module, made, tmp_path, extra=[BreaksAt(where)] if where in EVENTS else [])
        optimizers = module.trainer.optimizers if where not in ("setup", "on_fit_start") else []
        return traces(module, optimizers)

    assert broken_run(callbacks=True) == broken_run(callbacks=False)


def outputs(model: nn.Module, value: torch.Tensor) -> torch.Tensor:
    modes = [(child, child.training) for child in model.modules()]
    try:
        with torch.no_grad():
            return model.eval()(value)
    finally:
        for child, training in modes:
            child.training = training


def unpickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def exported(model: nn.Module) -> nn.Module:
    modes = [(child, child.training) for child in model.modules()]
    try:
        return torch.export.export(model.eval(), (torch.zeros(4, 1, 6, 6),)).module()
    finally:
        for child, training in modes:
            child.training = training


@promise("copies, pickles and exports between batches")
def test_copies_pickles_and_exports_between_batches(row: Row, tmp_path: Path) -> None:
    value = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(5))
    worked: list[int] = []

    def check(trainer: L.Trainer, module: L.LightningModule, batches: int) -> None:
        if batches not in (1, 3, 7, 14):  # before, while ranges are observed, while learned, when frozen
            return
        expected = outputs(module.model, value)
        copied = copy.deepcopy(module)
        assert torch.equal(outputs(copied, value), expected)
        assert identity(copied) == identity(module)
        assert torch.equal(outputs(unpickled(module.model), value), expected)
        assert torch.equal(outputs(saved_and_loaded(module.model), value), expected)
        with torch.no_grad():
            torch.testing.assert_close(exported(module.model)(value), expected)
        for parameter in copied.parameters():  # a copy is its own: nothing done to it reaches the run
            parameter.data.zero_()
        outputs(copied, value * 100)
        copied.train()(value * 100)
        worked.append(batches)

    disturbed = build(Small, dropout=0.0)
    run = train(disturbed, row.make(disturbed), tmp_path, extra=[Do(check)])
    assert worked == [1, 3, 7, 14]
    module = build(Small, dropout=0.0)
    alone = train(module, row.make(module), tmp_path)
    assert differing(run.weights, alone.weights) == []
    assert differing(row.memory(run), row.memory(alone)) == []


@promise("pickles after fit")
def test_module_and_callbacks_pickle_after_fit(row: Row, tmp_path: Path) -> None:
    module = build(Small)
    run = train(module, row.make(module), tmp_path)
    again = unpickled(module)
    assert differing(run.weights, again.state_dict()) == []
    for callback in run.callbacks:
        twin = pickle.loads(pickle.dumps(callback))
        assert type(twin) is type(callback)
        copy.deepcopy(callback)
    restored = Run(again, [copy.deepcopy(c) for c in run.callbacks], run.trainer, run.before)
    assert differing(row.memory(restored), row.memory(run)) == []

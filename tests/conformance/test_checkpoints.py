"""Checkpoints are plain, evaluation sees the compressed model, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.conformance.cases import ROWS, Row, promise
from tests.conformance.modules import LateConfigure, Manual, Small, images
from tests.conformance.running import Do, KeepRandomness, Run, build, differing, train, trainer_for

ROOT = Path(__file__).parents[2]
KILLED_AT, SAVED_AT = 7, 6  # in the middle of the second epoch, of pruning's window and of learned ranges


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


@promise("checkpoints are plain")
def test_a_checkpoint_is_a_plain_one_of_compressed_weights(row: Row, tmp_path: Path) -> None:
    module = build(Small)
    run = train(module, row.make(module), tmp_path)
    path = tmp_path / "last.ckpt"
    run.trainer.save_checkpoint(path)
    loaded = Small.load_from_checkpoint(path, strict=True)
    assert differing(loaded.state_dict(), run.weights) == []
    row.acted(Run(loaded, run.callbacks, run.trainer, run.before))
    saved = torch.load(path, weights_only=True)
    assert list(saved["state_dict"]) == list(build(Small).state_dict())
    # At most a bit a weight: neither a teacher nor a float mask is in there.
    weights = sum(value.numel() for value in module.parameters())
    assert sum(value.numel() * value.element_size() for value in tensors(saved["callbacks"])) <= weights / 8 + 64
    assert len(saved["optimizer_states"][0]["param_groups"][0]["params"]) == len(list(module.parameters()))


def loss_of(module: Small) -> float:
    inputs, labels = images().tensors
    with torch.no_grad():
        return float(F.cross_entropy(module.eval()(inputs), labels))


@promise("val_loss is clean")
def test_val_loss_is_the_task_loss_of_the_compressed_model(row: Row, tmp_path: Path) -> None:
    module = build(Small)
    run = train(module, row.make(module), tmp_path)
    with row.compressed(run):
        expected = loss_of(module)
    assert float(run.trainer.callback_metrics["val_loss"]) == pytest.approx(expected, rel=1e-5)


@promise("evaluation sees the compressed model")
def test_validate_test_and_predict_see_the_compressed_model(row: Row, tmp_path: Path) -> None:
    module = build(Small)
    run = train(module, row.make(module), tmp_path)
    path = tmp_path / "last.ckpt"
    run.trainer.save_checkpoint(path)
    with row.compressed(run), torch.no_grad():
        expected, loss = module.eval()(images().tensors[0]), loss_of(module)

    def check(trainer: Any, **source: Any) -> None:
        assert trainer.validate(verbose=False, **source)[0]["val_loss"] == pytest.approx(loss, rel=1e-5)
        assert trainer.test(verbose=False, **source)[0]["test_loss"] == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(torch.cat(trainer.predict(**source)), expected)

    check(run.trainer, model=module)
    other = Small()
    check(trainer_for(tmp_path, row.make(other)), model=other, ckpt_path=path)


# Resume


def remembered(row: Row, run: Run) -> dict[str, Tensor]:
    return {**run.weights, **row.memory(run)}


@pytest.mark.parametrize("kind", [Small, Manual, LateConfigure], ids=lambda kind: kind.__name__)
@promise("resumes exactly from any step")
def test_resumes_exactly_from_any_step(row: Row, kind: type[Small], tmp_path: Path) -> None:
    module = build(kind)
    save = Do(lambda trainer, _, batches: trainer.save_checkpoint(tmp_path / f"step={batches}.ckpt"))
    whole = train(module, row.make(module), tmp_path, extra=[KeepRandomness(), save])
    for step in (1, 4, 7, 11):
        torch.manual_seed(99)
        fresh = kind()
        ckpt_path = tmp_path / f"step={step}.ckpt"
        resumed = train(fresh, row.make(fresh), tmp_path, extra=[KeepRandomness()], ckpt_path=ckpt_path)
        assert differing(remembered(row, resumed), remembered(row, whole)) == [], f"from step {step}"


def crash(name: str, folder: Path) -> None:
    """Train, save at step 6, and kill this process in step 7. Runs in a process of its own."""
    row = next(row for row in ROWS if row.name == name)

    def kill(trainer: Any, module: Any, batches: int) -> None:
        if batches == SAVED_AT:
            trainer.save_checkpoint(folder / "saved.ckpt")
        if batches == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    module = build(Small)
    train(module, row.make(module), folder, extra=[KeepRandomness(), Do(kill)])


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, Path]]:
    """Exit code and folder of one killed process a row; they run side by side, on a slow machine for minutes."""
    folders = {row.name: tmp_path_factory.mktemp(f"killed-{row.name}") for row in ROWS}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "tests.conformance.test_checkpoints", name, str(folder)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for name, folder in folders.items()
    }
    return {name: (process.wait(timeout=600), folders[name]) for name, process in started.items()}


@promise("a killed run resumes exactly")
def test_a_killed_run_resumes_exactly(row: Row, killed: dict[str, tuple[int, Path]], tmp_path: Path) -> None:
    code, folder = killed[row.name]
    assert code == -signal.SIGKILL
    module = build(Small)
    whole = train(module, row.make(module), tmp_path, extra=[KeepRandomness()])
    fresh = Small()
    resumed = train(fresh, row.make(fresh), tmp_path, extra=[KeepRandomness()], ckpt_path=folder / "saved.ckpt")
    assert resumed.trainer.global_step == whole.trainer.global_step
    assert differing(remembered(row, resumed), remembered(row, whole)) == []


# Again


@promise("a second fit")
def test_a_second_fit_with_the_same_objects_starts_afresh(row: Row, tmp_path: Path) -> None:
    first, second, fresh = build(Small), build(Small), build(Small)
    callbacks = row.make(first)
    train(first, callbacks, tmp_path)
    again = train(second, callbacks, tmp_path)
    alone = train(fresh, row.make(fresh), tmp_path)
    row.acted(again)
    assert differing(remembered(row, again), remembered(row, alone)) == []


@promise("a second fit")
def test_a_fit_after_a_failed_one_starts_afresh(row: Row, tmp_path: Path) -> None:
    def fail(trainer: Any, module: Any, batches: int) -> None:
        if batches == KILLED_AT:
            raise RuntimeError("broken on purpose")

    first, fresh = build(Small), build(Small)
    callbacks = row.make(first)
    with pytest.raises(RuntimeError, match="on purpose"):
        train(first, callbacks, tmp_path, extra=[Do(fail)])
    again = train(build(Small), callbacks, tmp_path)
    alone = train(fresh, row.make(fresh), tmp_path)
    assert differing(remembered(row, again), remembered(row, alone)) == []


@promise("more epochs with the same Trainer")
def test_more_epochs_with_the_same_trainer_go_on(row: Row, tmp_path: Path) -> None:
    """Plain SGD without dropout has no state but the weights, so two fits in a row are one longer fit."""
    options = {"dropout": 0.0, "optimizer": "sgd", "shuffle": False}
    module, fresh = build(Small, **options), build(Small, **options)
    run = train(module, row.make(module), tmp_path, max_epochs=3)
    run.trainer.fit_loop.max_epochs = 4
    run.trainer.fit(module)
    row.acted(run)
    whole = train(fresh, row.make(fresh), tmp_path, max_epochs=4)
    assert differing(remembered(row, run), remembered(row, whole)) == []


if __name__ == "__main__":
    crash(sys.argv[1], Path(sys.argv[2]))

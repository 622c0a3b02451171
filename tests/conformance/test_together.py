"""Callbacks together: any order gives one result, and Lightning's averaging callbacks keep what was done."""

from __future__ import annotations

from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import Tensor

from lightning_compress import (
    CompressionMonitor,
    Distillation,
    GradualPruning,
    LotteryRewinding,
    LowRank,
    QuantizationAwareTraining,
    ReadyGate,
    Reconstruction,
    SparsityRegularization,
    StructuredPruning,
)
from lightning_compress.callbacks.loading import SIGNPOST
from tests.conformance.cases import ROWS, Row, promise, teacher_of, without_row
from tests.conformance.modules import Adversaries, Causal, Manual, Small
from tests.conformance.running import KeepRandomness, Run, build, differing, train, trainer_for

# These bring their own company, which cannot be there twice; their order is tried by their own tests.
ACCOMPANIED = (CompressionMonitor, LotteryRewinding, ReadyGate)
COMPRESSING = tuple(row for row in ROWS if row.callback not in ACCOMPANIED)
# Two that prune the same weights cannot meet, nor two that quantize the same layers.
PRUNING = {GradualPruning, Reconstruction, SparsityRegularization, StructuredPruning}
# Tried with one other callback, and not with channels that go, which they (or some of their terms) cannot follow.
VARIANTS = {"distillation-layers", "distillation-jacobian", "mean-teacher"}
# Nothing may hold on to a weight that becomes two in the run, nor average it.
TAUGHT = {LowRank, Distillation}
ALLOWED = [
    rows
    for size in range(2, len(COMPRESSING) + 1)
    for rows in combinations(COMPRESSING, size)
    if len(PRUNING & {row.callback for row in rows}) <= 1
    and sum(row.callback is QuantizationAwareTraining for row in rows) <= 1
    and not (len(rows) > 2 and VARIANTS & {row.name for row in rows})
    and sum(row.callback is Distillation for row in rows) <= 1
    and not (LowRank in {row.callback for row in rows} and not {row.callback for row in rows} <= TAUGHT)
    and {row.name for row in rows} != {"low-rank", "mean-teacher"}
    and not (VARIANTS & {row.name for row in rows} and StructuredPruning in {row.callback for row in rows})
]
LARGEST = [rows for rows in ALLOWED if len(rows) == max(map(len, ALLOWED))]
# Grids that learn, those of a rule, and weights that share are tried in every order with one other; in more company by
# resuming.
PAIRED = {"quantization-learned", "quantization-ruled", "sharing"}
SETS = [rows for rows in ALLOWED if len(rows) == 2 or not PAIRED & {row.name for row in rows}]


def together(rows: tuple[Row, ...], module: L.LightningModule) -> list[L.Callback]:
    return [callback for row in rows for callback in row.make(module)]


def memory(rows: tuple[Row, ...], run: Run) -> dict[str, Tensor]:
    states = {f"{row.name} {name}": value for row in rows for name, value in row.memory(run).items()}
    return {**run.weights, **states}


def named(rows: tuple[Row, ...]) -> str:
    return "+".join(row.name for row in rows)


KINDS = (Small, Manual, Adversaries, Causal)
ONE_KIND = VARIANTS | {"sharing"}
ORDERED = [(rows, kind) for rows in SETS for kind in (KINDS[:1] if ONE_KIND & {row.name for row in rows} else KINDS)]


@pytest.mark.parametrize(("rows", "kind"), ORDERED, ids=[f"{named(rows)}-{kind.__name__}" for rows, kind in ORDERED])
def test_every_order_gives_the_same_weights(rows: tuple[Row, ...], kind: type[Small], tmp_path: Path) -> None:
    results = []
    for order in permutations(rows):
        module = build(kind)
        run = train(module, together(order, module), tmp_path, watched=True)
        for row in rows:
            row.acted(run)
        results.append(memory(rows, run))
    assert all(differing(result, results[0]) == [] for result in results[1:])


@promise("every order is the same")
def test_the_place_of_other_callbacks_does_not_matter(row: Row, tmp_path: Path) -> None:
    first, last = build(Small), build(Small)
    stranger = KeepRandomness()
    before = train(first, [stranger, *row.make(first)], tmp_path)
    after = train(last, [*row.make(last), stranger], tmp_path)
    assert differing({**before.weights, **row.memory(before)}, {**after.weights, **row.memory(after)}) == []


@pytest.mark.parametrize("rows", LARGEST, ids=named)
def test_all_together_resume_exactly(rows: tuple[Row, ...], tmp_path: Path) -> None:
    module = build(Small)

    def save(trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in (3, 6, 9):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    class Save(L.Callback):
        on_train_batch_end = staticmethod(save)

    whole = train(module, together(rows, module), tmp_path, extra=[KeepRandomness(), Save()])
    for step in (3, 6, 9):
        fresh = Small()
        options = {"extra": [KeepRandomness()], "ckpt_path": tmp_path / f"{step}.ckpt"}
        resumed = train(fresh, together(rows[::-1], fresh), tmp_path, **options)
        assert differing(memory(rows, resumed), memory(rows, whole)) == []


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize(
    "average",
    [
        lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
        lambda: EMAWeightAveraging(decay=0.9),
        lambda: WeightAveraging(),
    ],
    ids=["SWA", "EMA", "WeightAveraging"],
)
@pytest.mark.parametrize("first", [True, False], ids=["averaged first", "averaged last"])
@promise("weight averaging")
def test_weight_averaging_keeps_what_was_done(row: Row, first: bool, average: Any, tmp_path: Path) -> None:
    module = build(Small, norm=False)
    callbacks = row.make(module)
    ordered = [average(), *callbacks] if first else [*callbacks, average()]
    run = train(module, ordered, tmp_path)
    row.acted(run)
    run.trainer.save_checkpoint(tmp_path / "averaged.ckpt")
    saved = torch.load(tmp_path / "averaged.ckpt", weights_only=True)["state_dict"]
    saved.pop(SIGNPOST, None)
    assert differing(saved, run.weights) == []
    trainer_for(tmp_path).validate(module, verbose=False)


# The table itself


def test_a_callback_without_a_row_is_found() -> None:
    class Newcomer(L.Callback):
        pass

    assert without_row(ROWS) == []
    assert without_row(ROWS, [Newcomer, CompressionMonitor, "not a class"]) == ["Newcomer"]
    assert without_row(ROWS[1:]) == [ROWS[0].callback.__name__]


def test_a_promise_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ValueError, match="one of the table's promises"):
        promise("no such promise")


def test_a_row_whose_callback_does_nothing_is_caught(tmp_path: Path) -> None:
    """Each row's proof can fail: it does so on a run with the callback switched off."""
    for row in ROWS:
        module = build(Small)
        run = train(module, (row.off[-1] if row.off[-1] is not row.make else COMPRESSING[0].make)(module), tmp_path)
        with pytest.raises(Exception):  # noqa: B017, PT011 - an assertion, or a callback with nothing to show
            row.acted(run)


def test_teachers_do_not_depend_on_the_student() -> None:
    one, other = teacher_of(build(Small)), teacher_of(Small())
    assert differing(one.state_dict(), other.state_dict()) == []

"""However the optimizer is driven, the callbacks count real steps, and off means off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import CompressError
from tests.conformance.cases import Row, promise
from tests.conformance.modules import ClosureStep, DictStep, Manual, RawOptimizer, Small, TwoStepsABatch
from tests.conformance.running import Do, build, differing, train

STILL = {"dropout": 0.0, "norm": False}  # results do not depend on how a batch is cut


def clocks(trainer: L.Trainer) -> list[int]:
    return [callback.clock.steps for callback in trainer.callbacks if hasattr(callback, "clock") and callback.enabled]


@promise("accumulation counts optimizer steps")
def test_accumulation_counts_optimizer_steps(row: Row, tmp_path: Path) -> None:
    module = build(Small)
    seen: list[list[int]] = []
    note = Do(lambda trainer, _, batches: seen.append([trainer.global_step, *clocks(trainer)]))
    run = train(module, row.make(module), tmp_path, extra=[note], accumulate_grad_batches=3, max_epochs=8)
    row.acted(run)
    assert run.trainer.global_step == 16
    assert all(len({*steps}) == 1 for steps in seen)


@promise("accumulation equals the larger batch")
def test_accumulation_equals_the_larger_batch(row: Row, tmp_path: Path) -> None:
    options = {**STILL, "optimizer": "sgd", "shuffle": False}
    small, large = build(Small, batch=4, **options), build(Small, batch=16, **options)
    accumulated = train(small, row.make(small), tmp_path, accumulate_grad_batches=4)
    whole = train(large, row.make(large), tmp_path)
    row.acted(accumulated)
    torch.testing.assert_close(accumulated.weights, whole.weights, rtol=0, atol=1e-5)
    torch.testing.assert_close(row.memory(accumulated), row.memory(whole), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Manual, ClosureStep, RawOptimizer, DictStep], ids=lambda kind: kind.__name__)
@promise("manual equals automatic")
def test_manual_optimization_equals_automatic(row: Row, kind: type[Small], tmp_path: Path) -> None:
    one, other = build(kind), build(Small)
    manual = train(one, row.make(one), tmp_path)
    automatic = train(other, row.make(other), tmp_path)
    row.acted(manual)
    assert differing(manual.weights, automatic.weights) == []
    assert differing(row.memory(manual), row.memory(automatic)) == []


@promise("manual equals automatic")
def test_two_steps_a_batch_are_two_steps(row: Row, tmp_path: Path) -> None:
    module = build(TwoStepsABatch)
    run = train(module, row.make(module), tmp_path)
    row.acted(run)
    assert set(clocks(run.trainer)) <= {32}


@promise("off is plain")
def test_off_is_plain(row: Row, tmp_path: Path) -> None:
    plain = train(build(Small), [], tmp_path)
    for off in row.off:
        module = build(Small)
        run = train(module, off(module), tmp_path)
        assert differing(run.weights, plain.weights) == []


class Clips(Small):
    """Notes the gradients that clipping is given, and the weights they are for."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        for weight in self.parameters():
            if weight.dim() > 1:
                self.clipped.append((weight.detach().clone(), weight.grad.clone()))
        super().configure_gradient_clipping(optimizer, *args, **kwargs)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@promise("clipping sees masked gradients")
def test_clipping_sees_no_gradient_of_a_weight_that_is_out(row: Row, algorithm: str, tmp_path: Path) -> None:
    module = build(Clips)
    options = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": algorithm}
    run = train(module, row.make(module), tmp_path, **options)
    row.acted(run)
    assert len(module.clipped) == 16 * 4
    assert all(not gradient[weight == 0].any() for weight, gradient in module.clipped)


@promise("NaN weights are named")
def test_nan_weights_are_named(row: Row, tmp_path: Path) -> None:
    def spoil(trainer: L.Trainer, module: L.LightningModule, batches: int) -> None:
        if batches == 5:
            with torch.no_grad():
                module.model[7].weight[0, 0] = float("nan")

    module = build(Small)
    with pytest.raises(CompressError, match=r"'model\.\d\.weight' at optimizer step 6.*learning rate"):
        train(module, row.make(module), tmp_path, extra=[Do(spoil)])


class Uncalled(Small):
    """Has a layer that no forward calls, and a parameter that is frozen."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.spare = nn.Linear(4, 4)
        self.model[0].weight.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx)


@promise("acts on any module")
def test_acts_beside_an_uncalled_layer_and_a_frozen_one(row: Row, tmp_path: Path) -> None:
    module = build(Uncalled)
    run = train(module, row.make(module), tmp_path)
    row.acted(run)

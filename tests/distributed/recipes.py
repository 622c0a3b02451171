"""What the matrix runs: a fit of 12 steps with a technique, and what is left of it, whole and by clean names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from lightning_compress import Distillation, GradualPruning, LowRank, QuantizationAwareTraining, StructuredPruning
from lightning_compress.distillation.own_teachers import StartingModel
from lightning_compress.factorization.ranks import Budget
from lightning_compress.factorization.svd import svd
from lightning_compress.pruning.channels import Removal
from lightning_compress.pruning.criteria import movement, wanda
from lightning_compress.pruning.patterns import Unstructured
from lightning_compress.pruning.scopes import by_output
from lightning_compress.quantization.details import Details
from lightning_compress.quantization.learned_steps import LSQ, LSQPlus
from lightning_compress.sharding import clean_name, local, parts_of, whole
from tests.distributed.strategies import CLASSES, INPUTS, STRATEGIES, Shardable

STEPS, MIDDLE = 12, 6  # 4 steps an epoch
PRUNED, ROUNDED = (2, 11), (2, 4, 11)


def teacher() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(99)
        return nn.Sequential(nn.Linear(INPUTS, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def pruning() -> L.Callback:
    return GradualPruning(0.7, PRUNED, 2)


def rounding() -> L.Callback:
    return QuantizationAwareTraining(window=ROUNDED)


def teaching() -> L.Callback:
    return Distillation(teacher(), 0.5, 2.0)


TECHNIQUES: dict[str, Callable[[], list[L.Callback]]] = {
    "pruning": lambda: [pruning()],
    "structured": lambda: [StructuredPruning(0.5, PRUNED, 2, removal=Removal(times=0))],
    "quantization": lambda: [rounding()],
    "distillation": lambda: [teaching()],
    "all": lambda: [pruning(), rounding(), teaching()],
    "starting model": lambda: [pruning(), Distillation(StartingModel(), 0.5, 2.0)],
    "wanda": lambda: [GradualPruning(0.6, PRUNED, 2, criterion=wanda, pattern=Unstructured(by_output))],
    "movement": lambda: [GradualPruning(0.7, PRUNED, 2, criterion=movement)],
    "factored": lambda: [LowRank(Budget(0.5), at=0.0, decompose=svd)],
    "learned": lambda: [QuantizationAwareTraining(LSQ(4), LSQPlus(4), ROUNDED, details=Details(outputs=True))],
}


class SaveAt(L.Callback):
    """Saves a checkpoint after so many optimizer steps, in the middle of an epoch."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(
    technique: str,
    strategy: str | Strategy = "one",
    world: int = 1,
    save: Path | None = None,
    resume: Path | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Train, and return masks, ranges and weights."""
    callbacks = TECHNIQUES[technique]()
    named = STRATEGIES[strategy](world) if isinstance(strategy, str) and strategy != "one" else strategy
    trainer = L.Trainer(
        devices=world, max_steps=STEPS, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0, use_distributed_sampler=False,
        callbacks=[*callbacks, *([] if save is None else [SaveAt(MIDDLE, save)])],
        strategy="auto" if named == "one" else named, **{"accelerator": "cpu", **options},
    )  # fmt: skip
    module = Shardable()
    trainer.fit(module, ckpt_path=resume)
    found = {**remembered(callbacks), **weights(module, trainer.strategy.model)}
    return {name: value.cpu() for name, value in found.items()}


def remembered(callbacks: list[L.Callback]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for state in (callback.state_dict() for callback in callbacks):
        found |= {f"mask {name}": mask for name, mask in state.get("masks", {}).items()}
        units = state.get("units", {})
        found |= {f"mask {name} {index}": mask for name, pair in units.items() for index, mask in enumerate(pair)}
        found |= {f"range {name}": extremes for name, extremes in state.get("extremes", {}).items()}
        learned = state.get("learned", {}).get("values", {})
        found |= {f"learned {name} {key}": value for name, own in learned.items() for key, value in own.items()}
        if "clock" in state:
            found[f"steps {len(found)}"] = torch.tensor(state["clock"]["counts"])
    return found


def weights(module: nn.Module, root: nn.Module) -> dict[str, Tensor]:
    parameters = {clean_name(name): parameter for name, parameter in module.named_parameters()}
    parts = parts_of(root, parameters)
    return {name: whole(local(parameter), parts[name]).clone() for name, parameter in parameters.items()}


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Masks, steps and zeros are the same to the bit, the rest to rounding; returns the largest difference."""
    assert found.keys() == expected.keys()
    largest = 0.0
    for name, value in expected.items():
        if name.startswith(("mask", "steps")):
            assert torch.equal(found[name], value), name
            continue
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
        largest = max(largest, float((found[name] - value).abs().max()))
    return largest

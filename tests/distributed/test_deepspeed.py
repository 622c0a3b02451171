"""DeepSpeed ZeRO stages 1 and 2: two gloo processes end as one. Lightning refuses a CPU, so a subclass runs it."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, ParallelStrategy
from torch import Tensor, nn

from tests.distributed import launching, recipes
from tests.distributed.strategies import Shardable

STAGES = (1, 2)
TECHNIQUES = ("pruning", "quantization", "distillation", "all", "starting model")
CELLS = [(stage, technique) for stage in STAGES for technique in TECHNIQUES]
Cells = dict[str, dict[str, Tensor]]
needs_deepspeed = [
    pytest.mark.optional,
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install deepspeed"),
]


def on_cpu(stage: int, **options: Any) -> DeepSpeedStrategy:
    """Lightning's strategy without its questions for CUDA."""
    os.environ["DS_ACCELERATOR"] = "cpu"

    class OnCPU(DeepSpeedStrategy):
        def setup_environment(self) -> None:
            comm = importlib.import_module("deepspeed.comm.torch")
            comm.build_shm_op = lambda: None  # it would compile C++ at the start of the run
            ParallelStrategy.setup_environment(self)
            self.set_world_ranks()
            self._init_deepspeed_distributed()

        def _setup_model(self, model: nn.Module) -> nn.Module:
            return model

        def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
            import deepspeed

            learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
            engine, wrapped, _, _ = deepspeed.initialize(
                args=argparse.Namespace(device_rank=self.local_rank), config=self.config, model=model,
                model_parameters=learned, optimizer=optimizer, lr_scheduler=lr_scheduler, dist_init_required=False,
            )  # fmt: skip
            return engine, wrapped

    sizes = {"allgather_bucket_size": 1000, "reduce_bucket_size": 1000, "logging_batch_size_per_gpu": 8}
    return OnCPU(stage=stage, process_group_backend="gloo", **{**sizes, **options})


class Masters(L.Callback):
    """Compares at each batch's end whole weights, their masters, put together by DeepSpeed, and the masks."""

    def __init__(self) -> None:
        self.violations, self.seen, self.counts = 0, 0, []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        from deepspeed.utils import safe_get_full_fp32_param

        pruning = next(c for c in trainer.callbacks if hasattr(c, "keeper"))
        self.counts.append(pruning.clock.steps)
        for name, mask in pruning.masks.items():
            weight = pruning.weights[name]
            master = safe_get_full_fp32_param(weight)
            self.violations += int((master[~mask] != 0).sum()) + int((weight[~mask] != 0).sum())
            self.violations += int((master.to(weight.dtype) != weight).sum())
            self.seen += int((~mask).sum())


def watched(stage: int, folder: Path, name: str, **options: Any) -> dict[str, Tensor]:
    """Prune with a watch on masters; with what a checkpoint of DeepSpeed holds at the end."""
    watch, path = Masters(), folder / f"{name}.ckpt"
    trainer = L.Trainer(
        accelerator="cpu", devices=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0, use_distributed_sampler=False,
        callbacks=[recipes.pruning(), watch], strategy=on_cpu(stage), **{"max_steps": recipes.STEPS, **options},
    )  # fmt: skip
    trainer.fit(module := Shardable())
    trainer.save_checkpoint(path)
    counts = torch.tensor([watch.violations, watch.seen, trainer.global_step])
    weights = {f"weight {n}": p.detach().float().clone() for n, p in module.named_parameters()}
    return {"counts": counts, "steps": torch.tensor(watch.counts), **weights}


def work(rank: int, world: int, folder: Path) -> Cells:
    results: Cells = {}
    for stage, technique in CELLS:
        name, own = f"{stage}-{technique}", folder / f"{stage}-{technique}.ckpt"
        results[name] = recipes.fit(technique, on_cpu(stage), world, save=own)
        results[f"{name} resumed"] = recipes.fit(technique, on_cpu(stage), world, resume=own)
    for stage in STAGES:
        results[f"{stage}-watched"] = watched(stage, folder, f"{stage}-watched")
        results[f"{stage}-bf16"] = watched(stage, folder, f"{stage}-bf16", precision="bf16-mixed")
        results[f"{stage}-accumulated"] = watched(
            stage, folder, f"{stage}-accumulated", accumulate_grad_batches=2, max_steps=-1, max_epochs=6
        )
    return results


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Cells]:
    folder = launching.once(tmp_path_factory, "zero", lambda folder: launching.run(__name__, 2, folder))
    return launching.results(folder, 2)


def marked(test: Any) -> Any:
    for mark in needs_deepspeed:
        test = mark(test)
    return test


@marked
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_two_processes_end_as_one_does(technique: str, two: list[Cells]) -> None:
    one = recipes.fit(technique)
    for rank in two:
        for stage in STAGES:
            recipes.check_equal(rank[f"{stage}-{technique}"], one)


@marked
@pytest.mark.parametrize(("stage", "technique"), CELLS)
def test_a_resumed_run_ends_as_an_uninterrupted_one(stage: int, technique: str, two: list[Cells]) -> None:
    for rank in two:
        name = f"{stage}-{technique}"
        assert recipes.check_equal(rank[f"{name} resumed"], rank[name]) == 0.0


@marked
@pytest.mark.parametrize("kind", ["watched", "bf16", "accumulated"])
@pytest.mark.parametrize("stage", STAGES)
def test_masters_hold_the_zeros_and_real_steps_are_counted(stage: int, kind: str, two: list[Cells]) -> None:
    for rank in two:
        violations, seen, global_step = rank[f"{stage}-{kind}"]["counts"].tolist()
        assert violations == 0
        assert seen > 0
        assert global_step == recipes.STEPS
        assert rank[f"{stage}-{kind}"]["steps"][-1] == recipes.STEPS

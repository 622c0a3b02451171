"""Step time under DDP and FSDP2 on two CPU processes, with each callback against the same strategy without it.

    torchrun --nproc-per-node 2 benchmarks/two_processes.py --rounds 8

A round fits each variant in turn for some steps of BERT-mini, one thread a process. Ratios are of medians of a step's
wall time within a round, so that the machine's drift between rounds does not count; printed are the median and the
range over rounds. CPU time of the process is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from int8 import processor
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from models import SentenceClassifier, sentence_batch
from torch.distributed.fsdp import fully_shard
from training import RUN_STEPS, Endless

from lightning_compress import Constant, Distillation, GradualPruning, QuantizationAwareTraining

RESULTS = Path(__file__).resolve().parent / "results" / "two_processes.json"
WARM_UP, STEPS = 4, 10
STRATEGIES = ("ddp", "fsdp2")


class Sharded(SentenceClassifier):
    """Under FSDP2 each encoder layer is a unit of its own."""

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            for layer in self.net.bert.encoder.layer:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)


class Timed(L.Callback):
    """Wall and CPU seconds of each step, from one batch's start to the next one's."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.times.append((time.perf_counter(), time.process_time()))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = len(self.times) > WARM_UP + STEPS


def variants() -> dict[str, list[L.Callback]]:
    torch.manual_seed(1)
    return {
        "plain": [],
        "pruning": [GradualPruning(Constant(0.9), (0, RUN_STEPS), RUN_STEPS)],
        "fake-quant": [QuantizationAwareTraining(window=(0, 1, RUN_STEPS))],
        "fake-quant, ranges frozen": [QuantizationAwareTraining(window=(0, 1, WARM_UP - 1))],
        "distillation": [Distillation(SentenceClassifier().net)],
    }


def strategy_of(name: str) -> Strategy:
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    world = int(os.environ["WORLD_SIZE"])
    return ModelParallelStrategy(world, 1, process_group_backend="gloo")


def step_seconds(strategy: str, callbacks: list[L.Callback], batch: Any) -> np.ndarray:
    """Return the medians, over steps, of wall and CPU seconds."""
    torch.manual_seed(0)
    timed = Timed()
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy_of(strategy), max_epochs=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        use_distributed_sampler=False, callbacks=[timed, *callbacks],
    )  # fmt: skip
    trainer.fit(Sharded(), torch.utils.data.DataLoader(Endless(batch), batch_size=None))
    return np.median(np.diff(np.array(timed.times), axis=0)[WARM_UP:], axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rank, environment = int(os.environ["RANK"]), dict(os.environ)
    batch, cells = sentence_batch(), []
    for strategy in STRATEGIES:
        seconds: dict[str, list[np.ndarray]] = {name: [] for name in variants()}
        for _ in range(options.rounds):
            for name, callbacks in variants().items():
                os.environ.update(environment)  # Lightning takes the launcher's variables out at a fit's end
                seconds[name].append(step_seconds(strategy, callbacks, batch))
        plain = np.array(seconds["plain"])
        for name, each in seconds.items():
            wall, cpu = (np.array(each) / plain).T
            row = {
                "strategy": strategy, "variant": name,
                "step_ms": round(1e3 * float(np.median(np.array(each)[:, 0])), 1),
                "wall_ratio": round(float(np.median(wall)), 3), "cpu_ratio": round(float(np.median(cpu)), 3),
                "wall_spread": [round(float(wall.min()), 3), round(float(wall.max()), 3)],
                "rounds": options.rounds, "machine": processor(),
            }  # fmt: skip
            cells.append(row)
            if rank == 0:
                print(row, flush=True)
    if rank == 0:
        options.out.write_text(json.dumps(cells, indent=1) + "\n")


if __name__ == "__main__":
    main()

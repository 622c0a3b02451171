"""One process of a run is killed at any moment; what is restarted from the last whole checkpoint ends with the masks
of the run that nobody interrupted, on as many processes, fewer or more.

`LIGHTNING_COMPRESS_KILLS=20 pytest tests/distributed/test_kills.py` kills twenty times.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from tests.distributed import launching, recipes
from tests.distributed.strategies import STRATEGIES, Shardable

KILLS = int(os.environ.get("LIGHTNING_COMPRESS_KILLS", "4"))
STEPS, WORLD = 24, 2
WINDOW = (2, 22)


class Slowly(L.Callback):
    """Gives a step a length in which it can be killed."""

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(0.03)


def work(rank: int, world: int, folder: Path, strategy: str, resume: str) -> dict[str, Tensor]:
    from lightning_compress import GradualPruning, QuantizationAwareTraining

    pruning = GradualPruning(0.8, WINDOW, 1)
    callbacks = [pruning, QuantizationAwareTraining(window=(4, 8, 22)), Slowly()]
    checkpoints = ModelCheckpoint(folder / "checkpoints", "{step:02d}", save_top_k=-1, every_n_train_steps=1)
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy=STRATEGIES[strategy](world), max_steps=STEPS, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
        callbacks=[*callbacks, checkpoints],
    )  # fmt: skip
    trainer.fit(Shardable(), ckpt_path=resume or None)
    return {**recipes.remembered([pruning]), "history": torch.tensor(pruning.history, dtype=torch.float64)}


def whole_checkpoints(folder: Path) -> list[Path]:
    """Those that can be read, from the newest: a kill may come while one is written."""
    found = []
    for path in sorted((folder / "checkpoints").glob("*.ckpt"), reverse=True):
        try:
            torch.load(path, weights_only=False)
        except (RuntimeError, EOFError):
            continue
        found.append(path)
    return found


def kill_one(strategy: str, folder: Path, chance: random.Random) -> int:
    """Start a run, kill one of its processes after some checkpoint; return how many steps it got."""
    processes = launching.start(__name__, WORLD, folder, strategy, "")
    wanted, begin = chance.randint(2, STEPS - 3), time.monotonic()
    while len(list((folder / "checkpoints").glob("*.ckpt"))) < wanted:
        assert time.monotonic() - begin < 120, launching.printed(folder, WORLD)
        time.sleep(0.01)
    time.sleep(chance.random() * 0.06)
    victim = chance.choice(processes)
    os.kill(victim.pid or 0, signal.SIGKILL)
    codes = launching.ended(processes, 20)
    assert codes[processes.index(victim)] == -signal.SIGKILL
    assert 0 not in codes  # the others stop, too
    return wanted


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    first, _ = launching.run(__name__, WORLD, tmp_path_factory.mktemp("whole"), "ddp", "")
    return first


@pytest.mark.distributed
@pytest.mark.parametrize("trial", range(KILLS))
def test_a_killed_run_ends_with_the_same_masks(trial: int, uninterrupted: dict[str, Tensor], tmp_path: Path) -> None:
    chance = random.Random(trial)
    strategy, world = ("ddp", "fsdp2")[trial % 2], (2, 1, 4)[trial % 3]
    kill_one(strategy, tmp_path, chance)
    newest = whole_checkpoints(tmp_path)[0]
    restarted = launching.run(__name__, world, tmp_path / "again", strategy if world > 1 else "ddp", str(newest))
    for rank in restarted:
        assert rank.keys() == uninterrupted.keys()
        for name, value in uninterrupted.items():
            assert torch.equal(rank[name], value), name

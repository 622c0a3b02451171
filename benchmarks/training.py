"""Trainers that print and keep nothing, and data without an end: what is measured is the training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as L
import torch
from torch import nn
from torch.utils.data import IterableDataset

RUN_STEPS = 10**6
Module = TypeVar("Module", bound=nn.Module)


class Endless(IterableDataset):
    """The same batch a million times: the run is long on paper, so that no phase ends while it is timed."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(self.batch)

    def __len__(self) -> int:
        return RUN_STEPS


def quiet_trainer(callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    """Return a Trainer on the CPU without checkpoints, progress bar and summary, and without a logger but yours."""
    return L.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, **options},
    )


def kept(path: Path, module: Module, train: Callable[[Module], Module]) -> Module:
    """Return a module with the weights of a file, or trained, and then kept there; in eval mode."""
    if path.is_file():
        module.load_state_dict(torch.load(path, weights_only=True))
        return module.eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    trained = train(module)
    torch.save(trained.state_dict(), path)
    return trained.eval()

"""TrialResult: what one trial of a search came to, written by the run itself, with or without a logger."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from lightning_compress.callbacks.contract import SHARDING
from lightning_compress.callbacks.lifecycle import log
from lightning_compress.callbacks.quantization import QuantizationAwareTraining
from lightning_compress.errors import CompressError, UnsupportedStrategy
from lightning_compress.search.command_trial import PROGRESS, RESULT
from lightning_compress.search.stored import save_weights

__all__ = ["TrialResult"]

WEIGHTS = "weights.zip"


class TrialResult(L.Callback):
    """Write a run's metrics and the bytes of its compressed weights into a folder, for the search that started it.

    Runs after each validation (a line of `progress.jsonl`: step and the metric), after each training batch (stops
    the run when the search has ended) and at the end of the fit (`weights.zip`, and `result.json`: all metrics of the
    last validation and `size_bytes`). `python -m lightning_compress search` appends it to each trial.

    Args:
        folder: where to write; made if needed.
        metric: of those that the module logs, the one that the search keeps.

    Raises:
        UnsupportedStrategy: weights lie in parts on several processes, so that there is no file to measure.
        CompressError: the process that started this run has ended.
    """

    def __init__(self, folder: str, metric: str) -> None:
        super().__init__()
        self.folder, self.metric = Path(folder), metric
        self._parent = os.getppid()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, SHARDING):
            raise UnsupportedStrategy("a search measures one file of weights; search on one device or with DDP")
        self.folder.mkdir(parents=True, exist_ok=True)

    def on_train_batch_end(self, *_: Any) -> None:
        if os.getppid() != self._parent:  # a search that was killed cannot stop its trials itself
            raise CompressError("the search that started this trial has ended; go on by starting the search again")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or self.metric not in trainer.callback_metrics:
            return
        line = {"step": trainer.global_step, "value": float(trainer.callback_metrics[self.metric])}
        with (self.folder / PROGRESS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        ranges = {
            name: trained
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, QuantizationAwareTraining) and callback.enabled
            for name, trained in callback.ranges().items()
        }
        size_bytes = save_weights(pl_module, self.folder / WEIGHTS, ranges)
        log(trainer, {"search/size_bytes": float(size_bytes)})
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        beside = self.folder / f"{RESULT}.part"  # the search must not read half a file
        beside.write_text(json.dumps({**metrics, "size_bytes": size_bytes}), encoding="utf-8")
        beside.replace(self.folder / RESULT)

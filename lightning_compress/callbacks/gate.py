"""ReadyGate: a checkpoint of the compressed model ranks above any from before, whatever their metrics."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lightning_compress.callbacks.contract import Compression, compressions

__all__ = ["ReadyGate", "add_gate"]


class ReadyGate(L.Callback):
    """Let `ModelCheckpoint` and `EarlyStopping` judge by their metric only once compression is complete.

    Every compressing callback of this package adds one for the fit, where the Trainer has a `ModelCheckpoint` with a
    `monitor` or an `EarlyStopping`; put `ReadyGate(enabled=False)` into the list to do without. It opens at the first
    validation that begins with a complete model (`compress/ready` is 1), without a validation loop at the first batch.

    Before that, checkpoints are kept as ever, so that a crash costs nothing. When the gate opens they become the worst:
    the next ones take their places in `best_model_path` and among the `save_top_k` files. `EarlyStopping` neither
    counts its patience nor reaches its `stopping_threshold` while the gate is shut; NaN and `divergence_threshold`
    stop the run as ever.

    Args:
        enabled: False is Lightning's own behaviour: the best checkpoint may be one from before the target was reached.
    """

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.enabled = enabled
        self.open = False
        self.added = False  # by a compressing callback, for this fit only
        self._thresholds: dict[EarlyStopping, float | None] = {}
        self._compressions: list[Compression] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.global_step == 0:
            self.open = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._compressions = compressions(trainer)
        if self._shut:
            self._thresholds = {each: each.stopping_threshold for each in _early_stoppings(trainer)}
            self._hold(trainer)

    @property
    def _shut(self) -> bool:
        return self.enabled and not self.open

    def _hold(self, trainer: L.Trainer) -> None:
        """Make EarlyStopping forget what it has seen."""
        for stopping in self._thresholds:
            stopping.wait_count, stopping.stopping_threshold = 0, None
            stopping.best_score = torch.tensor(_worst(stopping.mode))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self._shut and not trainer.enable_validation:  # the metric, if there is one, is of training
            self._open_if_complete(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._shut and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._open_if_complete(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._shut:
            self._hold(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._shut:
            self._hold(trainer)

    def _open_if_complete(self, trainer: L.Trainer) -> None:
        if not all(compression.complete for compression in self._compressions):
            return
        self._hold(trainer)
        self._give_back()
        for checkpoint in _checkpoints(trainer):
            _rank_last(checkpoint)
        self.open = True

    def _give_back(self) -> None:
        for stopping, threshold in self._thresholds.items():
            stopping.stopping_threshold = threshold
        self._thresholds = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        saved = next((each.best_model_path for each in _checkpoints(trainer) if each.best_model_path), "")
        if self._shut and saved:
            rank_zero_warn(
                f"the best checkpoint, {saved}, is of a model whose compression was not complete: no validation began "
                f"after it was; validate at the end of the run too, or let the windows end earlier"
            )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._leave(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._leave(trainer)

    def _leave(self, trainer: L.Trainer) -> None:
        self._give_back()
        self._compressions = []
        if self.added:  # a new list: the Trainer is going through the old one
            trainer.callbacks = [each for each in _callbacks(trainer) if each is not self]  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        return {"open": True} if self.open else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.open = bool(state_dict.get("open"))


def add_gate(trainer: L.Trainer) -> None:
    """Put a `ReadyGate` before the other callbacks for this fit, where one is needed and none is there.

    Runs at the `setup` of each compressing callback.
    """
    listed = _callbacks(trainer)
    judging = _checkpoints(trainer) or _early_stoppings(trainer)
    if not judging or any(isinstance(callback, ReadyGate) for callback in listed):
        return
    gate = ReadyGate()
    gate.added = True
    # The Trainer is going through the old list: the new one counts from the next hook on.
    trainer.callbacks = [gate, *listed]  # type: ignore[attr-defined]


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def _checkpoints(trainer: L.Trainer) -> list[ModelCheckpoint]:
    found = [callback for callback in _callbacks(trainer) if isinstance(callback, ModelCheckpoint)]
    return [checkpoint for checkpoint in found if checkpoint.monitor is not None and checkpoint.save_top_k != 0]


def _early_stoppings(trainer: L.Trainer) -> list[EarlyStopping]:
    return [callback for callback in _callbacks(trainer) if isinstance(callback, EarlyStopping)]


def _worst(mode: str) -> float:
    return math.inf if mode == "min" else -math.inf


def _rank_last(checkpoint: ModelCheckpoint) -> None:
    """Give what was saved so far the worst score: the next checkpoints replace it, file by file."""
    worst = torch.tensor(_worst(checkpoint.mode))
    checkpoint.best_k_models = dict.fromkeys(checkpoint.best_k_models, worst)
    checkpoint.kth_value = worst
    if checkpoint.best_model_score is not None:
        checkpoint.best_model_score = worst

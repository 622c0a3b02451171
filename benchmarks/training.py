"""Trainers that print and keep nothing: what is measured is the training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L


def quiet_trainer(callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    """Return a Trainer on the CPU without logger, checkpoints, progress bar and summary."""
    return L.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )

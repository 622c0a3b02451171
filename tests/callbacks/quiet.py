"""One quiet epoch, validated at its end, for tests of what a callback does to a module."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch.utils.data import DataLoader, TensorDataset


def quiet_fit(module: L.LightningModule, callback: L.Callback, data: TensorDataset, **options: Any) -> L.Trainer:
    """Fit in batches of 8, and return the trainer."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback],
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{**quiet, **options},
    )
    trainer.fit(module, DataLoader(data, batch_size=8), DataLoader(data, batch_size=96))
    return trainer

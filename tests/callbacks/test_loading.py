"""A shrunken module and its averaged copies come back from a checkpoint together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import StructuredPruning


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.example_input_array = torch.zeros(2, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Save(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


def fit(module: Net, callbacks: list[L.Callback], ckpt_path: Path | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(16, 8, generator=generator), torch.randint(0, 3, (16,), generator=generator)
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(module, DataLoader(TensorDataset(inputs, labels), batch_size=4), ckpt_path=ckpt_path)
    return module.state_dict()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_a_run_with_a_moving_average_resumes_after_a_removal(first: bool, tmp_path: Path) -> None:
    def callbacks() -> list[L.Callback]:
        both: list[L.Callback] = [StructuredPruning(0.5, window=(1, 5), frequency=2), EMAWeightAveraging(decay=0.5)]
        return both if first else both[::-1]

    torch.manual_seed(0)
    whole = fit(Net(), [*callbacks(), Save(tmp_path / "8.ckpt")])
    assert whole["net.0.weight"].shape[0] < 16
    resumed = fit(Net(), callbacks(), tmp_path / "8.ckpt")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

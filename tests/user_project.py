"""A user's own module and data, written without knowledge of compression, as YAML files name them."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    def __init__(self, width: int = 16, learning_rate: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 3)
        self.learning_rate = learning_rate

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.net(inputs))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.learning_rate)


class Data(L.LightningDataModule):
    def __init__(self, rows: int = 64) -> None:
        super().__init__()
        inputs = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))
        self.rows = TensorDataset(inputs, inputs[:, :3].argmax(dim=1))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=32)


def squared(weight: Tensor) -> Tensor:
    """A criterion of the user's own."""
    return weight.detach().square()


def unannotated(weight):
    return weight


def half_way(progress: float) -> float:
    """A schedule of the user's own."""
    return 0.5 * progress


def build_teacher() -> nn.Module:
    return Net(width=24)

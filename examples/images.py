"""A module and data for YAML files: a small CNN on the Fashion-MNIST images that come with the package.

python -m lightning_compress fit -c examples/images.yaml -c configs/prune.yaml
"""

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress.demo_data import load_fashion_mnist


class Classifier(L.LightningModule):
    def __init__(self, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 6 * 6, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val_accuracy", (self(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.learning_rate)


class Images(L.LightningDataModule):
    def __init__(self, data_dir: str | None = None, batch_size: int = 32) -> None:
        super().__init__()
        self.data_dir, self.batch_size = data_dir, batch_size

    def setup(self, stage: str) -> None:
        self.train_images, self.test_images = load_fashion_mnist(self.data_dir)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_images, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.test_images, batch_size=250)

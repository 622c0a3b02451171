"""Binary weights have no zero: pruning the same layer is refused by name before the first batch, in any order."""

from __future__ import annotations

import itertools
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import GradualPruning, IncompatibleCallbacks, QuantizationAwareTraining
from lightning_compress.quantization.lowbit import Binary, Ternary


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.more, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.batches = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.batches += 1
        return self.head(torch.relu(self.more(torch.relu(self.body(batch[0]))))).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module: Net, callbacks: Any) -> None:
    torch.manual_seed(0)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(80, 4)), batch_size=8))


def test_binary_and_pruning_on_one_layer_are_refused_before_the_first_batch() -> None:
    callbacks = [GradualPruning(0.5), QuantizationAwareTraining(per_layer={"more": (Binary(), 8)})]
    for order in itertools.permutations(callbacks):
        module = Net()
        with pytest.raises(IncompatibleCallbacks, match=r"GradualPruning prunes more\.weight.*Binary.*'more' Ternary"):
            fit(module, order)
        assert module.batches == 0


@pytest.mark.parametrize(
    "callbacks",
    [
        (GradualPruning(0.5, exclude=["more"]), QuantizationAwareTraining(per_layer={"more": (Binary(), 8)})),
        (GradualPruning(0.5), QuantizationAwareTraining(Ternary())),
    ],
)
def test_other_layers_and_other_grids_are_not(callbacks: Any) -> None:
    module = Net()
    fit(module, callbacks)
    assert module.batches == 10

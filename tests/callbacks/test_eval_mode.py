"""Hugging Face's `from_pretrained` gives eval mode, and Lightning trains in it: compression must work all the same."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import GradualPruning, QuantizationAwareTraining


class FineTuned(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU()).eval()
        self.head = nn.Linear(8, 2)

    def training_step(self, batch):
        return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def validation_step(self, batch):
        self.head(self.body(1000 * batch[0]))  # must leave no mark on the ranges

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:Found 3 module")
def test_a_body_in_eval_mode_is_pruned_and_quantized():
    L.seed_everything(0, verbose=False)
    values = torch.rand(40, 4)
    rows = DataLoader(TensorDataset(values, values[:, 0].gt(0.5).long()), batch_size=4)
    quantization, net = QuantizationAwareTraining(), FineTuned()
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[GradualPruning(0.5), quantization], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(net, rows, rows)
    assert not net.body.training
    assert list(quantization.ranges()) == ["body.0"]
    assert 0.9 < quantization.ranges()["body.0"].high <= 1.0  # inputs are uniform in [0, 1)
    assert int((net.body[0].weight == 0).sum()) == 16

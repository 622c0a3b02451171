"""The README's table on Lightning's ModelPruning: each behaviour is reproduced, beside ours, on its version."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import GradualPruning

pytestmark = pytest.mark.skipif(L.__version__ != "2.6.6", reason="the README speaks of lightning 2.6.6")
Change = Callable[[], L.Callback]


class Net(L.LightningModule):
    def __init__(self, *, mask: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 3)
        if mask:
            self.register_buffer("causal_mask", torch.ones(3, 3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def lightnings(amount: float = 0.5, **options: bool) -> ModelPruning:
    return ModelPruning("l1_unstructured", amount=amount, **{"use_lottery_ticket_hypothesis": False, **options})


def trained(net: Net, *callbacks: L.Callback, epochs: int, resume: Path | None = None) -> L.Trainer:
    inputs = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(dim=1)), batch_size=32)
    trainer.fit(net, data, ckpt_path=resume, weights_only=False if resume else None)
    return trainer


def sparsity(module: nn.Module, suffix: str = "weight") -> float:
    tensors = [tensor for name, tensor in module.state_dict().items() if name.endswith(suffix)]
    return sum(int((tensor == 0).sum()) for tensor in tensors) / sum(tensor.numel() for tensor in tensors)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_resuming_loses_its_masks_and_keeps_ours(tmp_path: Path) -> None:
    saved = tmp_path / "saved.ckpt"
    trained(Net(), lightnings(), epochs=1).save_checkpoint(saved)
    resumed = Net()
    trained(resumed, lightnings(apply_pruning=False), epochs=3, resume=saved)
    assert sparsity(resumed) < 0.01

    trained(Net(), GradualPruning(0.5, window=(1, 7)), epochs=1).save_checkpoint(saved)
    resumed = Net()
    trained(resumed, GradualPruning(0.5, window=(1, 7)), epochs=3, resume=saved)
    assert sparsity(resumed.body) == 0.5


def test_a_buffer_named_mask_stops_its_checkpoints_and_not_ours(tmp_path: Path) -> None:
    trainer = trained(Net(mask=True), lightnings(), epochs=1)
    with pytest.raises(KeyError, match="causal_orig"):
        trainer.save_checkpoint(tmp_path / "its.ckpt")
    trained(Net(mask=True), GradualPruning(0.5), epochs=2).save_checkpoint(tmp_path / "ours.ckpt")


def test_its_amount_compounds_and_ours_does_not() -> None:
    net = Net()
    trained(net, lightnings(0.3), epochs=4)
    assert sparsity(net, "") == pytest.approx(0.76, abs=0.01)
    net = Net()
    trained(net, GradualPruning(0.3), epochs=4)
    assert sparsity(net.body) == pytest.approx(0.3, abs=1e-4)


def test_it_prunes_biases_and_the_head_and_we_do_not() -> None:
    net = Net()
    trained(net, lightnings(0.5), epochs=1)
    assert sparsity(net, "bias") > 0.3
    assert sparsity(net.head) > 0.3
    net = Net()
    trained(net, GradualPruning(0.5), epochs=1)
    assert sparsity(net, "bias") == sparsity(net.head) == 0.0


def test_its_default_takes_the_kept_weights_back_to_the_start() -> None:
    net = Net()
    start = net.body[0].weight.detach().clone()
    trained(net, ModelPruning("l1_unstructured", amount=0.5), epochs=1)
    kept = net.body[0].weight != 0
    assert torch.equal(net.body[0].weight[kept], start[kept])
    net = Net()
    start = net.body[0].weight.detach().clone()
    trained(net, GradualPruning(0.5), epochs=1)
    kept = net.body[0].weight != 0
    assert not torch.equal(net.body[0].weight[kept], start[kept])


@pytest.mark.parametrize(
    "average", [lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=1), WeightAveraging], ids=["SWA", "WA"]
)
def test_weight_averaging_fills_its_zeros_and_not_ours(average: Change) -> None:
    net = Net()
    trained(net, lightnings(), average(), epochs=4)
    assert sparsity(net) == 0.0
    net = Net()
    trained(net, GradualPruning(0.5), average(), epochs=4)
    assert sparsity(net.body) == 0.5

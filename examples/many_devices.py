"""A dense net, then the same net pruned, rounded and taught, on as many devices as there are (FSDP2).

torchrun --nproc-per-node 8 examples/many_devices.py --accelerator gpu
srun python examples/many_devices.py --accelerator gpu --processes 8 --nodes 2
python examples/many_devices.py --processes 2            # two processes of this CPU, which Lightning starts itself

Each process holds a part of every weight. The checkpoint is whole, so that one process reads it without a strategy.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_compress import Distillation, GradualPruning, QuantizationAwareTraining
from lightning_compress.demo_data import load_fashion_mnist

BATCH = 64  # of all processes together


class Block(nn.Module):
    """What is gathered at a time: its weights are whole while it computes, and in parts otherwise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, value: Tensor) -> Tensor:
        return value + self.down(torch.relu(self.up(self.norm(value))))


class Classifier(L.LightningModule):
    def __init__(self, width: int = 128, blocks: int = 2, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        body = [Block(width) for _ in range(blocks)]
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, width), *body, nn.LayerNorm(width))
        self.head = nn.Linear(width, 10)

    def configure_model(self) -> None:
        """Take this process's part of each weight. Lightning calls it at each fit; without a mesh nothing is taken."""
        mesh = self.device_mesh
        if mesh is None or any(hasattr(parameter, "device_mesh") for parameter in self.parameters()):
            return
        for part in [*(m for m in self.model if isinstance(m, (Block, nn.Linear))), self.model, self.head]:
            fully_shard(part, mesh=mesh["data_parallel"])

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.model(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.hparams["learning_rate"])

    def train_dataloader(self) -> DataLoader:  # Lightning gives each process its share of the images
        return DataLoader(load_fashion_mnist()[0], BATCH // self.trainer.world_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(load_fashion_mnist()[1], batch_size=250)


def recipe(teacher: Path) -> list[L.Callback]:
    """The same callbacks as on one device: each process makes its part of the same masks."""
    return [GradualPruning(0.9), QuantizationAwareTraining(), Distillation(str(teacher))]


def fit(module: Classifier, callbacks: list[L.Callback], options: argparse.Namespace, path: Path) -> None:
    trainer = L.Trainer(
        strategy=ModelParallelStrategy(
            data_parallel_size=options.processes * options.nodes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,  # one file with whole weights
        ),
        accelerator=options.accelerator,
        devices=options.processes,
        num_nodes=options.nodes,
        max_epochs=options.epochs,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=callbacks,
    )
    trainer.fit(module)
    trainer.save_checkpoint(path)  # every process gives its part


def evaluate(module: Classifier, *callbacks: L.Callback, path: Path | None = None) -> float:
    """Accuracy on one process; with callbacks and their checkpoint, of the net with rounded weights and inputs."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    alone = L.Trainer(
        accelerator="cpu", devices=1, plugins=[LightningEnvironment()], callbacks=list(callbacks), **quiet
    )
    return alone.validate(module, ckpt_path=path, verbose=False)[0]["accuracy"]


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--processes", type=int, default=int(os.environ.get("LOCAL_WORLD_SIZE", 2)), help="on a node")
    parser.add_argument("--nodes", type=int, default=int(os.environ.get("GROUP_WORLD_SIZE", 1)))
    parser.add_argument("--epochs", type=int, default=8, help="of the dense net, and again with the callbacks")
    parser.add_argument("--output", type=Path, default=Path("outputs/many_devices"), help="seen by all nodes")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    dense, small = options.output / "dense.ckpt", options.output / "compressed.ckpt"

    L.seed_everything(0)  # all processes start from the same weights, or setup refuses
    fit(Classifier(), [], options, dense)
    fit(Classifier.load_from_checkpoint(dense, map_location="cpu"), recipe(dense), options, small)

    rank = torch.distributed.get_rank()
    torch.distributed.destroy_process_group()
    if rank != 0:
        return {}
    # From here on one process, without a strategy: plain Lightning reads the files.
    loaded = Classifier.load_from_checkpoint(small, map_location="cpu")
    pruned = [layer.weight for layer in loaded.model.modules() if isinstance(layer, nn.Linear)]
    found = {
        "sparsity": sum(int((weight == 0).sum()) for weight in pruned) / sum(weight.numel() for weight in pruned),
        "accuracy, dense": evaluate(Classifier.load_from_checkpoint(dense, map_location="cpu")),
        "accuracy, zeros": evaluate(loaded),
        "accuracy, zeros and int8": evaluate(loaded, *recipe(dense), path=small),
    }
    for name, value in found.items():
        print(f"{name}: {value:.1%}")
    return found


if __name__ == "__main__":
    main()

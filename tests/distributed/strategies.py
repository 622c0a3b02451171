"""Every strategy that a CPU can run, by name, and a module that each can shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import lightning.pytorch as L
import torch
from lightning.fabric.strategies.fsdp import _move_torchmetrics_to_device
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, TensorDataset

EXAMPLES, BATCH, INPUTS, CLASSES = 64, 16, 8, 4


class OnCPU(FSDPStrategy):
    """FSDP1 with gloo, for tests alone: Lightning refuses its own class on a CPU, and torch a missing accelerator."""

    def _setup_model(self, model: nn.Module) -> FullyShardedDataParallel:
        wrapped = FullyShardedDataParallel(
            model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )
        _move_torchmetrics_to_device(wrapped, self.root_device)
        self.model = wrapped
        return wrapped

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        # Moving a full state from the CPU to the CPU crashes torch.
        from torch.distributed import fsdp
        from torch.distributed.fsdp import api

        def staying(config: Any) -> Any:
            return lambda *args, **options: config(*args, **{**options, "offload_to_cpu": False})

        with (
            patch.object(fsdp, "FullStateDictConfig", staying(fsdp.FullStateDictConfig)),
            patch.object(api, "FullOptimStateDictConfig", staying(api.FullOptimStateDictConfig)),
        ):
            yield

    def lightning_module_state_dict(self) -> dict[str, Any]:
        with self._in_place():
            return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Tensor]:
        with self._in_place():
            return super().optimizer_state(optimizer)

    def load_checkpoint(self, *args: Any, **options: Any) -> dict[str, Any]:
        with self._in_place():
            return super().load_checkpoint(*args, **options)


def _meshed(data: int, tensor: int, pieces: bool = False) -> Strategy:
    return ModelParallelStrategy(data, tensor, save_distributed_checkpoint=pieces, process_group_backend="gloo")


# Name -> for a number of processes.
STRATEGIES: dict[str, Callable[[int], Strategy]] = {
    "ddp": lambda world: DDPStrategy(process_group_backend="gloo"),
    "ddp-static": lambda world: DDPStrategy(process_group_backend="gloo", static_graph=True),
    "ddp-unused": lambda world: DDPStrategy(process_group_backend="gloo", find_unused_parameters=True),
    "fsdp1": lambda world: OnCPU(process_group_backend="gloo", auto_wrap_policy={nn.Sequential}),
    "fsdp1-zero2": lambda world: OnCPU(process_group_backend="gloo", sharding_strategy="SHARD_GRAD_OP"),
    "fsdp1-sharded-file": lambda world: OnCPU(process_group_backend="gloo", state_dict_type="sharded"),
    "fsdp2": lambda world: _meshed(world, 1),
    "fsdp2-sharded-file": lambda world: _meshed(world, 1, pieces=True),
    "tp": lambda world: _meshed(1, world),
    "fsdp2-tp": lambda world: _meshed(world // 2, 2),
}


def rows(examples: int = EXAMPLES) -> TensorDataset:
    inputs = torch.randn(examples, INPUTS, generator=torch.Generator().manual_seed(3))
    return TensorDataset(inputs, inputs[:, :CLASSES].argmax(dim=1))


class Share(Sampler[list[int]]):
    """One process's rows of each batch; knows its place, so that a run resumed in an epoch sees the rest of it."""

    def __init__(self, rank: int, replicas: int) -> None:
        self.rank, self.replicas, self.place = rank, replicas, 0

    def __len__(self) -> int:
        return EXAMPLES // BATCH

    def __iter__(self) -> Iterator[list[int]]:
        if self.place == len(self):
            self.place = 0
        while self.place < len(self):
            self.place += 1
            yield list(range((self.place - 1) * BATCH + self.rank, self.place * BATCH, self.replicas))


class Resumable(DataLoader[Any]):
    """A loader whose place Lightning saves."""

    def state_dict(self) -> dict[str, int]:
        return {"place": self.batch_sampler.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batch_sampler.place = state["place"]


class Block(nn.Module):
    """Two layers of a size that no number of processes divides, and a residual."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(INPUTS, inner), nn.Linear(inner, INPUTS)

    def forward(self, value: Tensor) -> Tensor:
        return value + self.down(torch.relu(self.up(value)))


class Shardable(L.LightningModule):
    """A module as users of FSDP2 and tensor parallel write it; under other strategies it is a plain one."""

    inner = 22  # tensor parallel needs a multiple of its size

    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.learning_rate = learning_rate
        self.model = nn.Sequential(Block(self.inner), Block(self.inner), nn.Linear(INPUTS, CLASSES))

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is None or any(type(p).__name__ == "DTensor" for p in self.parameters()):
            return
        if mesh["tensor_parallel"].size() > 1:
            for block in (self.model[0], self.model[1]):
                plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(block, mesh["tensor_parallel"], plan)
        if mesh["data_parallel"].size() > 1:
            for part in self.model:
                fully_shard(part, mesh=mesh["data_parallel"])
            fully_shard(self.model, mesh=mesh["data_parallel"])

    def forward(self, value: Tensor) -> Tensor:
        return self.model(value)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)

    def train_dataloader(self) -> DataLoader[Any]:
        share = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None) or {"rank": 0, "num_replicas": 1}
        # Its own generator: an iterator otherwise draws from the global one.
        return Resumable(rows(), batch_sampler=Share(share["rank"], share["num_replicas"]), generator=torch.Generator())

"""The first column of the matrix on one GPU with NCCL: each technique under each strategy ends as without one."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from tests.distributed import launching, recipes

STRATEGIES = {
    "ddp": lambda: DDPStrategy(process_group_backend="nccl"),
    "fsdp1": lambda: FSDPStrategy(auto_wrap_policy={nn.Sequential}),
    "fsdp2": lambda: ModelParallelStrategy(1, 1, save_distributed_checkpoint=False),
}
TECHNIQUES = ("pruning", "structured", "quantization", "distillation", "all")


def work(rank: int, world: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    return {
        f"{strategy}-{technique}": recipes.fit(technique, STRATEGIES[strategy](), world, accelerator="gpu")
        for strategy, technique in product(STRATEGIES, TECHNIQUES)
    }


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and NCCL")
def test_one_gpu_with_nccl_ends_as_without_a_strategy(tmp_path: Path) -> None:
    (found,) = launching.run(__name__, 1, tmp_path)
    for strategy, technique in product(STRATEGIES, TECHNIQUES):
        recipes.check_equal(found[f"{strategy}-{technique}"], recipes.fit(technique, accelerator="gpu"))

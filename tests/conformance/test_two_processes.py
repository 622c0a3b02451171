"""Two processes under DDP make the masks, ranges and weights that one process makes of the same batches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance.cases import ROWS, Row, promise
from tests.conformance.modules import BATCH, Manual, Small
from tests.conformance.running import Run, build, train

ROOT = Path(__file__).parents[2]
WORLD = 2


def options(processes: int) -> dict[str, Any]:
    # No dropout and no batch norm: they see only their own half of a batch.
    plain = {"dropout": 0.0, "norm": False, "optimizer": "momentum", "shuffle": False}
    return {**plain, "batch": BATCH // processes}


def result(row: Row, kind: type[Small], processes: int, folder: Path) -> dict[str, Tensor]:
    from lightning.pytorch.strategies import DDPStrategy

    module = build(kind, **options(processes))
    parallel = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": processes} if processes > 1 else {}
    run: Run = train(module, row.make(module), folder, **parallel)
    row.acted(run)
    return {**run.weights, **{f"memory {name}": value for name, value in row.memory(run).items()}}


def every_result(processes: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    pairs = [(row, kind) for row in ROWS for kind in (Small, Manual)]
    return {f"{row.name}-{kind.__name__}": result(row, kind, processes, folder) for row, kind in pairs}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.save(every_result(WORLD, folder), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """Every row in turn, in one launch of two processes."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD), "NODE_RANK": "0"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.conformance.test_two_processes", str(folder)]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **shared, "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    texts = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(texts)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.distributed
@pytest.mark.parametrize("kind", [Small, Manual], ids=lambda kind: kind.__name__)
@promise("two processes equal one")
def test_two_processes_equal_one(row: Row, kind: type[Small], two_ranks: Any, tmp_path: Path) -> None:
    one = result(row, kind, 1, tmp_path)
    first, second = (rank[f"{row.name}-{kind.__name__}"] for rank in two_ranks)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first.keys() == one.keys()
    for name, value in one.items():
        if value.dtype == torch.bool:
            assert torch.equal(first[name], value), name
        else:
            torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    work(int(os.environ["LOCAL_RANK"]), Path(sys.argv[1]))

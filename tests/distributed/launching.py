"""Run a test module's `work(rank, world, folder)` in several gloo processes, as torchrun would start them."""

from __future__ import annotations

import fcntl
import importlib
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOADED = ["lightning.pytorch", "torch.distributed.fsdp", "torch.distributed.tensor", "lightning_compress"]
# Forks of one process that has imported everything: a run of two starts in a second.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(PRELOADED)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _child(module: str, rank: int, world: int, port: int, folder: Path, arguments: tuple[str, ...]) -> None:
    import warnings

    import torch

    text = os.open(folder / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(text, 1)
    os.dup2(text, 2)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "NODE_RANK": "0"}
    os.environ.update({**shared, "LOCAL_RANK": str(rank), "RANK": str(rank)})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        result = importlib.import_module(module).work(rank, world, folder, *arguments)
        torch.save(result, folder / f"rank{rank}.pt")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException:  # noqa: BLE001 - the exit code says it
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # the others may never come to where this process would say goodbye


def start(module: str, world: int, folder: Path, *arguments: str) -> list[BaseProcess]:
    """Start the processes; each writes what it prints into a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = [
        FORKS.Process(target=_child, args=(module, rank, world, port, folder, arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    return list(processes)


def printed(folder: Path, world: int) -> str:
    return "\n".join((folder / f"rank{rank}.txt").read_text() for rank in range(world))


def ended(processes: Iterable[BaseProcess], timeout_s: float) -> list[int | None]:
    """Wait for all, then end those that hang; return the exit codes, None for these."""
    codes = []
    for process in processes:
        process.join(timeout_s)
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes


def run(module: str, world: int, folder: Path, *arguments: str, timeout_s: float = 300) -> list[Any]:
    """Run the processes to their end, and return what each `work` has returned."""
    codes = ended(start(module, world, folder, *arguments), timeout_s)
    assert codes == [0] * world, printed(folder, world)
    return results(folder, world)


def once(factory: Any, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that `make` has filled: one pytest worker does, and the others wait for it."""
    root = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    folder = root / name
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (folder / "done").touch()
    return folder


def results(folder: Path, world: int) -> list[Any]:
    """Return what each process has left."""
    import torch

    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]

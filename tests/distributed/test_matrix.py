"""Each technique under each strategy that a CPU can run: trained, resumed, and resumed on another number of processes.

What a CPU cannot run: FSDP1 is run through a subclass of Lightning's strategy, which refuses a CPU by name; DeepSpeed
and NCCL need an accelerator. DeepSpeed is refused by name (tests/callbacks/test_contract.py).
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import launching, recipes

WHOLE_FILE = ("ddp", "fsdp1", "fsdp2", "tp")
PIECES_OF_FILE = ("fsdp1-sharded-file", "fsdp2-sharded-file")
MORE = ("ddp-static", "ddp-unused", "fsdp1-zero2")
CELLS = [
    *product(WHOLE_FILE, ("pruning", "structured", "quantization", "distillation", "all")),
    *product(("ddp", "fsdp1", "fsdp2"), ("wanda", "movement", "learned", "starting model", "factored")),
    *product(PIECES_OF_FILE, ("pruning", "structured", "all")),
    *product(MORE, ("all",)),
]
HALVES = [
    ("fsdp1", "bf16-mixed"),
    ("fsdp1", "bf16-true"),
    ("fsdp2", "bf16-mixed"),
    ("fsdp2", "bf16-true"),
    ("tp", "bf16-true"),
]
Cells = dict[str, dict[str, Tensor]]
ONE = "one.pt"


def goes_on(cell: tuple[str, str]) -> bool:
    """Whether a checkpoint of one process can be resumed: layers that are two cannot be cut into parts by then."""
    return cell[0] not in PIECES_OF_FILE and (cell[1] != "factored" or cell[0] == "ddp")


def name_of(cell: tuple[str, str]) -> str:
    return "-".join(cell)


def work(rank: int, world: int, folder: Path, cells: str = "") -> Cells:
    results: Cells = {}
    for strategy, technique in CELLS if not cells else [tuple(each.split("/")) for each in cells.split()]:
        own = folder / f"{strategy}-{technique}.ckpt"
        results[f"{strategy}-{technique}"] = recipes.fit(technique, strategy, world, save=own)
        results[f"{strategy}-{technique} resumed"] = recipes.fit(technique, strategy, world, resume=own)
        if goes_on((strategy, technique)):
            other = folder / f"one-{technique}.ckpt"
            results[f"{strategy}-{technique} from one"] = recipes.fit(technique, strategy, world, resume=other)
    for strategy, precision in HALVES if not cells else []:
        own = folder / f"{strategy}-{precision}.ckpt"
        results[f"{strategy}-{precision}"] = recipes.fit("all", strategy, world, own, precision=precision)
        results[f"{strategy}-{precision} resumed"] = recipes.fit(
            "all", strategy, world, resume=own, precision=precision
        )
    return results


def run_all(folder: Path) -> None:
    """Each technique on one process, with a checkpoint of its middle; then each cell on two."""
    torch.save({name: recipes.fit(name, save=folder / f"one-{name}.ckpt") for name in recipes.TECHNIQUES}, folder / ONE)
    launching.run(__name__, 2, folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cells]:
    folder = launching.once(tmp_path_factory, "matrix", run_all)
    return folder, torch.load(folder / ONE, weights_only=True)


@pytest.fixture(scope="module")
def two(one: tuple[Path, Cells]) -> list[Cells]:
    return launching.results(one[0], 2)


@pytest.mark.distributed
@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_two_processes_end_as_one_does(cell: tuple[str, str], one: Any, two: list[Cells]) -> None:
    for rank in two:
        recipes.check_equal(rank[name_of(cell)], one[1][cell[1]])


@pytest.mark.distributed
@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_a_resumed_run_ends_as_an_uninterrupted_one(cell: tuple[str, str], two: list[Cells]) -> None:
    for rank in two:
        found, whole = rank[f"{name_of(cell)} resumed"], rank[name_of(cell)]
        assert recipes.check_equal(found, whole) == 0.0


@pytest.mark.distributed
@pytest.mark.parametrize("cell", [cell for cell in CELLS if goes_on(cell)], ids=name_of)
def test_a_run_of_one_process_goes_on_in_two(cell: tuple[str, str], one: Any, two: list[Cells]) -> None:
    for rank in two:
        recipes.check_equal(rank[f"{name_of(cell)} from one"], one[1][cell[1]])


@pytest.mark.distributed
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell[0] not in PIECES_OF_FILE], ids=name_of)
def test_a_run_of_two_processes_goes_on_in_one(cell: tuple[str, str], one: Any, two: list[Cells]) -> None:
    strategy, technique = cell
    recipes.check_equal(recipes.fit(technique, resume=one[0] / f"{strategy}-{technique}.ckpt"), one[1][technique])


@pytest.mark.distributed
def test_four_processes_in_two_dimensions(one: Any, tmp_path: Path) -> None:
    """FSDP2 and tensor parallel at once, and a run of one process that goes on in four."""
    for path in one[0].glob("one-*.ckpt"):
        (tmp_path / path.name).symlink_to(path)
    four = launching.run(__name__, 4, tmp_path, "fsdp2-tp/pruning fsdp2-tp/all fsdp2-tp/structured fsdp2/pruning")
    for rank in four:
        for name, found in four[0].items():
            technique = name.split()[0].split("-")[-1]
            recipes.check_equal(rank[name], one[1][technique])
            assert found.keys() == rank[name].keys()


@pytest.mark.distributed
@pytest.mark.parametrize("cell", HALVES, ids=name_of)
def test_in_half_precision_the_sparsity_is_exact_and_a_resume_too(cell: tuple[str, str], two: list[Cells]) -> None:
    first, second = (rank[name_of(cell)] for rank in two)
    assert recipes.check_equal(first, second) == 0.0
    assert recipes.check_equal(two[0][f"{name_of(cell)} resumed"], first) == 0.0
    names = [name.removeprefix("mask ") for name in first if name.startswith("mask")]
    zeros = sum(int((first[name] == 0).sum()) for name in names)
    assert zeros == round(0.7 * sum(first[name].numel() for name in names))

"""Each technique under each strategy that a CPU can run: trained, resumed, and resumed on another number of processes.

What a CPU cannot run: FSDP1 is run through a subclass of Lightning's strategy, which refuses a CPU by name; DeepSpeed
and NCCL need an accelerator. DeepSpeed is refused by name (tests/callbacks/test_contract.py).
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.distributed import launching, recipes

WHOLE_FILE = ("ddp", "fsdp1", "fsdp2", "tp")
PIECES_OF_FILE = ("fsdp1-sharded-file", "fsdp2-sharded-file")
MORE = ("ddp-static", "ddp-unused", "fsdp1-zero2")
CELLS = [
    *product(WHOLE_FILE, ("pruning", "structured", "quantization", "distillation", "all")),
    *product(("ddp", "fsdp1", "fsdp2"), ("wanda", "movement", "learned")),
    *product(PIECES_OF_FILE, ("pruning", "structured", "all")),
    *product(MORE, ("all",)),
]
Cells = dict[str, dict[str, Tensor]]


def name_of(cell: tuple[str, str]) -> str:
    return "-".join(cell)


def work(rank: int, world: int, folder: Path, cells: str = "") -> Cells:
    results: Cells = {}
    for strategy, technique in CELLS if not cells else [tuple(each.split("/")) for each in cells.split()]:
        own = folder / f"{strategy}-{technique}.ckpt"
        results[f"{strategy}-{technique}"] = recipes.fit(technique, strategy, world, save=own)
        results[f"{strategy}-{technique} resumed"] = recipes.fit(technique, strategy, world, resume=own)
        if strategy not in PIECES_OF_FILE:
            other = folder / f"one-{technique}.ckpt"
            results[f"{strategy}-{technique} from one"] = recipes.fit(technique, strategy, world, resume=other)
    return results


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cells]:
    """Each technique on one process, with a checkpoint of its middle."""
    folder = tmp_path_factory.mktemp("matrix")
    return folder, {name: recipes.fit(name, save=folder / f"one-{name}.ckpt") for name in recipes.TECHNIQUES}


@pytest.fixture(scope="module")
def two(one: tuple[Path, Cells]) -> list[Cells]:
    return launching.run(__name__, 2, one[0])


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
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell[0] not in PIECES_OF_FILE], ids=name_of)
def test_a_run_of_one_process_goes_on_in_two(cell: tuple[str, str], one: Any, two: list[Cells]) -> None:
    for rank in two:
        recipes.check_equal(rank[f"{name_of(cell)} from one"], one[1][cell[1]])


@pytest.mark.distributed
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell[0] not in PIECES_OF_FILE], ids=name_of)
def test_a_run_of_two_processes_goes_on_in_one(cell: tuple[str, str], one: Any, two: list[Cells]) -> None:
    strategy, technique = cell
    recipes.check_equal(recipes.fit(technique, resume=one[0] / f"{strategy}-{technique}.ckpt"), one[1][technique])


@pytest.mark.distributed
def test_four_processes_in_two_dimensions(one: Any) -> None:
    """FSDP2 and tensor parallel at once, and a run of one process that goes on in four."""
    four = launching.run(__name__, 4, one[0], "fsdp2-tp/pruning fsdp2-tp/all fsdp2-tp/structured fsdp2/pruning")
    for rank in four:
        for name, found in four[0].items():
            technique = name.split()[0].split("-")[-1]
            recipes.check_equal(rank[name], one[1][technique])
            assert found.keys() == rank[name].keys()

"""The table of grids in the docs names every grid, what it learns, where it is and whether integers can hold it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from lightning_compress.quantization import clustered, dorefa, formats, learned_steps, levels, lowbit, noise, ranges
from lightning_compress.quantization.attach import FakeQuant
from lightning_compress.quantization.weights import Symmetric

TABLE = Path(__file__).parents[2] / "docs" / "quantization_grids.md"
ROOMS = (learned_steps, dorefa, lowbit, formats, levels, clustered)
LOW, HIGH = torch.tensor(0.0), torch.tensor(2.0)


def rows_of(heading):
    section = TABLE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {cells[0].strip().strip("`"): [cell.strip() for cell in cells[1:]] for cells in lines}


def grids(method):
    """Classes of the rooms that have a method, by name."""
    found = {name: getattr(room, name) for room in ROOMS for name in room.__all__}
    return {name: value for name, value in found.items() if isinstance(value, type) and hasattr(value, method)}


def room_of(cell):
    return importlib.import_module(f"lightning_compress.quantization.{cell.strip('`')}")


def learned_cell(learned):
    return ", ".join(f"`{name}`" for name in learned) or "nothing"


@pytest.mark.parametrize(("heading", "method"), [("Weights", "codes"), ("Inputs", "affine")])
def test_every_grid_has_its_row(heading, method):
    assert set(rows_of(heading)) == set(grids(method))


@pytest.mark.parametrize(("name", "cells"), rows_of("Weights").items(), ids=rows_of("Weights"))
def test_what_a_row_of_weights_says(name, cells):
    grid, weight = getattr(room_of(cells[0]), name)(), torch.randn(4, 8)
    learned = grid.learned(weight)
    assert cells[2] == learned_cell(learned)
    assert (grid.codes(weight, learned) is None) == (cells[3] == "no")
    assert " et al. " in cells[4]
    assert FakeQuant(weights=grid).range.weight_grid == grid
    weight[:, ::2] = 0.0
    kept = bool((grid.rounded(weight, learned)[:, ::2] == 0).all())
    assert kept == (name != "Binary")


@pytest.mark.parametrize(("name", "cells"), rows_of("Inputs").items(), ids=rows_of("Inputs"))
def test_what_a_row_of_inputs_says(name, cells):
    kind = getattr(room_of(cells[0]), name)
    learned = kind().learned(LOW, HIGH)
    assert cells[2] == learned_cell(learned)
    assert (kind().affine(LOW, HIGH, learned) is None) == (cells[3] == "no")
    assert FakeQuant(inputs=kind()).range.input_grid == kind()
    assert kind().rounded(torch.zeros(3), LOW, HIGH, learned).tolist() == [0.0] * 3
    assert " et al. " in cells[4]


def test_levels_observers_and_noise():
    assert set(rows_of("Levels of your own")) == {name for name in levels.__all__ if name.endswith("_levels")}
    rules = {name for name in ranges.__all__ if name[0].islower()} - {"check_rule", "range_by", "reads_counts"}
    assert set(rows_of("Observers")) == rules
    for name, cells in rows_of("Observers").items():
        assert hasattr(room_of(cells[0]), name)
    assert set(rows_of("Noise")) == set(noise.__all__) - {"NO_NOISE"}


@pytest.mark.parametrize("grid", [Symmetric(4), Symmetric(group="tensor"), Symmetric(4, group=4)])
def test_a_range_keeps_the_group_of_a_symmetric_grid(grid):
    assert FakeQuant(weights=grid).range.weight_grid == grid

"""The masks of one process and of two, three and four are the same to the bit, over random shapes and ties."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_compress.parts import Part
from lightning_compress.pruning import criteria
from lightning_compress.pruning.patterns import NM, Blocks, Columns, Heads, Kernels, Rows, Unstructured
from lightning_compress.pruning.scopes import by_output, erk, lamp, uniform
from lightning_compress.pruning.targets import Target
from lightning_compress.sharding import complete_part, local, parts_of, whole
from tests.distributed import launching

CASES = 39
PATTERNS: list[Callable[..., Any]] = [
    Unstructured(), Unstructured(), Unstructured(uniform), Unstructured(erk), Unstructured(lamp),
    Unstructured(by_output), NM(2, 4), NM(1, 4), Rows(), Columns(), Kernels(), Blocks(2, 4), Heads(2),
]  # fmt: skip


def weights_of(case: int) -> dict[str, Tensor]:
    """A few weights whose outputs no number of processes has to divide; in every second case most scores are tied."""
    source = torch.Generator().manual_seed(case)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=source))

    dtype = (torch.float32, torch.float32, torch.bfloat16, torch.float64)[case % 4]
    weights = {}
    for index in range(number(1, 5)):
        shape = (2 * number(1, 9), 4 * number(1, 5), *((3, 3) if number(0, 3) == 0 else ()))
        values = torch.randn(shape, generator=source)
        weights[f"layer{index}.weight"] = (values.mul(2).round() if case % 2 else values).to(dtype)
    return weights


def layer_for(weight: Tensor) -> nn.Module:
    rows, columns = weight.shape[:2]
    return nn.Linear(columns, rows) if weight.dim() == 2 else nn.Conv2d(columns, rows, 3)


def masks_of(case: int, pieces: dict[str, Tensor], parts: dict[str, Part], shapes: dict[str, Tensor]) -> list[Tensor]:
    pattern = PATTERNS[case % len(PATTERNS)]
    final = 1 - pattern.keep / pattern.of if isinstance(pattern, NM) else 0.6
    sparsity = final if case % 3 else 0.4
    criterion = (criteria.magnitude, criteria.magnitude, criteria.random, criteria.geometric_median)[case % 4]
    targets = [
        Target(name, piece, layer_for(shapes[name]), None, criterion, widen=criterion is not criteria.magnitude,
               part=parts.get(name))
        for name, piece in pieces.items()
    ]  # fmt: skip
    masks, _ = pattern(targets, sparsity, 1.0)
    return list(masks)


def slices(weights: dict[str, Tensor], rank: int, world: int, case: int) -> tuple[dict[str, Tensor], dict[str, Part]]:
    """Consecutive slices of all weights in a row, as FSDP1 has them: cut anywhere, and empty here and there."""
    total = sum(weight.numel() for weight in weights.values())
    source = torch.Generator().manual_seed(1000 + case)
    inner = torch.randint(0, total + 1, (world - 1,), generator=source).sort().values.tolist()
    begin, end = [0, *inner, total][rank : rank + 2]
    pieces, parts, place = {}, {}, 0
    for name, weight in weights.items():
        first, last = (min(max(edge - place, 0), weight.numel()) for edge in (begin, end))
        pieces[name] = weight.flatten()[first:last].clone()
        parts[name] = Part(weight.shape, (first,), pieces[name].shape)
        place += weight.numel()
    return pieces, parts


def boxes(weights: dict[str, Tensor], placements: list[Any], mesh: Any) -> tuple[dict[str, Tensor], dict[str, Part]]:
    whole_ones = {name: nn.Parameter(distribute_tensor(w, mesh, placements)) for name, w in weights.items()}
    return {name: local(weight) for name, weight in whole_ones.items()}, parts_of(nn.Module(), whole_ones)


def mixture(weights: dict[str, Tensor], mesh: Any) -> tuple[dict[str, Tensor], dict[str, Part]]:
    """Every second weight stays whole on each process, as what a user of tensor parallelism leaves out."""
    pieces, parts = boxes(weights, [Shard(1)], mesh)
    for name in list(weights)[1::2]:
        pieces[name], parts[name] = weights[name], complete_part(weights[name].shape)
    return pieces, parts


def work(rank: int, world: int, folder: Path) -> dict[str, list[str]]:
    dist.init_process_group("gloo")
    line = init_device_mesh("cpu", (world,))
    cuts: dict[str, Callable[[int, dict[str, Tensor]], Any]] = {
        "slices": lambda case, weights: slices(weights, rank, world, case),
        "rows": lambda case, weights: boxes(weights, [Shard(0)], line),
        "columns": lambda case, weights: boxes(weights, [Shard(1)], line),
        "mixture": lambda case, weights: mixture(weights, line),
    }
    if world == 4:
        square = init_device_mesh("cpu", (2, 2))
        cuts["rows and columns"] = lambda case, weights: boxes(weights, [Shard(0), Shard(1)], square)
        cuts["rows twice"] = lambda case, weights: boxes(weights, [Shard(0), Shard(0)], square)
        cuts["replicas"] = lambda case, weights: boxes(weights, [Replicate(), Shard(0)], square)
    differing: dict[str, list[str]] = {name: [] for name in cuts}
    for case in range(CASES):
        weights = weights_of(case)
        expected = masks_of(case, weights, {}, weights)
        for name, cut in cuts.items():
            pieces, parts = cut(case, weights)
            found = masks_of(case, pieces, parts, weights)
            for (key, mask), other in zip(zip(weights, found, strict=True), expected, strict=True):
                if not torch.equal(whole(mask, parts[key]), other):
                    differing[name].append(f"case {case}, {key}, {PATTERNS[case % len(PATTERNS)]}")
    return differing


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3, 4])
def test_masks_do_not_depend_on_how_weights_are_cut(world: int, tmp_path: Path) -> None:
    for rank in launching.run(__name__, world, tmp_path):
        assert rank == {cut: [] for cut in rank}

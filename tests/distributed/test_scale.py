"""The formulas of docs/scale.md against what real and simulated processes send, on small weights."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from benchmarks import scale
from lightning_compress import sharding
from lightning_compress.callbacks.masking import MaskKeeper
from lightning_compress.divergence import check_same
from lightning_compress.pruning.counting import BINS, kth_place, summed
from lightning_compress.pruning.criteria import magnitude
from lightning_compress.pruning.patterns import Unstructured
from lightning_compress.pruning.scopes import uniform
from lightning_compress.pruning.targets import Target, checked_scores
from lightning_compress.quantization.attach import FakeQuant
from lightning_compress.quantization.learning import LearnedValues
from lightning_compress.quantization.observers import fold_extremes
from tests.distributed import launching

SHAPES = {"a": (10, 6), "b": (7, 9), "c": (2, 5)}  # on three processes the last has no row of "c"
NUMBERS = [math.prod(shape) for shape in SHAPES.values()]

Compared = dict[str, list[Any]]  # counted or found, by formula


def setup(mesh: Any) -> tuple[MaskKeeper, Compared]:
    source, keeper, seen = torch.Generator().manual_seed(0), MaskKeeper(), []
    original = sharding.gathered_objects
    for name, shape in SHAPES.items():
        values = torch.randn(shape, generator=source).round()
        keeper.weights[name] = nn.Parameter(distribute_tensor(values, mesh, [Shard(0)]))

    def gathered(value: Any) -> list[Any]:
        seen.extend([value, original(value)])
        return seen[1]

    with patch.object(sharding, "gathered_objects", gathered):
        keeper.find_parts(nn.Module())
    by_rule = [[scale.place(shape, rank, mesh.size()) for shape in SHAPES.values()] for rank in range(mesh.size())]
    own = len(scale.places(SHAPES, mesh.size())[mesh.get_rank()])
    return keeper, {"places": [str(seen[1]), str(by_rule)], "bytes of places": [len(pickle.dumps(seen[0])), own]}


def pruned(keeper: MaskKeeper) -> Compared:
    weights = {name: sharding.local(weight) for name, weight in keeper.weights.items()}
    targets = [Target(n, w, nn.Linear(1, 1), part=keeper.parts[n]) for n, w in weights.items()]
    with scale.counting() as update:
        checked_scores(targets, 0)
        masks, _ = Unstructured()(targets, 0.3, 1.0)
        keeper.masks = dict(zip(weights, masks, strict=True))
        sparsity = keeper.sparsity()
    with scale.counting() as checkpoint:
        packed = keeper.packed()
    expected = scale.update_bytes(sum(NUMBERS), len(SHAPES), max(NUMBERS))
    return {
        "sparsity": [round(sparsity * sum(NUMBERS)), round(0.3 * sum(NUMBERS))],
        "update": [scale.size(update), sum(expected.values())],
        "sent for a checkpoint": [scale.size(checkpoint), scale.packed_bytes(SHAPES)],
        "in a checkpoint": [scale.size(list(packed.values())), scale.packed_bytes(SHAPES)],
    }


def each_step() -> Compared:
    states = [FakeQuant(extremes=torch.ones(2)) for _ in range(5)]
    learned = LearnedValues(0.01)
    for name, start in (("a", torch.ones(())), ("b", torch.ones(6))):
        learned.add(name, "weight", {"step": start})
    counted = {}
    with scale.counting() as counted["ranges"]:
        fold_extremes(states, 0.1)
    with scale.counting() as counted["guard"]:
        check_same({name: torch.ones(9) for name in "abc"}, "mask", 1)
    with scale.counting() as counted["learned"]:
        learned.step(["a", "b"])
    expected = {"ranges": 8 * 5, "guard": 16 * 3, "learned": 4 * (1 + 6 + 2)}
    return {name: [scale.size(sent), expected[name]] for name, sent in counted.items()}


def histogram(numbers: dict[int, int]) -> Tensor:
    counts = torch.zeros(BINS, dtype=torch.int64)
    for place, number in numbers.items():
        counts[place] = number
    return counts


def at_scale() -> Compared:
    """A made-up histogram of 68 billion scores, and a threshold that ties in the last place of a weight."""
    model = scale.MODELS["70 B"]
    largest, found = model.width * model.ffn, {}
    for negative in (False, True):
        expected = scale.update_bytes(model.count, len(model.selected), largest, negative)
        with scale.ranks(8), scale.counting() as sent:
            summed(histogram({BINS - 9: model.count - 5, 0 if negative else BINS - 8: 5}), -1)
            summed(histogram({7: 1000}), 1000)
            kth_place(torch.tensor([3, largest - 1]), 2)
        passes = [expected[part] for part in ("first pass", "second pass", "their places")]
        found[f"70 B, negative {negative}"] = [scale.size(sent), 16 + sum(passes)]
    return found


def simulated() -> Compared:
    shapes = {"a": (96, 80), "b": (48, 80)}
    asked = {"by": Unstructured(), "local": Unstructured(uniform)}
    sent = {what: scale.updated(pattern, magnitude, shapes, 8) for what, pattern in asked.items()}
    wide = [sum(1 for each in calls if each.numel() == BINS) for calls in sent.values()]
    most = sum(scale.update_bytes(2**14, 2, 96 * 80).values())
    masks = [scale.mask_bytes({"a": (48, 80)}, world) for world in scale.WORLDS]
    return {
        "passes": [wide, [1, 2]],  # a threshold for each weight sends as much for each
        "at most": [scale.size(sent["by"]) <= most, True],
        "masks": [masks, [48 * 80, 6 * 80, 80, 80]],
        "whole": [[scale.gathers(*scale.CRITERIA[name]) for name in list(scale.CRITERIA)[:3]], [0.0, 0.0, 4.0]],
        "rounded": [[scale.rounded_share(), scale.rounded_share(recomputed=True)], [1.0, 0.0]],
    }


def work(rank: int, world: int, folder: Path) -> Compared:
    if world == 1:
        return {**at_scale(), **simulated()}
    dist.init_process_group("gloo")
    keeper, found = setup(init_device_mesh("cpu", (world,)))
    return {**found, **pruned(keeper), **each_step()}


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 3])
def test_what_is_sent_is_what_the_formulas_say(world: int, tmp_path: Path) -> None:
    for rank in launching.run(__name__, world, tmp_path):
        assert {name: counted for name, (counted, _) in rank.items()} == {
            n: formula for n, (_, formula) in rank.items()
        }


def test_parameters_of_the_models() -> None:
    assert [round(model.total / 1e9, 2) for model in scale.MODELS.values()] == [1.24, 6.74, 68.98]

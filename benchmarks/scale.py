"""What compressing 1, 7 and 70 billion weights costs each rank under FSDP2: `python benchmarks/scale.py` (two minutes).

No weight is allocated: DTensors lie on the meta device under a fake process group of up to 1024 ranks, and what is sent
is what the package's own functions give to `torch.distributed.all_reduce`. Prints the tables of docs/scale.md, which
says what is simulated and what is a formula.
"""

from __future__ import annotations

import math
import pickle
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from lightning_compress import sharding
from lightning_compress.parts import Part
from lightning_compress.pruning.counting import BINS
from lightning_compress.pruning.criteria import geometric_median, magnitude
from lightning_compress.pruning.patterns import NM, Blocks, Columns, Unstructured
from lightning_compress.pruning.regrowth import RigL
from lightning_compress.pruning.scopes import by_output, lamp
from lightning_compress.pruning.targets import Target, checked_scores
from lightning_compress.quantization.attach import Phase, attach

WORLDS = (1, 8, 64, 1024)
Shapes = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Model:
    """A Llama-like model; selected are its Linear layers but the head, as the package does by default."""

    layers: int
    width: int
    ffn: int
    kv: int  # outputs of the key's and of the value's projection
    vocabulary: int
    tied: bool = False

    @property
    def selected(self) -> Shapes:
        w, f, kv = self.width, self.ffn, self.kv
        block = {"q": (w, w), "k": (kv, w), "v": (kv, w), "o": (w, w), "gate": (f, w), "up": (f, w), "down": (w, f)}
        return {f"{layer}.{name}": shape for layer in range(self.layers) for name, shape in block.items()}

    @property
    def count(self) -> int:
        return sum(math.prod(shape) for shape in self.selected.values())

    @property
    def total(self) -> int:
        return self.count + self.vocabulary * self.width * (1 if self.tied else 2) + self.width * (2 * self.layers + 1)


MODELS = {
    "1 B": Model(16, 2048, 8192, 512, 128256, tied=True),
    "7 B": Model(32, 4096, 11008, 4096, 32000),
    "70 B": Model(80, 8192, 28672, 1024, 32000),
}


@contextmanager
def ranks(world: int) -> Iterator[DeviceMesh]:
    """Be rank 0 of so many, of which the others do not exist."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (world,))
    finally:
        dist.destroy_process_group()


@contextmanager
def counting(alike: int = 1) -> Iterator[list[Tensor]]:
    """Note what is given to all_reduce. A sum is multiplied by `alike`: as many ranks hold what this one holds."""
    sent, original = [], dist.all_reduce

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        sent.append(torch.empty_like(tensor, device="meta"))
        original(tensor, op=op)
        if alike > 1 and op == dist.ReduceOp.SUM:
            tensor.mul_(alike)

    with patch.object(dist, "all_reduce", all_reduce):
        yield sent


def place(shape: tuple[int, ...], rank: int, world: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return where a rank's rows begin and what they are, by `Shard(0)`: chunks of ceil(rows / ranks)."""
    rows, rest = shape[0], shape[1:]
    start = min(rank * -(-rows // world), rows)
    return (start, *(0 for _ in rest)), (min(-(-rows // world), rows - start), *rest)


def gathering(held: Sequence[bytes]) -> Any:
    """Let `gathered_objects` return what all ranks would have sent; a fake group leaves out what others send."""

    def gathered(value: Any) -> list[Any]:
        if pickle.loads(held[0]) != value:
            raise ValueError("rank 0 has other places than the rule says")
        return [pickle.loads(each) for each in held]

    return patch.object(sharding, "gathered_objects", gathered)


def places(shapes: Shapes, world: int) -> list[bytes]:
    return [pickle.dumps([place(shape, rank, world) for shape in shapes.values()]) for rank in range(world)]


def parameters(shapes: Shapes, mesh: DeviceMesh) -> dict[str, nn.Parameter]:
    """Return weights of these shapes as rank 0 has them under FSDP2, without memory."""
    found = {}
    for name, shape in shapes.items():
        piece = torch.empty(place(shape, 0, mesh.size())[1], device="meta")
        known = {"run_check": False, "shape": torch.Size(shape), "stride": (shape[1], 1)}
        found[name] = nn.Parameter(DTensor.from_local(piece, mesh, [Shard(0)], **known), requires_grad=False)
    return found


def parts(shapes: Shapes, mesh: DeviceMesh) -> dict[str, Part]:
    """Return rank 0's parts as the package finds them."""
    with gathering(places(shapes, mesh.size())):
        return sharding.parts_of(nn.Module(), parameters(shapes, mesh))


def setup(shapes: Shapes, world: int) -> tuple[int, int, int, float]:
    """Return bytes of a rank's places, the most memory while parts are found, what stays, and seconds."""
    held = places(shapes, world)
    with ranks(world) as mesh, gathering(held):
        weights, start = parameters(shapes, mesh), time.process_time()
        sharding.parts_of(nn.Module(), weights)
        seconds = time.process_time() - start
        tracemalloc.start()
        kept = sharding.parts_of(nn.Module(), weights)
        stays, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return max(map(len, held)), most, stays if kept else 0, seconds


def size(sent: Sequence[Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in sent)


def update_bytes(count: int, tensors: int, largest: int, negative: bool = False, ties: bool = True) -> dict[str, int]:
    """Return bytes that a rank gives to all_reduce in one update of float32 scores under one threshold.
    With `negative` scores, as of any criterion but magnitudes once weights are out; where no `ties` stay, the last two
    are not sent. Of their places it is the most.
    """
    wide = 4 if count < 1 << 31 else 8
    passes = max(0, (largest - 1).bit_length() - 1) // 12 + 1
    return {
        "flags": 8 + 16 + 16,  # an error anywhere; negatives and total; the sparsity reached
        "first pass": wide * (BINS if negative else BINS // 2),
        "second pass": 4 * BINS,  # 8 if one first digit is shared by 2^31 scores
        "ties of each tensor": 8 * tensors * ties,
        "their places": (8 + passes * (8 << 12)) * ties,
    }


def packed_bytes(shapes: Shapes) -> int:
    """Return bytes of the whole masks in a checkpoint, which are given to all_reduce, too."""
    return sum(-(-math.prod(shape) // 8) for shape in shapes.values())


def mask_bytes(shapes: Shapes, world: int) -> int:
    """Return bytes of masks in rank 0's memory."""
    return sum(math.prod(place(shape, 0, world)[1]) for shape in shapes.values())


def updated(pattern: Any, criterion: Any, shapes: Shapes, world: int, sparsity: float = 0.5) -> list[Tensor]:
    """Return what one mask update of small random weights, many of them tied, gives to all_reduce."""
    with ranks(world) as mesh:
        found, targets = parts(shapes, mesh), []
        for name, part in found.items():
            piece = torch.randn(part.size, generator=torch.Generator().manual_seed(0)).mul(8).round()
            layer, masked = nn.Linear(1, 1), torch.ones(part.size, dtype=torch.bool)
            values = {"gradient": lambda piece=piece: piece}
            targets.append(Target(name, piece, layer, masked, criterion, values, part=part))
        with counting(alike=world) as sent:
            checked_scores(targets, 0)
            list(pattern(targets, sparsity, 0.5)[0])
    return sent


def gathers(pattern: Any, criterion: Any = magnitude) -> float:
    """Return how many bytes a weight go around as whole tensors of the weight's shape, in one update on 8 ranks."""
    shapes = {"first": (96, 80), "second": (48, 80)}  # no histogram's sizes; the first is asked a few times more
    return size([each for each in updated(pattern, criterion, shapes, 8) if each.numel() == 48 * 80]) / (48 * 80)


def rounded_share(recomputed: bool = False, layers: int = 6, width: int = 64) -> float:
    """Return which share of all weights' bytes autograd keeps, rounded and whole, from forward to backward."""
    with ranks(8) as mesh:
        net = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
        for layer in net:
            state = attach(layer)
            state.extremes, state.phase = torch.ones(2), Phase.ROUND
            fully_shard(layer, mesh=mesh)
        kept: dict[int, int] = {}
        value = torch.zeros(1, width, requires_grad=True)

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.nbytes() == 4 * width * width and not isinstance(tensor, nn.Parameter):
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            for layer in net:
                value = checkpoint(layer, value, use_reentrant=False) if recomputed else layer(value)
        return sum(kept.values()) / (4 * width * width * layers)


def table(title: str, head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(map(str, head))} |\n| {' | '.join(['---', *['---:'] * (len(head) - 1)])} |")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def unit(count: float) -> str:
    scale, name = next(((s, n) for s, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= s), (1, "B"))
    return f"{count / scale:.3g} {name}"


CRITERIA = {
    "magnitude, taylor, ... under `globally`, `uniform`, `erk`": (Unstructured(), magnitude),
    "`NM(2, 4)`, `Rows()`, blocks that no border cuts": (NM(2, 4), magnitude),
    "scope `by_output`": (Unstructured(by_output), magnitude),
    "scope `lamp`": (Unstructured(lamp), magnitude),
    "another criterion (random, geometric_median, yours)": (Unstructured(), geometric_median),
    "the same, scope `lamp`": (Unstructured(lamp), geometric_median),
    "`Columns()`, `Heads` cut by a border": (Columns(), magnitude),
    "`Blocks` cut by a border": (Blocks(8, 8), magnitude),
    "`RigL()`, `SET()`": (RigL(), magnitude),
}
WHOLE: dict[str, Callable[[Model], int]] = {
    "packed masks": lambda m: packed_bytes(m.selected),
    "rounded weights, bfloat16": lambda m: 2 * m.count,
    "teacher, bfloat16": lambda m: 2 * m.total,
    "teacher, float32": lambda m: 4 * m.total,
    "sums of a gradient criterion, in a checkpoint": lambda m: 4 * m.count,
}


def _cut(shapes: Shapes, world: int) -> list[int]:
    """Return of how many weights a border cuts blocks of 4 x 4, of 32 x 32, heads of 128 outputs, and columns."""
    with ranks(world) as mesh:
        found = parts(shapes, mesh)
    tiles = [[(part, (extent, extent)) for part in found.values()] for extent in (4, 32)]
    heads = [(part, (128, part.shape[1])) for name, part in found.items() if name.split(".")[1] in "qkv"]
    tiles += [heads, [(part, (part.shape[0], 1)) for part in found.values()]]
    return [sum(part.tiled(extents) is None for part, extents in each) for each in tiles]


def main() -> None:
    names, large = list(MODELS), MODELS["70 B"].selected
    rows = [(n, m.layers, m.width, m.ffn, m.kv, m.vocabulary, f"{m.total / 1e9:.2f} G", f"{m.count / 1e9:.2f} G",
             len(m.selected)) for n, m in MODELS.items()]  # fmt: skip
    table("Models", ("", "layers", "width", "ffn", "k, v", "vocabulary", "parameters", "selected", "tensors"), rows)
    rows = [(n, *(unit(mask_bytes(m.selected, w)) for w in WORLDS)) for n, m in MODELS.items()]
    table("Masks in a rank's memory", ("ranks", *WORLDS), rows)
    steps = [update_bytes(m.count, len(m.selected), m.width * m.ffn) for m in MODELS.values()]
    rows = [(part, *(unit(step[part]) for step in steps)) for part in steps[0]]
    table("One update", ("", *names), [*rows, ("sum", *(unit(sum(step.values())) for step in steps))])
    rows = [(what, unit(gathers(*asked))) for what, asked in CRITERIA.items()]
    table("Whole weights in one update", ("", "bytes a weight"), rows)
    rows = [(world, *_cut(large, world)) for world in WORLDS[1:]]
    table("Cut weights of 70 B", ("ranks", "4 x 4", "32 x 32", "heads", "columns"), rows)
    rows = []
    for name, world in [(n, w) for n in names for w in WORLDS[1:]]:
        sent, most, stays, seconds = setup(MODELS[name].selected, world)
        entry = f"{sent / len(MODELS[name].selected):.0f} B"
        rows.append((name, world, entry, unit(world * sent), unit(most), unit(stays), f"{seconds:.2f} s"))
    table("Parts", ("model", "ranks", "a tensor", "received", "most memory", "stays", "CPU time"), rows)
    print(f"\nRounded weights that a backward waits for: {rounded_share():.0%}, recomputed {rounded_share(True):.0%}")
    rows = [(what, *(unit(of(m)) for m in MODELS.values())) for what, of in WHOLE.items()]
    table("Whole on each rank", ("", *names), rows)


if __name__ == "__main__":
    main()

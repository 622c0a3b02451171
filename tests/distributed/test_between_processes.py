"""What processes send each other, and what stops all of them when they are not alike."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_compress import (
    CompressionMonitor,
    Distillation,
    GradualPruning,
    LowRank,
    QuantizationAwareTraining,
    StructuredPruning,
)
from lightning_compress.distillation.own_teachers import MeanTeacher
from lightning_compress.divergence import check_same, digest
from lightning_compress.errors import CompressError, ProcessesDiffer, UnsupportedStrategy
from lightning_compress.factorization.svd import svd
from lightning_compress.pruning.channels import Removal
from lightning_compress.pruning.criteria import magnitude, wanda
from lightning_compress.pruning.patterns import Unstructured
from lightning_compress.pruning.targets import Target, checked_scores
from lightning_compress.quantization.learned_steps import LSQ
from lightning_compress.sharding import local, parts_of
from tests.distributed import launching, recipes
from tests.distributed.strategies import STRATEGIES, Shardable, rows

MEGABYTE = 1_000_000
Result = dict[str, Any]


class Sent:
    """Counts the bytes that are given to be reduced."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.original: Callable[..., Any] = dist.all_reduce

    def __enter__(self) -> Sent:
        def counted(tensor: Tensor, *args: Any, **options: Any) -> Any:
            self.sizes.append(tensor.numel() * tensor.element_size())
            return self.original(tensor, *args, **options)

        dist.all_reduce = counted
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self.original


def update(numbers: int, dtype: torch.dtype, ties: bool) -> int:
    """Bytes of one global threshold over two sharded weights of so many numbers each."""
    mesh, source = init_device_mesh("cpu", (dist.get_world_size(),)), torch.Generator().manual_seed(0)
    values = [torch.randn(numbers // 64, 64, generator=source) for _ in range(2)]
    values = [(v.mul(2).round() if ties else v).to(dtype) for v in values]
    weights = {f"w{index}": nn.Parameter(distribute_tensor(v, mesh, [Shard(0)])) for index, v in enumerate(values)}
    parts = parts_of(nn.Module(), weights)
    layer = nn.Linear(1, 1)
    targets = [Target(name, local(w), layer, None, magnitude, part=parts[name]) for name, w in weights.items()]
    with Sent() as sent:
        checked_scores(targets, 1)
        list(Unstructured()(targets, 0.7, 1.0)[0])
    return sum(sent.sizes)


def of_updates() -> Result:
    options = [(1 << 12, torch.float32, False), (1 << 20, torch.float32, False), (1 << 20, torch.float32, True),
               (1 << 20, torch.bfloat16, True)]  # fmt: skip
    return {f"{numbers} {dtype} {ties}": update(numbers, dtype, ties) for numbers, dtype, ties in options}


class CountSteps(L.Callback):
    """Bytes of reductions of ours in each step; the strategy's own go through the reducer."""

    def __init__(self, sent: Sent) -> None:
        self.sent, self.steps, self.calls = sent, [], []

    def on_train_batch_start(self, *_: Any) -> None:
        self.sent.sizes.clear()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(sum(self.sent.sizes))
        self.calls.append(len(self.sent.sizes))


def of_steps(world: int, callbacks: list[L.Callback]) -> Result:
    with Sent() as sent:
        count = CountSteps(sent)
        trainer_for(world, [*callbacks, count]).fit(Shardable())
    return {"bytes": count.steps, "calls": count.calls}


def trainer_for(world: int, callbacks: list[L.Callback], strategy: str = "ddp") -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", devices=world, strategy=STRATEGIES[strategy](world), max_steps=recipes.STEPS, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
        use_distributed_sampler=False, callbacks=callbacks,
    )  # fmt: skip


def raised(run: Callable[[], Any], kind: type[Exception]) -> str:
    try:
        run()
    except kind as error:
        return str(error)
    return ""


def other_seed(rank: int) -> Shardable:
    module = Shardable()
    with torch.no_grad():
        module.model[2].bias.add_(float(rank))
    return module


class Flip(L.Callback):
    """Changes a mask on one process alone, as a faulty memory would."""

    def __init__(self, pruning: GradualPruning, rank: int) -> None:
        self.pruning, self.rank = pruning, rank

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 5 and self.rank == 1:
            weight = dict(self.pruning.weights)["model.0.down.weight"]
            weight.data[0, :4] = torch.tensor([9.0, -9.0, 1e-7, 0.0])


class NaNOnOne(L.Callback):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 5 and self.rank == 1:
            local(next(iter(pl_module.parameters()))).view(-1)[0] = float("nan")


class Unequal(Shardable):
    """Batches whose last one is smaller, and of another size on each process."""

    def train_dataloader(self) -> Any:
        data = rows(37)
        sampler = torch.utils.data.DistributedSampler(data, shuffle=False)
        return torch.utils.data.DataLoader(data, batch_size=5, sampler=sampler)


def of_bad_input(rank: int, world: int) -> Result:
    def fit(callbacks: list[L.Callback], module: L.LightningModule | None = None, strategy: str = "ddp") -> Any:
        return lambda: trainer_for(world, callbacks, strategy).fit(module or Shardable())

    pruning = GradualPruning(0.7, (2, 9), 2)
    found = {
        "recipes": raised(fit([GradualPruning(0.7 if rank else 0.8, (2, 9), 2)]), ProcessesDiffer),
        "switched off": raised(fit([GradualPruning(0.7, (2, 9), 2, enabled=rank == 0)]), ProcessesDiffer),
        "more callbacks": raised(
            fit([GradualPruning(0.7, (2, 9), 2), *([QuantizationAwareTraining()] if rank else [])]), ProcessesDiffer
        ),
        "starting weights": raised(fit([GradualPruning(0.7, (2, 9), 2)], other_seed(rank), "fsdp1"), ProcessesDiffer),
        "masks": raised(fit([pruning, Flip(pruning, rank)]), ProcessesDiffer),
        "NaN": raised(fit([GradualPruning(0.7, (2, 9), 2), NaNOnOne(rank)], None, "fsdp2"), CompressError),
        "channels": raised(fit([StructuredPruning(0.5, (2, 9), 2)], None, "fsdp2"), UnsupportedStrategy),
        "layers in the run": raised(fit([LowRank(3)], None, "fsdp2"), UnsupportedStrategy),
        "layers of a plan": raised(fit([LowRank(3, at=0.0, decompose=svd)], None, "tp"), UnsupportedStrategy),
        "average": raised(fit([Distillation(MeanTeacher())], None, "fsdp2"), UnsupportedStrategy),
        "grid": raised(fit([QuantizationAwareTraining(LSQ(4))], None, "tp"), UnsupportedStrategy),
        "activations of channels": raised(
            fit([StructuredPruning(0.5, (2, 9), 2, criterion=wanda, removal=Removal(times=0))], None, "tp"),
            CompressError,
        ),
        "activations": raised(fit([GradualPruning(0.7, (2, 9), 2, criterion=wanda)], None, "tp"), CompressError),
    }
    fit(recipes.TECHNIQUES["all"](), Unequal(), "fsdp2")()  # uneven last batches
    return found


def of_monitor(world: int, folder: Path) -> Result:
    """What a report says of weights that are in parts: on the process that writes it."""
    found = {}
    for strategy in ("fsdp1", "fsdp2", "tp"):
        monitor = CompressionMonitor(str(folder / strategy))
        trainer_for(world, [recipes.pruning(), monitor], strategy).fit(Shardable())
        if monitor.report is not None:
            found[strategy] = [monitor.report.after.nonzero, monitor.report.after.total]
    return found


def of_second_fits(world: int) -> Result:
    """Sparsity that another Trainer reaches on a module that an earlier one has sharded."""
    found = {}
    for strategy in ("fsdp2", "tp"):
        module = Shardable()
        for pruning in (recipes.pruning(), recipes.pruning()):
            trainer_for(world, [pruning], strategy).fit(module)
            found[strategy] = pruning.history[-1][1:]
    return found


def work(rank: int, world: int, folder: Path) -> Result:
    steps = {
        "pruning": of_steps(world, [recipes.pruning()]),
        "quantization": of_steps(world, [recipes.rounding()]),
        "distillation": of_steps(world, [recipes.teaching()]),
        "plain": of_steps(world, []),
    }
    return {
        "updates": of_updates(),
        "steps": steps,
        "bad": of_bad_input(rank, world),
        "monitor": of_monitor(world, folder),
        "again": of_second_fits(world),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    folder = launching.once(tmp_path_factory, "between", lambda folder: launching.run(__name__, 2, folder))
    return launching.results(folder, 2)


@pytest.mark.distributed
def test_a_threshold_costs_less_than_a_megabyte_whatever_the_size_of_the_model(two: list[Result]) -> None:
    sizes = two[0]["updates"]
    small, large, tied, half = sizes.values()
    assert small == large
    assert max(large, tied, half) < MEGABYTE
    assert tied - large < 100_000  # two numbers a tensor, and 32 KiB a pass for the places of ties
    assert two[1]["updates"] == sizes


@pytest.mark.distributed
def test_what_a_step_sends(two: list[Result]) -> None:
    steps = two[0]["steps"]
    plain, pruned = steps["plain"]["bytes"], steps["pruning"]["bytes"]
    # Under DDP each process makes the same masks by itself: an update compares 16 bytes a weight, other steps nothing.
    assert set(plain) == {0}
    assert set(pruned) == {0, 4 * 16}
    # One reduction of two numbers a layer while ranges move, none once they are frozen; phases are compared.
    rounding, calls = steps["quantization"]["bytes"], steps["quantization"]["calls"]
    begin, _, freeze = recipes.ROUNDED
    assert rounding[: begin - 1] == [0] * (begin - 1)
    assert rounding[freeze:] == [0] * (recipes.STEPS - freeze)
    assert max(calls) <= 2
    assert set(steps["distillation"]["bytes"]) == {0}


MESSAGES = {
    "recipes": r"process 1 has GradualPruning\(schedule='Cubic\(final=0\.7.* where process 0 has .*0\.8",
    "switched off": r"process 1 has GradualPruning\(enabled=False\) where process 0 has GradualPruning\(enabled=True\)",
    "more callbacks": "process 1 has 2 callbacks of this package where process 0 has 1; start all processes with",
    "starting weights": r"process 1 starts from another 'model\.2\.bias' than process 0, .*seed_everything",
    "masks": r"the mask of 'model\.0\.down\.weight' is not the same on all 2 processes after optimizer step 6",
    "NaN": r"'model\.0\.up\.weight' at optimizer step 6",
    "channels": r"StructuredPruning works under .*removal=Removal\(times=0\)",
    "layers in the run": r"LowRank works under .*at=0\.0 with decompose=svd",
    "layers of a plan": "which a plan of parallelize_module does not know",
    "average": r"Distillation works under .*teach with StartingModel\(\)",
    "grid": r"cannot use LSQ\(bits=4, per_channel=False\) in 'model\.0\.up' under tensor parallelism",
    "activations of channels": "input_norm, of which a process sees a part under tensor parallelism",
    "activations": "input_norm, of which a process sees a part under tensor parallelism",
}


@pytest.mark.distributed
@pytest.mark.parametrize("case", MESSAGES)
def test_all_processes_stop_and_say_why(case: str, two: list[Result]) -> None:
    for rank in two:
        assert re.search(MESSAGES[case], rank["bad"][case]), rank["bad"][case]


@pytest.mark.distributed
def test_a_report_counts_weights_on_all_processes(two: list[Result]) -> None:
    weights = recipes.fit("pruning")
    names = [name for name in weights if not name.startswith(("mask", "steps"))]
    counts = [sum(int((weights[name] != 0).sum()) for name in names), sum(weights[name].numel() for name in names)]
    assert two[0]["monitor"] == dict.fromkeys(("fsdp1", "fsdp2", "tp"), counts)
    assert two[1]["monitor"] == {}


@pytest.mark.distributed
def test_a_module_that_is_sharded_already_is_fitted_again(two: list[Result]) -> None:
    for target, sparsity in two[0]["again"].values():
        assert target == 0.7
        assert abs(sparsity - target) < 1e-3


def test_a_digest_sees_values_places_and_bits() -> None:
    source = torch.Generator().manual_seed(0)
    values = torch.randn(100_003, generator=source)
    changed = values.clone()
    changed[77_777] = torch.nextafter(changed[77_777], torch.tensor(9.0))
    found = [int(digest(each)) for each in (values, changed, values.flip(0), values[:-1])]
    assert len(set(found)) == 4
    assert int(digest(values.clone())) == found[0]
    assert all(0 <= each < 1 << 62 for each in found)


def test_one_process_compares_with_nobody() -> None:
    with Sent() as sent:
        check_same({"a": torch.ones(3)}, "mask", 1)
    assert sent.sizes == []

"""A LightningModule that changes its shape: tracing it, and taking channels out of it in a fit."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_compress.callbacks.averages import averaged_modules
from lightning_compress.callbacks.probe import first_student_call, uncompiled
from lightning_compress.errors import CompressError, IncompatibleCallbacks, NothingToCompress
from lightning_compress.measure.flops import macs_per_weight
from lightning_compress.measure.latency import measure_latency
from lightning_compress.pruning.channels import Removal, choose, kept_share
from lightning_compress.pruning.dependency import Group, Slot, check_groups, find_groups
from lightning_compress.pruning.shrink import shrink
from lightning_compress.pruning.survivors import Survivors
from lightning_compress.pruning.targets import PRUNABLE
from lightning_compress.select import Pattern, select_layers
from lightning_compress.sharding import clean_name

__all__ = [
    "Traced",
    "needed",
    "remove_channels",
    "saved_trace",
    "trace",
    "traced_call",
]


@dataclass(frozen=True)
class Traced:
    """What can go from a module as the user built it, and what each weight costs.

    Args:
        groups: of channels that may go.
        survivors: which of them are left.
        skipped: why each other group stays.
        shapes: of all tensors that groups pass through, at full size.
        costs: of each weight at full size, in the budget's unit; empty for a budget of channels.
        curve: for a budget of latency: (share of MACs that stays, share of the time it takes), rising.
    """

    groups: list[Group]
    survivors: Survivors
    skipped: Mapping[str, str]
    shapes: Mapping[str, torch.Size]
    costs: Mapping[str, float]
    curve: tuple[tuple[float, float], ...] = ()

    def parameters(self, pl_module: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters, as they are now, that groups pass through; a tied one once."""
        places = {slot.tensor for group in self.groups for slot in group.slots}
        return {n: p for n, p in ((clean_name(n), p) for n, p in pl_module.named_parameters()) if n in places}

    def check_amount(self, amount: float, removal: Removal) -> None:
        """Raise if the limits do not allow that much to go. Runs at `setup`.

        Raises:
            ValueError: with what they allow.
        """
        choose({group.name: torch.arange(group.units).double() for group in self.groups}, self.share, amount, removal)

    def state_dict(self) -> dict[str, Any]:
        """Return it as tensors and primitives: a resumed run goes on with it, since its module is smaller by then."""
        groups = [
            {"name": g.name, "units": g.units, "slots": [[s.tensor, s.dim, s.index.int()] for s in g.slots]}
            for g in self.groups
        ]
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        curve = [list(point) for point in self.curve]
        return {"groups": groups, "shapes": shapes, "costs": dict(self.costs), "curve": curve}

    def share(self, kept: Mapping[str, Tensor]) -> float:
        """Return the share of the budget that stays with the kept units."""
        if not self.costs:
            return sum(int(units.sum()) for units in kept.values()) / sum(len(units) for units in kept.values())
        share = kept_share(self.groups, kept, self.costs, self.shapes)
        if not self.curve:
            return share
        return float(np.interp(share, [work for work, _ in self.curve], [time for _, time in self.curve]))


# Tracing


def saved_trace(state: Mapping[str, Any]) -> Traced:
    """Return what `Traced.state_dict` wrote down. Runs on resuming."""

    def slot(tensor: str, dim: int, index: Tensor) -> Slot:
        return Slot(tensor, int(dim), index.cpu().long())

    groups = [Group(g["name"], tuple(slot(*each) for each in g["slots"]), int(g["units"])) for g in state["groups"]]
    shapes = {name: torch.Size(shape) for name, shape in state["shapes"].items()}
    curve = tuple((float(share), float(time)) for share, time in state["curve"])
    return Traced(groups, Survivors(groups), {}, shapes, dict(state["costs"]), curve)


def _example(trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
    """Return the name of the module that a step calls, and arguments for it; None if it cannot be found out."""
    # At `on_fit_start` the module is on its device, and whole in double or half precision if the Trainer says so.
    example = apply_to_collection(pl_module.example_input_array, Tensor, _moved, pl_module)
    if isinstance(example, dict):
        return "", (), dict(example)
    if example is not None:
        return "", example if isinstance(example, tuple) else (example,), {}
    found = first_student_call(trainer, pl_module, None)
    return None if found is None else (found[1].name, found[1].args, found[1].kwargs)


def _moved(tensor: Tensor, pl_module: L.LightningModule) -> Tensor:
    dtype = pl_module.dtype if tensor.dtype is torch.float32 else tensor.dtype
    return tensor.to(pl_module.device, dtype)  # type: ignore[arg-type]  # Lightning says str too


def _check_weights(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        computed = [key for key, value in vars(layer).items() if isinstance(value, Tensor) and not value.is_leaf]
        if computed:
            raise IncompatibleCallbacks(
                f"'{clean_name(name)}' computes its {computed[0]} before each forward (torch.nn.utils.prune, "
                f"ModelPruning, torch.nn.utils.weight_norm), so that nothing can be taken out of it; make it permanent "
                f"(torch.nn.utils.prune.remove) or use torch.nn.utils.parametrizations"
            )


def trace(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    include: Sequence[Pattern] | None,
    exclude: Sequence[Pattern] | None,
    removal: Removal,
) -> Traced | None:
    """Find the channels that may go; None if nothing says what to call the module with.

    Runs at `setup`, and at `on_fit_start` for modules that build layers late or optimize by hand.

    Raises:
        NothingToCompress: none may.
        CompressError: the forward cannot be traced.
        IncompatibleCallbacks: a layer computes its weight before each forward.
    """
    example = _example(trainer, pl_module)
    if example is None:
        return None
    with uncompiled():  # its copies and hooks are not what the run compiles
        traced = traced_call(pl_module, *example, include, exclude, removal)
    # Each process has timed its own, and all must take out the same.
    return replace(traced, curve=trainer.strategy.broadcast(traced.curve)) if traced.curve else traced


def traced_call(
    pl_module: nn.Module,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    include: Sequence[Pattern] | None,
    exclude: Sequence[Pattern] | None,
    removal: Removal,
) -> Traced:
    """Find the channels that may go when a submodule is called so. Runs once the module is on its device."""
    _check_weights(pl_module)
    module = pl_module.get_submodule(name)
    groups = check_groups(module, find_groups(module, args, kwargs), args, kwargs)
    selected = select_layers(pl_module, PRUNABLE, include or ["*"], exclude).layers.keys()
    decided = [_selected(_prefixed(group, name), selected, pl_module) for group in groups]
    free = [group for group in decided if not group.reason]
    skipped = {group.name: group.reason for group in decided if group.reason and not group.name.endswith(".weight")}
    if not free:
        reasons = "; ".join(f"'{name}': {reason}" for name, reason in skipped.items()) or "no channels were found"
        raise NothingToCompress(f"no channel of {type(module).__name__} can be removed: {reasons}")
    tensors = {clean_name(n): tensor for n, tensor in [*pl_module.named_parameters(), *pl_module.named_buffers()]}
    shapes = {slot.tensor: tensors[slot.tensor].shape for group in free for slot in group.slots}
    costs: dict[str, float] = {}
    if removal.of in ("macs", "latency"):
        positions = {f"{name}.{n}".removeprefix("."): p for n, p in macs_per_weight(module, args, kwargs).items()}
        costs = {weight: float(count * tensors[weight].numel()) for weight, count in positions.items()}
    elif removal.of == "parameters":
        costs = {clean_name(n): float(p.numel()) for n, p in pl_module.named_parameters()}
    shapes |= {weight: tensors[weight].shape for weight in costs}
    traced = Traced(free, Survivors(free), skipped, shapes, costs)
    if removal.of == "latency":
        traced = replace(traced, curve=_latency_curve(module, traced, name, args, kwargs))
    return traced


def _prefixed(group: Group, prefix: str) -> Group:
    slots = tuple(replace(slot, tensor=f"{prefix}.{slot.tensor}".removeprefix(".")) for slot in group.slots)
    return replace(group, name=f"{prefix}.{group.name}".removeprefix("."), slots=slots)


def _selected(group: Group, selected: Any, pl_module: nn.Module) -> Group:
    """Give a group whose outputs are not all selected the reason why it stays."""
    modules = {clean_name(name): module for name, module in pl_module.named_modules()}
    for slot in group.slots:
        layer, _, what = slot.tensor.rpartition(".")
        makes = (
            what == "weight" and isinstance(modules.get(layer), PRUNABLE) and slot.dim == _output_axis(modules[layer])
        )
        if makes and layer not in selected and not group.reason:
            return replace(group, reason=f"'{layer}' is not selected")
    return group


def _output_axis(layer: nn.Module) -> int:
    return 1 if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)) else 0


def _latency_curve(
    module: nn.Module, traced: Traced, prefix: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[float, float], ...]:
    """Measure how long forwards take at five sizes, as shares of the whole one's time."""
    points = []
    for fraction in (0.9, 0.7, 0.5, 0.25, 0.0):
        smaller = copy.deepcopy(module).eval()
        kept = {g.name: torch.arange(g.units) >= int(fraction * g.units) for g in traced.groups}
        own = [_prefixless(group, prefix) for group in traced.groups]
        shrink(smaller, {g.name: kept[f"{prefix}.{g.name}".removeprefix(".")] for g in own}, own)
        with torch.no_grad():
            time_ms = measure_latency(lambda: smaller(*args, **kwargs), warmup=3, runs=15).median_ms  # noqa: B023
        points.append((kept_share(traced.groups, kept, traced.costs, traced.shapes), time_ms))
    slowest = np.maximum.accumulate([time_ms for _, time_ms in points])  # noise must not make more work faster
    return tuple((share, float(time_ms / slowest[-1])) for (share, _), time_ms in zip(points, slowest, strict=True))


def _prefixless(group: Group, prefix: str) -> Group:
    slots = tuple(replace(slot, tensor=slot.tensor.removeprefix(f"{prefix}.")) for slot in group.slots)
    return replace(group, name=group.name.removeprefix(f"{prefix}."), slots=slots)


# Removing


def remove_channels(
    trainer: L.Trainer, pl_module: L.LightningModule, groups: Sequence[Group], kept: Mapping[str, Tensor]
) -> None:
    """Take channels out of the module, the optimizers' state and averaged copies. Runs between batches."""
    shrink(pl_module, kept, groups, trainer.optimizers)
    for average in averaged_modules(trainer):
        shrink(average, kept, groups)
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):  # it holds on to the old parameters' gradients
        strategy.model = pl_module
        strategy.configure_ddp()


def needed(traced: Traced | None) -> Traced:
    """Return it, or raise if nothing said what to call the module with."""
    if traced is None:
        raise CompressError(
            "StructuredPruning needs one example of the forward's input, and neither the training data nor the step "
            "give one without being consumed; set example_input_array in the LightningModule"
        )
    return traced

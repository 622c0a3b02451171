"""Whether a callback takes part in a run, and whether all processes run the same."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
from lightning.pytorch.strategies import Strategy

from lightning_compress.callbacks.contract import SHARDING, Compression, check_strategy, described
from lightning_compress.callbacks.gate import add_gate
from lightning_compress.divergence import digest
from lightning_compress.errors import ProcessesDiffer
from lightning_compress.sharding import clean_name, gathered_objects, is_distributed, is_flattened, world_size

__all__ = ["check_same_runs", "takes_part"]


def takes_part(
    who: Compression,
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    stage: str,
    sharding: tuple[type[Strategy], ...] = (),
    instead: str = "",
) -> bool:
    """Say whether a callback is on; raise if it cannot be in this run. Runs at `setup`.

    Args:
        who: the callback.
        trainer: of this run.
        pl_module: its module.
        stage: of this run.
        sharding: as for `check_strategy`.
        instead: as for `check_strategy`.

    Raises:
        UnsupportedStrategy: the strategy is none that it works under.
        ProcessesDiffer: processes were started with other recipes, or would shard other weights.
    """
    if stage == "fit":
        check_same_runs(trainer, who, pl_module)
    if who.enabled:
        check_strategy(trainer, who, sharding, instead)
        if stage == "fit":
            add_gate(trainer)
    return who.enabled


def check_same_runs(trainer: L.Trainer, who: object, pl_module: L.LightningModule) -> None:
    """Raise if processes were started with other recipes, or would shard other weights. Runs at `setup`.

    The first of our callbacks asks for all of them.

    Raises:
        ProcessesDiffer: with the first difference and both values.
    """
    ours = [callback for callback in trainer.callbacks if hasattr(callback, "recipe")]  # type: ignore[attr-defined]
    if world_size() == 1 or not ours or ours[0] is not who:
        return
    recipes = [(type(callback).__name__, callback.enabled, callback.recipe()) for callback in ours]
    others: list[Any] = gathered_objects(
        [described([name, enabled, sorted(r.items())]) for name, enabled, r in recipes]
    )
    for rank, other in enumerate(others):
        if other != others[0]:
            first, second = _first_difference(others[0], other)
            raise ProcessesDiffer(
                f"process {rank} has {second} where process 0 has {first}; start all processes with the same callbacks"
            )
    if isinstance(trainer.strategy, SHARDING) and not getattr(trainer.strategy, "kwargs", {}).get("sync_module_states"):
        _check_same_start(pl_module)


def _first_difference(one: list[Any], other: list[Any]) -> tuple[str, str]:
    for first, second in zip(one, other, strict=False):
        if first[:2] != second[:2]:
            return f"{first[0]}(enabled={first[1]})", f"{second[0]}(enabled={second[1]})"
        for (option, value), (_, different) in zip(first[2], second[2], strict=False):
            if value != different:
                return f"{first[0]}({option}={value!r})", f"{second[0]}({option}={different!r})"
    return str(len(one)), f"{len(other)} callbacks of this package"


def _check_same_start(pl_module: L.LightningModule) -> None:
    parameters = {clean_name(name): p for name, p in pl_module.named_parameters() if not p.is_meta}
    if is_flattened(pl_module) or any(is_distributed(parameter) for parameter in parameters.values()):
        return  # a module that an earlier fit has sharded
    own = [int(digest(parameter)) for parameter in parameters.values()]
    for rank, other in enumerate(gathered := gathered_objects(own)):
        names = [name for name, mine, its in zip(parameters, gathered[0], other, strict=True) if mine != its]
        if names:
            raise ProcessesDiffer(
                f"process {rank} starts from another '{names[0]}' than process 0, and the strategy would shard a "
                f"mixture; call seed_everything with one seed before the module is made, or load the same weights"
            )

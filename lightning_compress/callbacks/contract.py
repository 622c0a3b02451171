"""What every callback checks in the same words: the strategy, the state's format and recipe, and the module's age."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as L
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_compress.errors import CheckpointMismatch, UnsupportedStrategy
from lightning_compress.zero import why_not

__all__ = [
    "FORMAT",
    "SHARDING",
    "ZERO",
    "Compression",
    "check_learning",
    "check_state",
    "check_strategy",
    "check_unclaimed",
    "compressions",
    "described",
    "gradients_are_read",
    "is_final_at_setup",
    "is_tensor_parallel",
    "is_whole_at_setup",
    "refuse_under_zero",
    "saved_state",
    "state_key",
    "warn_if_unfinished",
]

FORMAT = 1
SHARDING: tuple[type[Strategy], ...] = (FSDPStrategy, ModelParallelStrategy)  # FSDP1; FSDP2 and tensor parallel
ZERO: tuple[type[Strategy], ...] = (*SHARDING, DeepSpeedStrategy)  # and stages of it at which modules stay whole


def check_strategy(
    trainer: L.Trainer, who: object, sharding: tuple[type[Strategy], ...] = (), instead: str = ""
) -> None:
    """Raise unless a callback knows the strategy. Runs at `setup`.

    Args:
        trainer: of this run.
        who: the callback.
        sharding: strategies that shard parameters under which it works, besides a single device and DDP.
        instead: of its options, what would work.

    Raises:
        UnsupportedStrategy: another one; the message names those that work.
    """
    known: tuple[type[Strategy], ...] = (SingleDeviceStrategy, DDPStrategy, *sharding)
    deep = isinstance(trainer.strategy, DeepSpeedStrategy)  # a DDPStrategy, too
    if not isinstance(trainer.strategy, known) or (deep and DeepSpeedStrategy not in sharding):
        names = ", ".join(kind.__name__ for kind in known)
        cure = instead or "remove the callback"
        raise UnsupportedStrategy(
            f"{type(who).__name__} works under {names}, not yet under {type(trainer.strategy).__name__}: it would not "
            f"know which part of a parameter a process holds; use one of these (strategy='ddp'), or {cure}"
        )
    if deep:
        _check_zero(trainer.strategy, who, "strategy='ddp'")


def _check_zero(strategy: Any, who: object, instead: str) -> None:
    config = getattr(strategy, "config", None)
    reason = why_not(config if isinstance(config, dict) else None)
    if reason:
        raise UnsupportedStrategy(
            f"{type(who).__name__} works under {type(strategy).__name__} of ZeRO stages 1 and 2, not yet {reason}, or "
            f"use {instead}"
        )


def refuse_under_zero(trainer: L.Trainer, who: object, what: str, cure: str) -> None:
    """Raise if DeepSpeed runs a callback with an option that cannot be met there. Runs at `setup`.

    Args:
        trainer: of this run.
        who: the callback.
        what: the option; "" is nothing to refuse.
        cure: the end of the message.

    Raises:
        UnsupportedStrategy: there is such an option.
    """
    if what and isinstance(trainer.strategy, DeepSpeedStrategy):
        raise UnsupportedStrategy(
            f"{type(who).__name__} with {what} does not give under {type(trainer.strategy).__name__} what it gives on "
            f"one process (gradients lie in pieces of its own after the backward, and sums of inputs were seen to "
            f"differ); {cure}"
        )


def check_learning(trainer: L.Trainer, who: object, learning: str) -> None:
    """Raise unless the gradients of a run are there for values that a callback learns beside the optimizer's weights.

    Runs at `on_fit_start`.

    Args:
        trainer: of this run.
        who: the callback.
        learning: what learns.

    Raises:
        ValueError: a gradient scaler scales them.
        UnsupportedStrategy: DeepSpeed takes them.
    """
    plain = "grids that learn nothing, such as weights=8, inputs=8"
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            f"{learning} cannot learn from gradients that precision='16-mixed' scales; use precision='bf16-mixed', "
            f"or {plain}"
        )
    refuse_under_zero(trainer, who, learning, f"use {plain}")


def is_tensor_parallel(trainer: L.Trainer) -> bool:
    """Say whether several processes compute a layer together. Known once the strategy has set up its processes."""
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return False
    return trainer.strategy.device_mesh["tensor_parallel"].size() > 1


def is_final_at_setup(pl_module: L.LightningModule) -> bool:
    """Say whether all layers exist when `Callback.setup` runs, before the module's own `setup`/`configure_model`."""
    return not any(is_overridden(hook, pl_module, L.LightningModule) for hook in ("setup", "configure_model"))


def is_whole_at_setup(trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
    """Say whether the module can be looked at as a whole when `Callback.setup` runs: later it may be in parts.

    `configure_model` of a module that already has its layers shards them, where the strategy shards.
    """
    if is_final_at_setup(pl_module):
        return True
    parameters = list(pl_module.parameters())
    built = bool(parameters) and not any(parameter.is_meta for parameter in parameters)
    return isinstance(trainer.strategy, SHARDING) and built and not is_overridden("setup", pl_module, L.LightningModule)


def gradients_are_read(who: L.Callback, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
    """Say whether anything but the optimizer may read gradients after the backward: clipping, or somebody's hook."""
    others = (callback for callback in trainer.callbacks if callback is not who)  # type: ignore[attr-defined]
    module_hooks = ("on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step")
    return (
        bool(trainer.gradient_clip_val)
        or any(is_overridden("on_before_optimizer_step", callback, L.Callback) for callback in others)
        or any(is_overridden(hook, pl_module, L.LightningModule) for hook in module_hooks)
    )


def described(value: Any) -> Any:
    """Return a recipe's value as primitives that compare equal across runs and load with `weights_only=True`.

    >>> from lightning_compress.schedule import Cubic
    >>> described((0.1, Cubic(0.9)))
    [0.1, 'Cubic(final=0.9, initial=0.0)']
    """
    if isinstance(value, float):
        return float(value)  # NumPy's float64 is one too, but neither prints nor loads like it
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))  # an address is another one in the resumed process


def saved_state(recipe: Mapping[str, Any], **state: Any) -> dict[str, Any]:
    """Return a callback's state with the format and recipe that `check_state` compares."""
    return {"format": FORMAT, "recipe": dict(recipe), **state}


def check_state(state: Mapping[str, Any], recipe: Mapping[str, Any], who: object) -> None:
    """Raise unless a checkpoint's state is of a known format and of this callback's recipe. Runs on loading.

    Raises:
        CheckpointMismatch: a newer format, or the first option that differs, with both values.
    """
    name = type(who).__name__
    if state.get("format") != FORMAT:
        raise CheckpointMismatch(
            f"the checkpoint's {name} state has format {state.get('format')}, this version reads {FORMAT}; "
            f"update lightning-compress"
        )
    saved = state["recipe"]
    for option in sorted({*saved, *recipe}):
        if repr(saved.get(option)) != repr(recipe.get(option)):  # step 1 is not the fraction 1.0
            raise CheckpointMismatch(
                f"the checkpoint was made by {name} with {option}={saved.get(option)!r}, this run has "
                f"{option}={recipe.get(option)!r}; resume with the same recipe, or start a new compression from its "
                f"weights with load_from_checkpoint and no ckpt_path"
            )


@runtime_checkable
class Compression(Protocol):
    """A callback of this package that compresses: it has a recipe, and says when it is done."""

    enabled: bool

    @property
    def complete(self) -> bool:
        """Whether the target has been reached."""
        ...

    def recipe(self) -> dict[str, Any]:
        """Return the options as primitives."""
        ...


class Recipient(Compression, Protocol):
    """A compressing callback with a state in checkpoints."""

    state_key: Any


def compressions(trainer: L.Trainer) -> list[Compression]:
    """Return the Trainer's callbacks that compress, in its order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Compression)]  # type: ignore[attr-defined]


def state_key(who: Recipient) -> str:
    """Return the name of a callback's state in a checkpoint, so that two of one class with other options can meet."""
    return f"{type(who).__qualname__}{who.recipe()}"


def check_unclaimed(
    who: Recipient, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
) -> None:
    """Raise if a checkpoint has a state of this callback's class under other options only: its `on_load_checkpoint`.

    Raises:
        CheckpointMismatch: as `check_state`.
    """
    saved: dict[str, Any] = checkpoint.get("callbacks", {})
    claimed = {callback.state_key for callback in trainer.callbacks}  # type: ignore[attr-defined]
    for key in sorted(saved.keys() - claimed):
        if who.enabled and who.state_key not in saved and key.startswith(f"{type(who).__qualname__}{{"):
            check_state(saved[key], who.recipe(), who)


def warn_if_unfinished(who: Recipient, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Warn that the fit ended before the window of a callback did: its `on_train_end`."""
    if not (who.complete or trainer.fast_dev_run):  # type: ignore[attr-defined]
        rank_zero_warn(
            f"{type(who).__name__} did not finish: the fit ended before its window did. It was stopped early, or "
            f"takes fewer optimizer steps than batches (manual optimization); train on, or give the window in steps"
        )

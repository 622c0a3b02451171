"""Checkpoints of a module that has changed its shape: what they carry, and how they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as L
import torch
from torch import nn

from lightning_compress.callbacks.averages import averaged_modules
from lightning_compress.callbacks.contract import SHARDING
from lightning_compress.callbacks.step import intercept
from lightning_compress.errors import CheckpointMismatch
from lightning_compress.factorization.factors import factored_layers, factors_in, restore_factors
from lightning_compress.pruning.shrink import describe_shapes, restore_shapes

__all__ = ["SIGNPOST", "load_from_checkpoint", "restoring_shapes", "save_factors", "save_shapes"]

SHAPES = "lightning_compress_shapes"
# A plain strict load names unexpected keys: this one says what to do.
SIGNPOST = "this checkpoint is of other shapes; load it with lightning_compress.load_from_checkpoint(path, YourModule)"
Module = TypeVar("Module", bound=L.LightningModule)


def save_shapes(pl_module: nn.Module, checkpoint: dict[str, Any], shrunken: bool) -> None:
    """Write down the module's shapes next to its weights, and in the weights a sign for who loads them plainly."""
    checkpoint[SHAPES] = describe_shapes(pl_module)
    if shrunken:
        _put_up_signpost(checkpoint)


def save_factors(trainer: L.Trainer, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Put a sign for who loads them plainly into weights of layers that are two by now, if weights are whole."""
    if factored_layers(pl_module) and not isinstance(trainer.strategy, SHARDING):
        _put_up_signpost(checkpoint)


def _put_up_signpost(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"] = {**checkpoint["state_dict"], SIGNPOST: torch.zeros(0)}


def _reshape(pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
    for state in ("state_dict", "current_model_state"):  # the latter is of Lightning's WeightAveraging
        checkpoint.get(state, {}).pop(SIGNPOST, None)
    restore_factors(pl_module, checkpoint.get("state_dict", {}))
    if SHAPES in checkpoint:
        restore_shapes(pl_module, checkpoint[SHAPES])


def restoring_shapes(trainer: L.Trainer, pl_module: L.LightningModule) -> Callable[[], None]:
    """Give the module and averaged copies a checkpoint's shapes before weights are loaded. Runs at `setup`.

    Raises (on loading):
        CheckpointMismatch: the strategy shards, and the checkpoint is of a shrunken module.

    Returns:
        A function that ends it.
    """

    def client(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(trainer.strategy, SHARDING):  # the module is in parts by now
            if SIGNPOST in args[0].get("state_dict", {}):
                raise CheckpointMismatch(
                    f"this checkpoint is of a model of other shapes, which {type(trainer.strategy).__name__} cannot "
                    f"restore in parts; load it with lightning_compress.load_from_checkpoint, and fit that module"
                )
            return original(*args, **kwargs)
        for module in (pl_module, *averaged_modules(trainer)):
            _reshape(module, args[0])
        return original(*args, **kwargs)

    return intercept(pl_module, "on_load_checkpoint", client)


def load_from_checkpoint(path: str | Path, module_class: type[Module], **kwargs: Any) -> Module:
    """Load a checkpoint of a module that StructuredPruning or LowRank has changed, as `module_class` would its own.

    Args:
        path: a checkpoint made with the callback in the Trainer's list.
        module_class: the LightningModule's class.
        kwargs: as for `load_from_checkpoint`: `map_location`, arguments of the constructor.

    Raises:
        CheckpointMismatch: the shapes are not in it (`save_weights_only=True`).
    """
    original = module_class.on_load_checkpoint

    def reshaping(self: Any, checkpoint: dict[str, Any]) -> None:
        if SHAPES not in checkpoint and not factors_in(checkpoint.get("state_dict", {})):
            raise CheckpointMismatch(
                f"'{path}' holds no shapes: it was saved with save_weights_only=True, or without StructuredPruning and "
                f"LowRank; save whole checkpoints, or use {module_class.__name__}.load_from_checkpoint"
            )
        _reshape(self, checkpoint)
        original(self, checkpoint)

    # On the class for the time of loading, and not on a subclass: a checkpoint of LightningCLI names the class. The
    # weights are loaded inside Lightning's own function, after this hook.
    own = "on_load_checkpoint" in vars(module_class)
    module_class.on_load_checkpoint = reshaping  # type: ignore[method-assign]
    try:
        return module_class.load_from_checkpoint(path, **kwargs)
    finally:
        if own:
            module_class.on_load_checkpoint = original  # type: ignore[method-assign]
        else:
            del module_class.on_load_checkpoint

"""What compressing callbacks do alike at Lightning's moments: go on after a resume, log what became known, let go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import lightning.pytorch as L

from lightning_compress.callbacks.clock import Clock, restore_data_place
from lightning_compress.callbacks.contract import check_state

__all__ = ["go_on", "keep_state", "log", "log_unlogged", "release"]


class Attached(Protocol):
    """A callback that has hooks in the run."""

    def _release(self) -> None: ...


class Logging(Protocol):
    """A callback that keeps numbers of a step until the step is over."""

    _unlogged: dict[str, float]


class Resuming(Protocol):
    """A callback with a recipe that takes its state over when training starts."""

    enabled: bool
    _restored: dict[str, Any] | None

    def recipe(self) -> dict[str, Any]:
        """Return the options as primitives."""
        ...


def keep_state(who: Resuming, state_dict: dict[str, Any]) -> None:
    """Keep what a checkpoint holds until `on_train_start`: a `load_state_dict`.

    Raises:
        CheckpointMismatch: it is of another recipe or a newer format.
    """
    if who.enabled and state_dict:
        check_state(state_dict, who.recipe(), who)
        who._restored = state_dict


def go_on(
    trainer: L.Trainer,
    clock: Clock,
    restored: dict[str, Any] | None = None,
    take_over: Callable[[dict[str, Any]], None] | None = None,
) -> bool:
    """Go on where the run was left: its data, the callback's state, the time. Runs at `on_train_start`.

    Args:
        trainer: of the run.
        clock: the callback's.
        restored: what its checkpoint held; None without one.
        take_over: takes that over, the clock's part too.

    Returns:
        Whether the run was resumed from one without this callback, whose clock is set to the run's time then.
    """
    restore_data_place(trainer)
    if restored is not None and take_over is not None:
        take_over(restored)
    elif clock.steps == 0 and trainer.global_step > 0:
        clock.start_at(trainer.global_step // max(1, len(trainer.optimizers)))
        return True
    return False


def log(trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
    """Give numbers to every logger at once, under the run's step."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)


def log_unlogged(who: Logging, trainer: L.Trainer, *_: Any, **__: Any) -> None:
    """Log what an optimizer step made known: an `on_train_batch_end`, when `global_step` has moved on."""
    if who._unlogged:
        log(trainer, who._unlogged)
        who._unlogged = {}


def release(who: Attached, *_: Any, **__: Any) -> None:
    """Take all hooks out of the run: a `teardown` and an `on_exception`."""
    who._release()

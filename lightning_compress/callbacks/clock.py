"""One clock for all callbacks: optimizer steps that really happened, whoever took them.

It ticks in the optimizers' own post-step hooks, which fire under accumulation, manual optimization, raw torch
optimizers and several steps a batch, and stay silent when a gradient scaler skips a step. `trainer.global_step` is
wrong in several of these cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Timer
from torch.optim import Optimizer

from lightning_compress.window import Moment
from lightning_compress.zero import Handle, on_step, skipped

__all__ = ["Clock", "restore_data_place", "run_length"]

ENDLESS = 2**62


def run_length(trainer: L.Trainer, moments: Iterable[Moment]) -> int:
    """Return the run's length in optimizer steps; an endless or timed run has one only if all moments are steps.

    Raises:
        ValueError: a fraction of a run whose length is unknown (max_time, endless data, max_epochs=-1).
    """
    timed = any(isinstance(callback, Timer) and callback.time_remaining() is not None for callback in trainer.callbacks)  # type: ignore[attr-defined]
    total = trainer.estimated_stepping_batches
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return ENDLESS  # the smoke test of a longer run, whose windows are not to be judged by its few steps
    unknown = timed or math.isinf(total) or total < 0
    if not unknown:
        return int(total)
    if any(isinstance(moment, float) for moment in moments):
        raise ValueError(
            f"the run's length is unknown (max_time={'set' if timed else None}, max_epochs={trainer.max_epochs}, "
            f"max_steps={trainer.max_steps}), so {tuple(moments)} cannot be fractions of it; "
            f"give the window in optimizer steps (ints), or set max_steps"
        )
    return ENDLESS


def restore_data_place(trainer: L.Trainer) -> None:
    """Put a stateful loader where its checkpoint left it. Runs at `on_train_start`.

    Lightning does so only where it loads the data itself, not once somebody asked for the run's length at `setup`.
    """
    loop = trainer.fit_loop
    states = getattr(loop, "_combined_loader_states_to_load", None)
    if states and loop._combined_loader is not None and loop._data_fetcher is not None:
        loop._combined_loader._load_state_dicts(states)
        loop._combined_loader_states_to_load = []
        iter(loop._data_fetcher)


class Clock:
    """Counts, for each optimizer, the steps that really happened; the time is the largest count."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self._handles: list[Handle] = []

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return max(self.counts, default=0)

    def attach(self, optimizers: Sequence[Optimizer], after_step: Callable[[Optimizer, bool], None]) -> None:
        """Tick from now on after each step; `after_step` is then told the optimizer and whether time moved on."""
        self.detach()
        self.counts += [self.steps] * (len(optimizers) - len(self.counts))
        for index, optimizer in enumerate(optimizers):
            self._handles.append(on_step(optimizer, self._ticker(index, after_step)))

    def _ticker(self, index: int, after_step: Callable[[Optimizer, bool], None]) -> Callable[..., None]:
        def tick(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if skipped(optimizer):
                return
            before = self.steps
            self.counts[index] += 1
            after_step(optimizer, self.steps > before)

        return tick

    def detach(self) -> None:
        """Stop ticking; the count stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def start_at(self, steps: int) -> None:
        """Set the time of a run that was resumed without this callback's state."""
        self.counts = [steps] * max(1, len(self.counts))

    def reset(self) -> None:
        """Start again at zero; for a fresh run with the same callback object."""
        self.counts = []

    def state_dict(self) -> dict[str, list[int]]:
        """Return the counts as primitives."""
        return {"counts": list(self.counts)}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """Take over saved counts, keeping one for each optimizer of this run."""
        saved = [int(count) for count in state["counts"]]
        self.counts = saved + [max(saved, default=0)] * (len(self.counts) - len(saved))

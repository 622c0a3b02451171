"""LotteryRewinding: at each round of pruning, put the weights that stay back to their values of an early step."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import lightning.pytorch as L
from torch import Tensor
from torch.optim import Optimizer

from lightning_compress.callbacks.averages import averaged_models
from lightning_compress.callbacks.clock import Clock, run_length
from lightning_compress.callbacks.contract import (
    check_state,
    check_unclaimed,
    described,
    is_final_at_setup,
    saved_state,
    state_key,
)
from lightning_compress.callbacks.lifecycle import go_on, log, release
from lightning_compress.callbacks.order import Claim, check_together
from lightning_compress.callbacks.pruning import GradualPruning
from lightning_compress.callbacks.sameness import takes_part
from lightning_compress.callbacks.timetable import timetable
from lightning_compress.errors import CheckpointMismatch, CompressError, NothingToCompress
from lightning_compress.pruning.rewinding import copied, fresh_state, live_tensors, put_back, restart
from lightning_compress.window import Moment, resolve_moment

__all__ = ["LotteryRewinding"]


class LotteryRewinding(L.Callback):
    """Put the whole model back to its values of an early step whenever GradualPruning raises the sparsity.

    Runs inside the optimizer step of such an update, once the new masks are there: every parameter gets the value that
    it had after optimizer step `to`, the masks are applied to it, and momentum and moments are forgotten. Learning
    rates and the data go on. Frankle & Carbin 2019, "The Lottery Ticket Hypothesis", section 1; Frankle et al. 2020,
    "Linear Mode Connectivity", algorithm 2.

    Args:
        to: the step whose values come back, before the first update: 0 is the start, an int an optimizer step, a
            float a fraction of the run.
        buffers: put back buffers too (batch norm's statistics); False lets them go on.
        enabled: False is plain pruning.

    Raises:
        NothingToCompress: no GradualPruning is in the Trainer's list.
        ValueError: `to` is not before the first update.
        CheckpointMismatch: the run is resumed after step `to`, from a checkpoint without its values.
    """

    def __init__(self, to: Moment = 0, buffers: bool = True, enabled: bool = True) -> None:
        super().__init__()
        self.to, self.buffers, self.enabled = to, buffers, enabled
        self.clock = Clock()
        self.snapshot: dict[str, Tensor] = {}
        self.rounds: list[tuple[int, float]] = []
        self._step = 0
        self._prunings: list[GradualPruning] = []
        self._fresh: list[dict[Any, Any]] = []
        self._behind: set[int] = set()
        self._unlogged = False

    @property
    def complete(self) -> bool:
        """Whether the last round has begun, because every pruning of the run has made its last update."""
        return not self.enabled or (bool(self._prunings) and all(pruning.complete for pruning in self._prunings))

    def claims(self) -> list[Claim]:
        """Say that this callback rewinds; two would not agree to where."""
        return [Claim(type(self).__name__, "rewind", frozenset({"the module"}))] if self._prunings else []

    def recipe(self) -> dict[str, Any]:
        """Return the options as primitives, as a checkpoint and a logger keep them."""
        return {"to": described(self.to), "buffers": self.buffers}

    # Attaching and detaching

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not takes_part(self, trainer, pl_module, stage):
            return
        listed = trainer.callbacks  # type: ignore[attr-defined]
        self._prunings = [callback for callback in listed if isinstance(callback, GradualPruning)]
        if not self._prunings:
            raise NothingToCompress(
                "LotteryRewinding found no pruning whose rounds it could follow; add GradualPruning to the Trainer's "
                "callbacks, or remove it"
            )
        if trainer.global_step == 0:  # a fresh run with the same callback object
            self.clock.reset()
            self.snapshot, self.rounds = {}, []
        if is_final_at_setup(pl_module):
            self._prepare(trainer)

    def _prepare(self, trainer: L.Trainer) -> None:
        self._step = resolve_moment(self.to, run_length(trainer, (self.to,)), "to")
        for pruning in (pruning for pruning in self._prunings if pruning.enabled):
            begin = timetable(trainer, pruning.window, pruning.frequency).begin
            if self._step > begin or self._step == begin > 0:
                raise ValueError(
                    f"to is step {self._step}, but GradualPruning makes its first update at step {begin}; weights go "
                    f"back to values from before it: set to below {begin}, or let the pruning's window begin later"
                )
        check_together(trainer.callbacks)  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.enabled:
            return
        self._prepare(trainer)
        self._fresh, self._behind = [fresh_state(optimizer) for optimizer in trainer.optimizers], set()
        for pruning in self._prunings:
            pruning.after_update.append(self._after_update)
        self.clock.attach(trainer.optimizers, partial(self._after_step, trainer))
        if self._step == self.clock.steps == 0:  # now, because an update at step 0 may come before `on_train_start`
            self.snapshot = copied(live_tensors(pl_module, self.buffers))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.enabled:
            return
        if go_on(trainer, self.clock) and self.clock.steps >= self._step:
            raise CheckpointMismatch(
                f"the checkpoint is of step {self.clock.steps} and has no values of step {self._step} to rewind "
                f"to; start anew from its weights with load_from_checkpoint and no ckpt_path, or set to to a "
                f"later step"
            )
        differing = sorted(self.snapshot.keys() ^ live_tensors(pl_module, self.buffers).keys())
        if self.snapshot and differing:
            raise CheckpointMismatch(
                f"the checkpoint's values to rewind to are of another module; first difference: '{differing[0]}'; "
                f"resume with the module that made it"
            )

    teardown = on_exception = release

    def _release(self) -> None:
        self.clock.detach()
        for pruning in self._prunings:
            if self._after_update in pruning.after_update:
                pruning.after_update.remove(self._after_update)
        self._prunings, self._fresh = [], []

    # Rounds

    def _after_update(self, trainer: L.Trainer, step: int, before: float, after: float) -> None:
        if after <= before:
            return
        if not self.snapshot:
            raise CompressError(
                f"GradualPruning raised the sparsity at step {step}, after what was its last round when the values of "
                f"step {self._step} were let go; give its window in optimizer steps, and an end that is not moved by "
                f"training on"
            )
        self._rewind(trainer, self.snapshot)
        for optimizer, state in zip(trainer.optimizers, self._fresh, strict=True):
            restart(optimizer, state)
        # Whoever takes this very step after us takes it for weights that are gone: it is undone then.
        self._behind = {index for index, count in enumerate(self.clock.counts) if count == step - 1}
        self.rounds.append((step, after))
        self._unlogged = True

    def _after_step(self, trainer: L.Trainer, optimizer: Optimizer, time_moved: bool) -> None:
        index = trainer.optimizers.index(optimizer)
        if self.clock.counts[index] == self._step:
            names = self._left_to(optimizer, trainer) if self.snapshot else self._live(trainer)
            self.snapshot |= copied({name: self._live(trainer)[name] for name in names})
        if index in self._behind:
            self._behind.remove(index)
            self._rewind(trainer, self._left_to(optimizer, trainer))
            restart(optimizer, self._fresh[index])

    def _live(self, trainer: L.Trainer) -> dict[str, Tensor]:
        return live_tensors(trainer.lightning_module, self.buffers)

    def _left_to(self, optimizer: Optimizer, trainer: L.Trainer) -> list[str]:
        """Names of all that no other optimizer moves: what is its own, and buffers."""
        others = [group for other in trainer.optimizers if other is not optimizer for group in other.param_groups]
        moved = {id(parameter) for group in others for parameter in group["params"]}
        return [name for name, tensor in self._live(trainer).items() if id(tensor) not in moved]

    def _rewind(self, trainer: L.Trainer, names: Iterable[str]) -> None:
        copies = {name: self.snapshot[name] for name in names}
        put_back(self._live(trainer), copies)
        for average in averaged_models(trainer):  # what they have averaged so far is gone too
            put_back(average, copies)
        for pruning in self._prunings:
            pruning.keeper.apply()
            for average in averaged_models(trainer):
                pruning.keeper.apply(weights=average)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self._unlogged:
            log(trainer, {"compress/rounds": float(len(self.rounds))})
            self._unlogged = False
        if self.complete:
            self.snapshot = {}  # the checkpoints from here on are as small as without it

    # Checkpoints

    state_key = property(state_key)
    on_load_checkpoint = check_unclaimed

    def state_dict(self) -> dict[str, Any]:
        if not self.enabled:
            return {}
        state = {"clock": self.clock.state_dict(), "snapshot": dict(self.snapshot)}
        return saved_state(self.recipe(), **state, rounds=[list(row) for row in self.rounds])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.enabled and state_dict:
            check_state(state_dict, self.recipe(), self)
            self.clock.load_state_dict(state_dict["clock"])
            self.snapshot = {name: value.cpu() for name, value in state_dict["snapshot"].items()}
            self.rounds = [(int(step), float(sparsity)) for step, sparsity in state_dict["rounds"]]

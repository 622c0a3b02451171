"""StructuredPruning: whole channels and heads go, first as zeros, then out of the module, while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.callbacks.clock import Clock
from lightning_compress.callbacks.contract import (
    SHARDING,
    check_unclaimed,
    described,
    is_whole_at_setup,
    saved_state,
    state_key,
    warn_if_unfinished,
)
from lightning_compress.callbacks.gathering import Gathering
from lightning_compress.callbacks.lifecycle import go_on, keep_state, log, release
from lightning_compress.callbacks.loading import restoring_shapes, save_shapes
from lightning_compress.callbacks.masking import MaskKeeper
from lightning_compress.callbacks.order import Claim, check_together
from lightning_compress.callbacks.reshaping import Traced, needed, remove_channels, saved_trace, trace
from lightning_compress.callbacks.sameness import takes_part
from lightning_compress.callbacks.timetable import Timetable, timetable
from lightning_compress.divergence import check_same
from lightning_compress.pruning.channels import Removal, checked, choose
from lightning_compress.pruning.criteria import magnitude
from lightning_compress.pruning.shrink import check_optimizers
from lightning_compress.pruning.statistics import ACTIVATIONS, GRADIENTS, Statistics
from lightning_compress.pruning.targets import PRUNABLE, asks_for, checked_scores
from lightning_compress.schedule import Cubic, Moment, Schedule, check_frequency, check_sparsity
from lightning_compress.select import patterns_or_none
from lightning_compress.sharding import clean_name, cut

__all__ = ["StructuredPruning"]

LEAVE_ZEROS = "leave zeros in with removal=Removal(times=0) and take them out afterwards (remove_zero_channels)"
KNOWN = GRADIENTS | ACTIVATIONS | {"weight", "name", "step"}


class StructuredPruning(L.Callback):
    """Prune channels, hidden units and attention heads, and take them out of the module: it gets smaller and faster.

    Runs inside each optimizer step (what is out is zero in every layer it passes through) and at the end of the
    batches after which channels are removed: parameters, optimizer state and the layers' attributes shrink in place,
    and training goes on. Which channels belong together is found by tracing one forward. Li et al. 2017; Fang et al.
    2023, "DepGraph".

    Args:
        amount: share of the budget that goes by the window's end, in [0, 1) (a cubic schedule from 0); or a schedule,
            progress through the window -> amount. 0 switches the callback off.
        window: first and last update; floats are fractions of the run, ints are optimizer steps.
        frequency: distance between updates; a float is a fraction of the run, an int optimizer steps.
        include: names, globs, class names or types whose outputs may go; None is every Linear and Conv.
        exclude: the same, left out.
        criterion: a function to scores of a weight's shape, as in `GradualPruning`; a channel's score is the mean over
            all layers it passes through, relative to the group's mean unless the criterion asks for gradients.
        removal: the budget (MACs), limits per layer, and how often channels are removed.
        enabled: False is plain training.

    Raises:
        ValueError: an amount outside [0, 1) or more than the limits allow, a window out of order.
        NothingToCompress: nothing can go; the message has each reason.
        CompressError: the forward cannot be traced.
        IncompatibleCallbacks: somebody else prunes these weights, or a layer computes its weight before each forward.
    """

    def __init__(
        self,
        amount: float | Callable[[float], float] = 0.5,
        window: tuple[Moment, Moment] = (0.1, 0.5),
        frequency: Moment = 0.05,
        include: list[str | type] | None = None,
        exclude: list[str | type] | None = None,
        criterion: Callable[..., Tensor] = magnitude,
        removal: Removal | None = None,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        if not callable(amount) and not isinstance(amount, (int, float)):
            raise TypeError(f"amount must be a function or a number, got {amount!r}")
        self.schedule: Schedule = Cubic(check_sparsity(amount)) if isinstance(amount, (int, float)) else amount
        final = check_sparsity(self.schedule(1.0))
        self.window = (window[0], window[1]) if len(window) == 2 else tuple(window)
        self.frequency = check_frequency(frequency)
        self.include, self.exclude = patterns_or_none(include), patterns_or_none(exclude)
        self.criterion, self.removal = criterion, checked(removal)
        self.enabled = enabled and not (final == 0.0 and isinstance(self.schedule, Cubic))
        asked = asks_for(criterion, KNOWN)
        self.clock, self.times, self.keeper = Clock(), Timetable(), MaskKeeper()
        self.gathering = Gathering(Statistics(asked), self.keeper)
        self.history: list[tuple[int, float, float]] = []
        self.traced: Traced | None = None
        self._relative = not asked & GRADIENTS
        self._needs_steps = bool(asked & (GRADIENTS | ACTIVATIONS))
        self._layers: dict[str, nn.Module] = {}
        self._removals = 0
        self._restored: dict[str, Any] | None = None
        self._unlogged: dict[str, float] = {}
        self._undo: list[Callable[[], None]] = []

    @property
    def complete(self) -> bool:
        """Whether the last update has been made, and the channels are out."""
        return not self.enabled or (
            bool(self.history) and self.clock.steps >= self.times.end and self._removals == self._removals_by_now()
        )

    def claims(self) -> list[Claim]:
        """Say which weights this callback prunes."""
        names = frozenset(slot.tensor for group in self.traced.groups for slot in group.slots) if self.traced else None
        return [Claim(type(self).__name__, "prune", names)] if names else []

    def recipe(self) -> dict[str, Any]:
        """Return the options as primitives, as a checkpoint and a logger keep them."""
        options = ("schedule", "window", "frequency", "include", "exclude", "criterion", "removal")
        return {option: described(getattr(self, option)) for option in options}

    # Attaching and detaching

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        sharding = () if self.removal.times and stage == "fit" else SHARDING
        if not takes_part(self, trainer, pl_module, stage, sharding, LEAVE_ZEROS):
            return
        self._release()
        self._undo.append(restoring_shapes(trainer, pl_module))
        if stage != "fit":
            return
        self._restored = None
        if trainer.global_step == 0:  # a fresh run with the same callback object
            self.clock.reset()
            self.traced, self.history, self._removals = None, [], 0
            self.keeper.masks = {}
            self.gathering.statistics.clear()
        if is_whole_at_setup(trainer, pl_module):
            self._trace(trainer, pl_module)

    def _trace(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.times = timetable(trainer, self.window, self.frequency)
        if self.traced is None:
            self.traced = trace(trainer, pl_module, self.include, self.exclude, self.removal)
        if self.traced is None:
            return
        self.traced.check_amount(self.schedule(1.0), self.removal)
        check_together(trainer.callbacks)  # type: ignore[attr-defined]

    def _plan(self) -> Traced:
        return needed(self.traced)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.enabled:
            return
        check_optimizers(trainer.optimizers if self.removal.times else ())
        if self._restored is not None:  # the module is as small as it was then, so it is not traced again
            self.traced = saved_trace(self._restored["traced"]) if self._restored["traced"] else None
        self._trace(trainer, pl_module)
        self._attach(trainer, pl_module)

    def _attach(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take hold of the module's parameters as they are now; again after each removal."""
        self.keeper.weights = self._plan().parameters(pl_module)
        self.keeper.find_parts(trainer.strategy.model or pl_module)
        self.keeper.start(self, trainer, pl_module)
        layers = ((clean_name(name), layer) for name, layer in pl_module.named_modules() if isinstance(layer, PRUNABLE))
        self._layers = {f"{name}.weight": layer for name, layer in layers if f"{name}.weight" in self.keeper.weights}
        self.gathering.start(trainer, pl_module, self._layers)

        def after_step(optimizer: Optimizer, time_moved: bool) -> None:
            if time_moved and self.times.due(self.clock.steps):
                self._update(trainer, self.clock.steps)
            else:
                self.keeper.apply(self.keeper.owned(optimizer))

        self.clock.attach(trainer.optimizers, after_step)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.enabled:
            return
        go_on(trainer, self.clock, self._restored, lambda state: self._take_over(state, trainer))
        self._restored = None
        late = self.clock.steps >= self.times.begin and self._amount(self.clock.steps) > 0.0
        if not self.history and late and not self._needs_steps:
            self._update(trainer, self.clock.steps)
        self._remove_if_due(trainer, pl_module)

    on_train_end = warn_if_unfinished
    teardown = on_exception = release

    def _release(self) -> None:
        self.clock.detach()
        self.gathering.stop()
        self.keeper.weights, self._layers = {}, {}
        while self._undo:
            self._undo.pop()()

    # Updating masks

    def _amount(self, step: int) -> float:
        return check_sparsity(self.schedule(self.times.progress(step)))

    @torch.no_grad()
    def _update(self, trainer: L.Trainer, step: int) -> None:
        self.keeper.apply()
        self.gathering.statistics.reduce()
        scores = self._scores(step)
        self.gathering.statistics.reset()
        plan = self._plan()
        plan.survivors.kept = choose(scores, plan.share, self._amount(step), self.removal)
        check_same(plan.survivors.kept, "channels", step)
        self._mask(trainer)
        gone = 1.0 - plan.share(plan.survivors.kept)
        self.history.append((step, self._amount(step), gone))
        self._unlogged = {f"compress/removed_{self.removal.of}": gone, "compress/amount_target": self._amount(step)}

    def _scores(self, step: int) -> dict[str, Tensor]:
        targets = self.gathering.targets(self._layers, self.criterion, step, comes_back=True)  # units know what is out
        checked_scores(targets, step)
        return self._plan().survivors.scores({t.name: t.scores() for t in targets}, self._relative, self.keeper.parts)

    def _mask(self, trainer: L.Trainer) -> None:
        if self._plan().survivors.masked:
            masks = self._plan().survivors.masks(self.keeper.shapes)
            self.keeper.replace(trainer, (cut(masks[n], self.keeper.parts.get(n)) for n in self.keeper.weights))

    # Removing channels

    def _removals_by_now(self) -> int:
        # Of what the last update has zeroed: progress through the window says how many removals are due.
        return int(self.times.progress(self.history[-1][0]) * self.removal.times + 1e-9) if self.history else 0

    def _remove_if_due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._removals == self._removals_by_now():
            return
        self._removals = self._removals_by_now()
        survivors = self._plan().survivors
        remove_channels(trainer, pl_module, survivors.groups_now(), survivors.kept_now())
        survivors.taken_out()
        masks, self.keeper.masks = self.keeper.masks, {}
        self._attach(trainer, pl_module)
        self.gathering.statistics.cut(masks, self.keeper.weights)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.enabled:
            self._remove_if_due(trainer, pl_module)
        if self._unlogged:
            size = float(sum(parameter.numel() for parameter in pl_module.parameters()))
            log(trainer, {**self._unlogged, "compress/parameters": size})
            self._unlogged = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if self.enabled:
            self.gathering.before_optimizer_step(trainer, pl_module, optimizer)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.gathering.after_backward(trainer, pl_module)

    # Checkpoints

    state_key = property(state_key)
    on_load_checkpoint = check_unclaimed

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.enabled and not self.keeper.parts:
            save_shapes(pl_module, checkpoint, shrunken=self.traced is not None and self.traced.survivors.shrunken)

    def state_dict(self) -> dict[str, Any]:
        if not self.enabled:
            return {}
        traced, units = (self.traced.state_dict(), self.traced.survivors.state_dict()) if self.traced else ({}, {})
        state = {"clock": self.clock.state_dict(), "units": units, "removals": self._removals, "traced": traced}
        history = [list(row) for row in self.history]
        return saved_state(self.recipe(), **state, history=history, gathered=self.gathering.state_dict())

    load_state_dict = keep_state

    def _take_over(self, state: dict[str, Any], trainer: L.Trainer) -> None:
        self.history = [(int(step), float(target), float(gone)) for step, target, gone in state["history"]]
        self._removals = int(state["removals"])
        self._plan().survivors.load_state_dict(state["units"])
        self.clock.load_state_dict(state["clock"])
        self.gathering.load_state_dict(state["gathered"])
        self._mask(trainer)

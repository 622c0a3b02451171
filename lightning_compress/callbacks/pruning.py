"""GradualPruning: prune on a schedule by any criterion and pattern, with masks applied after each optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.callbacks.clock import Clock
from lightning_compress.callbacks.contract import (
    ZERO,
    check_unclaimed,
    described,
    is_final_at_setup,
    refuse_under_zero,
    saved_state,
    state_key,
    warn_if_unfinished,
)
from lightning_compress.callbacks.gathering import Gathering
from lightning_compress.callbacks.lifecycle import go_on, keep_state, log_unlogged, release
from lightning_compress.callbacks.masking import MaskKeeper
from lightning_compress.callbacks.order import Claim, check_together
from lightning_compress.callbacks.sameness import takes_part
from lightning_compress.callbacks.timetable import Timetable, timetable
from lightning_compress.divergence import check_same
from lightning_compress.pruning.criteria import magnitude
from lightning_compress.pruning.patterns import Unstructured
from lightning_compress.pruning.statistics import ACTIVATIONS, GRADIENTS, Statistics
from lightning_compress.pruning.targets import PRUNABLE, Target, asks_for, checked_scores
from lightning_compress.schedule import (
    Constant,
    Cubic,
    Moment,
    Schedule,
    check_frequency,
    check_sparsity,
)
from lightning_compress.select import layers_of, patterns_or_none, select_weights

__all__ = ["GradualPruning"]

KNOWN = GRADIENTS | ACTIVATIONS | {"weight", "name", "step"}


class GradualPruning(L.Callback):
    """Prune the lowest scores of the whole selection, a few more at each update, to exactly the asked sparsity.

    Runs inside each optimizer step: weights that are out are zeroed again, and at the schedule's steps the masks
    are made anew. Where gradients are clipped or mixed, theirs are zeroed first. Zhu & Gupta 2017.

    Args:
        sparsity: fraction of zeros over all selected weights at the window's end, in [0, 1) (a cubic schedule from
            0); or a schedule, progress through the window -> sparsity. 0 switches the callback off.
        window: first and last update; floats are fractions of the run, ints are optimizer steps.
        frequency: distance between updates; a float is a fraction of the run, an int optimizer steps.
        include: names, globs, class names or types to prune; None is every Linear and Conv but the output head.
        exclude: the same, left out.
        criterion: a function to scores of a weight's shape, higher = keep; its parameters' names say what it needs
            (`lightning_compress.pruning.criteria`).
        pattern: which weights go together and how layers compete (`lightning_compress.pruning.patterns`, `.regrowth`);
            None is `Unstructured()`, single weights under one threshold.
        enabled: False is plain training.

    Raises:
        ValueError: a sparsity outside [0, 1), a window out of order or longer than the run, a pattern that does not
            fit a weight, a criterion that needs gradients before there was a step.
        NothingToCompress: nothing is selected.
        IncompatibleCallbacks: another callback prunes one of these weights.
    """

    def __init__(
        self,
        sparsity: float | Callable[[float], float] = 0.9,
        window: tuple[Moment, Moment] = (0.1, 0.7),
        frequency: Moment = 0.01,
        include: list[str | type] | None = None,
        exclude: list[str | type] | None = None,
        criterion: Callable[..., Tensor] = magnitude,
        pattern: Callable[..., Any] | None = None,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        self.pattern = Unstructured() if pattern is None else pattern
        for name, value in (("sparsity", sparsity), ("criterion", criterion), ("pattern", self.pattern)):
            if not callable(value) and not (name == "sparsity" and isinstance(value, (int, float))):
                raise TypeError(f"{name} must be a function{' or a number' * (name == 'sparsity')}, got {value!r}")
        # Patterns that grow as much as they drop are at one sparsity from the start.
        numbered = Constant if hasattr(self.pattern, "growth") else Cubic
        self.schedule: Schedule = numbered(check_sparsity(sparsity)) if isinstance(sparsity, (int, float)) else sparsity
        final = check_sparsity(self.schedule(1.0))
        self.window = (window[0], window[1]) if len(window) == 2 else tuple(window)
        self.frequency = check_frequency(frequency)
        self.include, self.exclude = patterns_or_none(include), patterns_or_none(exclude)
        self.criterion = criterion
        self.enabled = enabled and not (final == 0.0 and isinstance(self.schedule, numbered))
        asked = asks_for(criterion, KNOWN)
        grown_by = getattr(self.pattern, "growth", None)
        if grown_by is not None and self.schedule(0.0) != final:
            raise ValueError(
                f"{described(self.pattern)} holds one sparsity, got {described(self.schedule)}, which moves from "
                f"{self.schedule(0.0):g} to {final:g}; give a number or Constant"
            )
        statistics = Statistics(asked | (asks_for(grown_by, KNOWN) if grown_by else frozenset()))
        self.clock, self.times, self.keeper = Clock(), Timetable(), MaskKeeper()
        self.gathering = Gathering(statistics, self.keeper)
        self.history: list[tuple[int, float, float]] = []
        self.after_update: list[Callable[[L.Trainer, int, float, float], None]] = []
        self._needs_steps = asked & (GRADIENTS | ACTIVATIONS)
        self._comes_back = "movement" in asked or grown_by is not None
        self._layers: dict[str, nn.Module] = {}
        self._restored: dict[str, Any] | None = None
        self._unlogged: dict[str, float] = {}

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The selected weights by clean name; empty outside a fit."""
        return self.keeper.weights

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by clean name, True = keep; empty before the first update."""
        return self.keeper.masks

    @property
    def complete(self) -> bool:
        """Whether the last update has been made."""
        return not self.enabled or (bool(self.masks) and self.clock.steps >= self.times.end)

    def claims(self) -> list[Claim]:
        """Say which weights this callback prunes."""
        return [Claim(type(self).__name__, "prune", frozenset(self.weights))] if self.weights else []

    def recipe(self) -> dict[str, Any]:
        """Return the options as primitives, as a checkpoint and a logger keep them."""
        options = ("schedule", "window", "frequency", "include", "exclude", "criterion", "pattern")
        return {option: described(getattr(self, option)) for option in options}

    # Attaching and detaching

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not takes_part(self, trainer, pl_module, stage, ZERO):
            return
        refuse_under_zero(trainer, self, self._refused_by_zero(), "score by magnitude, and let no weight grow")
        self.keeper.weights, self._restored = {}, None
        if trainer.global_step == 0:  # a fresh run with the same callback object
            self.clock.reset()
            self.keeper.masks, self.gathering.last_values, self.history = {}, {}, []
            self.gathering.statistics.clear()
        if is_final_at_setup(pl_module):
            self._prepare(trainer, pl_module)

    def _refused_by_zero(self) -> str:
        if self._needs_steps:
            return f"criterion {described(self.criterion)} of gradients or activations"
        return f"pattern {described(self.pattern)}" if self._comes_back else ""

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.times = timetable(trainer, self.window, self.frequency)
        if self.times.begin == 0 and self._needs_steps and self._target(0) > 0.0:
            raise ValueError(
                f"criterion {described(self.criterion)} needs {', '.join(sorted(self._needs_steps))}, which no step "
                f"has given yet at the window's begin, step 0; begin at step 1 or later: window=(1, {self.window[1]})"
            )
        self.keeper.weights = select_weights(pl_module, PRUNABLE, self.include, self.exclude)
        self.keeper.find_parts(trainer.strategy.model or pl_module)
        self.gathering.statistics.check(pl_module, self.weights)
        self._layers = layers_of(pl_module, self.weights)
        check_pattern = getattr(self.pattern, "check", None)
        if check_pattern is not None:
            check_pattern(self._targets(), self.schedule(1.0))
        check_together(trainer.callbacks)  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.enabled:
            return
        self._prepare(trainer, pl_module)

        def after_step(optimizer: Optimizer, time_moved: bool) -> None:
            if time_moved and self.times.due(self.clock.steps):
                self._update(trainer, self.clock.steps)
            else:
                self.keeper.apply(self.keeper.owned(optimizer))

        self.keeper.start(self, trainer, pl_module)
        self.gathering.start(trainer, pl_module, self._layers)
        self.clock.attach(trainer.optimizers, after_step)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.enabled:
            return
        go_on(trainer, self.clock, self._restored, self._take_over)
        self._restored = None
        late = self.clock.steps >= self.times.begin and self._target(self.clock.steps) > 0.0
        if not self.masks and late and not self._needs_steps:
            self._update(trainer, self.clock.steps)
        self.keeper.apply()

    on_train_end = warn_if_unfinished
    teardown = on_exception = release

    def _release(self) -> None:
        self.clock.detach()
        self.gathering.stop()
        self.keeper.weights, self._layers = {}, {}

    # Updating masks

    def _target(self, step: int) -> float:
        return check_sparsity(self.schedule(self.times.progress(step)))

    def _targets(self, step: int = 0) -> list[Target]:
        return self.gathering.targets(self._layers, self.criterion, step, self._comes_back)

    @torch.no_grad()
    def _update(self, trainer: L.Trainer, step: int) -> None:
        target, before = self._target(step), self.history[-1][2] if self.history else 0.0
        self.keeper.apply()  # the optimizer has moved what is out: its score must be that of zero
        self.gathering.statistics.reduce()
        scored = self._targets(step)
        if len(checked_scores(scored, step)) > 1:
            scored = [replace(target, widen=True) for target in scored]
        masks, threshold = self.pattern(scored, target, self.times.progress(step))
        self.keeper.replace(trainer, self.gathering.remembering(masks))
        check_same({} if self.keeper.parts else self.masks, "mask", step)
        self.gathering.statistics.reset()
        sparsity = self.keeper.sparsity()
        self.history.append((step, target, sparsity))
        self._unlogged = {"compress/sparsity": sparsity, "compress/sparsity_target": target}
        if not math.isnan(threshold):  # local thresholds are many
            self._unlogged["compress/threshold"] = threshold
        for listener in self.after_update:
            listener(trainer, step, before, sparsity)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if self.enabled:
            self.gathering.before_optimizer_step(trainer, pl_module, optimizer)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.gathering.after_backward(trainer, pl_module)

    on_train_batch_end = log_unlogged

    # Checkpoints

    state_key = property(state_key)
    on_load_checkpoint = check_unclaimed

    def state_dict(self) -> dict[str, Any]:
        if not self.enabled:
            return {}
        history = [list(row) for row in self.history]
        gathered = self.gathering.state_dict()
        state = {"clock": self.clock.state_dict(), "masks": self.keeper.packed(), "history": history}
        return saved_state(self.recipe(), **state, gathered=gathered)

    load_state_dict = keep_state

    def _take_over(self, state: dict[str, Any]) -> None:
        self.clock.load_state_dict(state["clock"])
        self.history = [(int(step), float(target), float(actual)) for step, target, actual in state["history"]]
        self.keeper.unpack(state["masks"])
        self.gathering.load_state_dict(state.get("gathered", {}))

"""SparsityRegularization: learn in training which weights can go, and let them go at the window's end."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.callbacks.averages import averaged_models
from lightning_compress.callbacks.clock import Clock, run_length
from lightning_compress.callbacks.contract import (
    check_unclaimed,
    described,
    is_final_at_setup,
    saved_state,
    state_key,
    warn_if_unfinished,
)
from lightning_compress.callbacks.lifecycle import go_on, keep_state, log_unlogged, release
from lightning_compress.callbacks.masking import MaskKeeper
from lightning_compress.callbacks.order import Claim, check_together
from lightning_compress.callbacks.sameness import takes_part
from lightning_compress.callbacks.step import around_loss
from lightning_compress.pruning.criteria import magnitude
from lightning_compress.pruning.gates import Gate
from lightning_compress.pruning.gating import LearnedGates, called_weights
from lightning_compress.pruning.patterns import Unstructured
from lightning_compress.pruning.penalties import l1, penalties_of
from lightning_compress.pruning.targets import PRUNABLE, Criterion, Target
from lightning_compress.quantization.fake import forget_compiled_code
from lightning_compress.schedule import Constant, Moment, Schedule, check_sparsity, resolve_window
from lightning_compress.select import layers_of, patterns_or_none, select_weights

__all__ = ["SparsityRegularization"]


class SparsityRegularization(L.Callback):
    """Train towards sparse weights: `loss + weight * (sum of a term over layers)`, then zero exactly the asked share.

    Runs around each `training_step` of the window. The term is a penalty of the weights (`l1`, `group_lasso`,
    `hoyer_square`), or a gate with learned parameters that weights pass in each forward (`HardConcrete`,
    `SoftThreshold`, `SoftMovement`). At the window's end gates are folded into the weights and the lowest |w| (of
    gates: scores) of the whole selection are zeroed for good. Validation has no penalty.

    Args:
        term: a function, weight -> scalar tensor, as in `lightning_compress.pruning.penalties`; or a gate with its
            own options and learning rate, as in `lightning_compress.pruning.gates`.
        weight: of the term's sum in the loss, at least 0; or a schedule, progress through the window -> weight.
        sparsity: fraction of zeros over all selected weights from the window's end on, in [0, 1); 0 zeroes nothing,
            as before `StructuredPruning` or beside `GradualPruning`.
        window: when the term begins and ends; floats are fractions of the run, ints are optimizer steps.
        include: names, globs, class names or types; None is every Linear and Conv but the output head (for gates not
            the projection of `nn.MultiheadAttention`, which is used without being called).
        exclude: the same, left out.
        enabled: False is plain training; so is a weight of 0 with a sparsity of 0.

    Raises:
        ValueError: an option out of its range, a window out of order, too long or over when the run is resumed, a
            term that gives no scalar, or a gate under fp16's gradient scaler.
        NothingToCompress: nothing is selected.
        IncompatibleCallbacks: another callback prunes or gates one of these weights.
    """

    def __init__(
        self,
        term: Callable[..., Any] = l1,
        weight: float | Schedule = 1e-4,
        sparsity: float = 0.9,
        window: tuple[Moment, Moment] = (0.1, 0.7),
        include: list[str | type] | None = None,
        exclude: list[str | type] | None = None,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        if not callable(term):
            raise TypeError(f"term must be a function, weight -> scalar tensor, or a gate, got {term!r}")
        if not callable(weight) and (isinstance(weight, bool) or not (math.isfinite(weight) and weight >= 0.0)):
            raise ValueError(f"weight is the term's factor in the loss, at least 0, got {weight!r}")
        self.term, self.window = term, tuple(window)
        self.weight: Schedule = weight if callable(weight) else Constant(float(weight))
        self.sparsity = check_sparsity(sparsity)
        self.include, self.exclude = patterns_or_none(include), patterns_or_none(exclude)
        self.enabled = enabled and not (self.sparsity == 0.0 and self.weight == Constant(0.0))
        self.clock, self.keeper = Clock(), MaskKeeper()
        self.gates = LearnedGates(term) if isinstance(term, Gate) else None
        self.history: list[tuple[int, float, float]] = []
        self._begin, self._end = 0, 1
        self._undo: Callable[[], None] | None = None
        self._restored: dict[str, Any] | None = None
        self._unlogged: dict[str, float] = {}

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The selected weights by clean name; empty outside a fit."""
        return self.keeper.weights

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by clean name, True = keep; empty before the window's end."""
        return self.keeper.masks

    @property
    def complete(self) -> bool:
        """Whether the window has ended."""
        return not self.enabled or bool(self.history)

    def claims(self) -> list[Claim]:
        """Say which weights this callback prunes and gates."""
        actions = ["prune"] * (self.sparsity > 0.0) + ["gate"] * (self.gates is not None)
        return [Claim(type(self).__name__, action, frozenset(self.weights)) for action in actions if self.weights]

    def recipe(self) -> dict[str, Any]:
        """Return the options as primitives, as a checkpoint and a logger keep them."""
        named = ("term", "weight", "sparsity", "window", "include", "exclude")
        return {option: described(getattr(self, option)) for option in named}

    # Attaching and detaching

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not takes_part(self, trainer, pl_module, stage):
            return
        if self.gates and getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                f"gates such as {described(self.term)} cannot learn from gradients that precision='16-mixed' scales; "
                f"use precision='bf16-mixed', or a penalty such as term=l1"
            )
        self.keeper.weights, self._restored = {}, None
        if trainer.global_step == 0:  # a fresh run with the same callback object
            self.clock.reset()
            self.keeper.masks, self.history = {}, []
            if self.gates:
                self.gates.clear()
        if is_final_at_setup(pl_module):
            self._prepare(trainer, pl_module)

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin, self._end = resolve_window(self.window, run_length(trainer, self.window), ("begin", "end"))
        self.keeper.weights = select_weights(pl_module, PRUNABLE, self.include, self.exclude)
        if self.gates:
            self.keeper.weights = called_weights(pl_module, self.weights)
        self._terms()  # a term that is no scalar is named now
        check_together(trainer.callbacks)  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.enabled:
            return
        self._prepare(trainer, pl_module)
        self._undo = around_loss(pl_module, functools.partial(self._penalized, pl_module))

        def after_step(optimizer: Optimizer, time_moved: bool) -> None:
            owned = self.keeper.owned(optimizer)
            if self.gates and self.gates.attached:
                self.gates.step(owned)
            self.keeper.apply(owned)
            if time_moved and not self.complete:
                self._move_on(trainer, pl_module)

        self.keeper.start(self, trainer, pl_module)
        self.clock.attach(trainer.optimizers, after_step)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.enabled:
            return
        go_on(trainer, self.clock, self._restored, self._take_over)
        self._restored = None
        self.keeper.apply()
        if self.clock.steps >= self._end and not self.complete:
            raise ValueError(
                f"SparsityRegularization's window ends at step {self._end}, but the run goes on at step "
                f"{self.clock.steps}: nothing could be learned; give a later window"
            )
        self._move_on(trainer, pl_module)

    on_train_end = warn_if_unfinished
    teardown = on_exception = release

    def _release(self) -> None:
        self.clock.detach()
        if self._undo:
            self._undo()
        if self.gates and self.gates.attached:
            self.gates.detach()
            forget_compiled_code()
        self._undo, self.keeper.weights = None, {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running fit, so that the callback pickles and copies at any time."""
        return {**self.__dict__, "_undo": None}

    # The loss

    @property
    def _active(self) -> bool:
        return self._begin <= self.clock.steps < self._end and not self.complete

    def _penalized(self, pl_module: L.LightningModule, loss: Tensor) -> Tensor:
        if not self._active:
            return loss
        term = torch.stack(self._terms()).sum()
        if not pl_module.trainer.barebones:
            name = getattr(self.term, "__name__", type(self.term).__name__)
            pl_module.log(f"compress/loss/{name}", term.detach(), batch_size=1)
        progress = (self.clock.steps - self._begin) / (self._end - self._begin)
        return loss + self.weight(progress) * term

    def _terms(self) -> list[Tensor]:
        if self.gates:
            return self.gates.penalties(self.weights)
        return penalties_of(self.term, self.weights)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if self.gates and self.gates.attached:
            self.gates.forget_stale_gradients(self.weights)

    # The window

    def _move_on(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open, keep up or close the gates at this step; with the window's end comes the cut."""
        if self.gates and self._active:
            if not self.gates.attached:
                self.gates.attach(pl_module, self.weights)
                forget_compiled_code()
            self.gates.draw(self.clock.steps)
        if self.clock.steps >= self._end and not self.complete:
            self._finish(trainer)

    @torch.no_grad()
    def _finish(self, trainer: L.Trainer) -> None:
        masks = self._masks(trainer.lightning_module)  # by scores from before gates are folded
        if self.gates:
            for copies in (self.weights, *averaged_models(trainer)):
                self.gates.fold(copies)
            self.gates.clear()
            forget_compiled_code()
        if self.sparsity > 0.0:
            self.keeper.replace(trainer, iter(masks))
        actual = self.keeper.sparsity() if self.masks else 0.0
        self.history.append((self.clock.steps, self.sparsity, actual))
        self._unlogged = {"compress/sparsity": actual, "compress/sparsity_target": self.sparsity}

    def _masks(self, pl_module: L.LightningModule) -> list[Tensor]:
        criterion: Criterion = self.gates.scores if self.gates else magnitude
        layers = layers_of(pl_module, self.weights)
        targets = [Target(n, weight.detach(), layers[n], criterion=criterion) for n, weight in self.weights.items()]
        mixed = len({target.check(self.clock.steps) for target in targets}) > 1
        targets = [replace(target, widen=mixed) for target in targets]
        return list(Unstructured()(targets, self.sparsity, 1.0)[0])

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self.keeper.before_optimizer_step(optimizer)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.keeper.after_backward(trainer, pl_module)

    on_train_batch_end = log_unlogged

    # Checkpoints

    state_key = property(state_key)
    on_load_checkpoint = check_unclaimed

    def state_dict(self) -> dict[str, Any]:
        if not self.enabled:
            return {}
        state = {"clock": self.clock.state_dict(), "masks": self.keeper.packed()}
        gates = self.gates.state_dict() if self.gates else {}
        return saved_state(self.recipe(), **state, history=[list(row) for row in self.history], gates=gates)

    load_state_dict = keep_state

    def _take_over(self, state: dict[str, Any]) -> None:
        self.clock.load_state_dict(state["clock"])
        self.history = [(int(step), float(target), float(actual)) for step, target, actual in state["history"]]
        self.keeper.unpack(state["masks"])
        if self.gates:
            self.gates.load_state_dict(state["gates"], self.weights)

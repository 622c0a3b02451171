"""Reconstruction: prune once, early in a fine-tune, and let the weights that stay make up for those that go."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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
from lightning_compress.errors import CompressError, NothingToCompress
from lightning_compress.pruning.hessians import RECONSTRUCTIBLE, InputHessians
from lightning_compress.pruning.reconstruction import check_groups, reconstruct_layer, share_zeros
from lightning_compress.quantization.fake import forget_compiled_code
from lightning_compress.select import patterns_or_none, select_weights
from lightning_compress.sharding import all_reduce_sum
from lightning_compress.window import Moment, check_sparsity, resolve_moment

__all__ = ["Reconstruction"]


class Reconstruction(L.Callback):
    """Prune every selected layer once so that its outputs move least, from the inputs of the steps before.

    Runs in the training forwards of the `batches` optimizer steps up to step `at`, where it sums up the inputs of the
    selected layers, and inside step `at`, where it prunes and changes the weights that stay. After every later step
    the zeros are zeroed again. `lightning_compress.pruning.reconstruction.reconstruct` does the same without training.
    Frantar & Alistarh 2023, "SparseGPT".

    Args:
        sparsity: fraction of zeros over all selected weights, exact to one weight, and in each layer; in [0, 1). 0
            switches the callback off.
        at: the optimizer step after which to prune: a float is a fraction of the run, an int a step.
        batches: optimizer steps whose inputs count.
        pattern: (keep, of), N:M along the inputs of a Linear and the input channels of a Conv, such as (2, 4).
        include: names, globs, class names or types; None is every Linear, Conv1d and Conv2d but the output head.
        exclude: the same, left out.
        damping: added to each Hessian's diagonal, by its mean.
        enabled: False is plain training.

    Raises:
        ValueError: an option out of its range, `at` is step 0 or after the run, a pattern that does not fit a weight.
        NothingToCompress: nothing is selected, or no selected layer runs.
        IncompatibleCallbacks: another callback prunes one of these weights.
        CompressError: NaN or infinite inputs or weights at step `at`.
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        at: Moment = 0.1,
        batches: int = 8,
        pattern: tuple[int, int] | None = None,
        include: list[str | type] | None = None,
        exclude: list[str | type] | None = None,
        damping: float = 0.01,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        self.sparsity, self.at, self.batches = check_sparsity(sparsity), at, batches
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
            raise ValueError(f"batches is a number of optimizer steps, at least 1, got {batches!r}")
        if not (math.isfinite(damping) and damping >= 0.0):
            raise ValueError(f"damping is a share of the Hessian's mean diagonal, 0 or more, got {damping}")
        self.pattern = None if pattern is None else (pattern[0], pattern[1])
        check_groups(self.pattern, self.sparsity)
        self.include, self.exclude = patterns_or_none(include), patterns_or_none(exclude)
        self.damping, self.enabled = float(damping), enabled and self.sparsity > 0.0
        self.clock, self.keeper, self.hessians = Clock(), MaskKeeper(), InputHessians()
        self.history: list[tuple[int, float, float]] = []
        self.errors: dict[str, float] = {}
        self._steps = (0, 1)
        self._gathered: int | None = None
        self._restored: dict[str, Any] | None = None
        self._unlogged: dict[str, float] = {}

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The selected weights by clean name; empty outside a fit."""
        return self.keeper.weights

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by clean name, True = keep; empty before step `at`."""
        return self.keeper.masks

    @property
    def complete(self) -> bool:
        """Whether the pruning has been done."""
        return not self.enabled or bool(self.masks)

    def claims(self) -> list[Claim]:
        """Say which weights this callback prunes."""
        return [Claim(type(self).__name__, "prune", frozenset(self.weights))] if self.weights else []

    def recipe(self) -> dict[str, Any]:
        """Return the options as primitives, as a checkpoint and a logger keep them."""
        options = ("sparsity", "at", "batches", "pattern", "include", "exclude", "damping")
        return {option: described(getattr(self, option)) for option in options}

    # Attaching and detaching

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not takes_part(self, trainer, pl_module, stage):
            return
        self.keeper.weights, self._restored, self._gathered = {}, None, None
        if trainer.global_step == 0:  # a fresh run with the same callback object
            self.clock.reset()
            self.keeper.masks, self.history, self.errors = {}, [], {}
        if is_final_at_setup(pl_module):
            self._prepare(trainer, pl_module)

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        at = resolve_moment(self.at, run_length(trainer, (self.at,)), "at")
        if at < 1:
            raise ValueError(
                f"at={self.at} is optimizer step {at}, before which no layer has had an input; set it to 1 or later, "
                f"or prune before the fit with lightning_compress.pruning.reconstruction.reconstruct"
            )
        self._steps = (max(0, at - self.batches), at)
        self.keeper.weights = select_weights(pl_module, RECONSTRUCTIBLE, self.include, self.exclude)
        check_groups(self.pattern, self.sparsity, self.weights)
        check_together(trainer.callbacks)  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.enabled:
            return
        self._prepare(trainer, pl_module)
        self.keeper.start(self, trainer, pl_module)
        self.hessians.attach(pl_module, self.weights)
        forget_compiled_code()
        self.clock.attach(trainer.optimizers, partial(self._after_step, trainer))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.enabled:
            return
        go_on(trainer, self.clock, self._restored, self._take_over)
        self._restored = None
        self._begin_if_due()
        self.keeper.apply()

    on_train_end = warn_if_unfinished
    teardown = on_exception = release

    def _release(self) -> None:
        self.clock.detach()
        if self.hessians.layers:
            self.hessians.detach()
            forget_compiled_code()
        self.keeper.weights = {}

    # Gathering inputs, pruning, keeping the zeros

    def _begin_if_due(self) -> None:
        # A run that was resumed later than this, without our state, gathers as long from where it is.
        if not self.masks and self._gathered is None and self.clock.steps >= self._steps[0]:
            self.hessians.start(self.weights)
            self._gathered = 0

    def _after_step(self, trainer: L.Trainer, optimizer: Optimizer, time_moved: bool) -> None:
        if self.masks:
            self.keeper.apply(self.keeper.owned(optimizer))
        elif time_moved and self._gathered is not None:
            self._gathered += 1
            if self._gathered >= self._steps[1] - self._steps[0]:
                self._prune(trainer, self.clock.steps)
        self._begin_if_due()

    @torch.no_grad()
    def _prune(self, trainer: L.Trainer, step: int) -> None:
        self._check_finite(step)
        shares = share_zeros(self.weights, self.sparsity)
        self.keeper.replace(trainer, (self._reconstructed(name, share) for name, share in shares.items()))
        self.hessians.stop(self.weights)
        self._gathered = None
        sparsity = self.keeper.sparsity()
        self.history.append((step, self.sparsity, sparsity))
        error = sum(self.errors.values()) / len(self.errors)
        self._unlogged = {"compress/sparsity": sparsity, "compress/reconstruction_error": error}

    def _check_finite(self, step: int) -> None:
        seen = 0
        for name, weight in self.weights.items():
            hessian = self.hessians[name]
            all_reduce_sum(hessian.sums)
            seen += int(all_reduce_sum(hessian.samples))
            for what, values in (("weights", weight), ("inputs", hessian.sums)):
                if not bool(torch.isfinite(values).all()):
                    raise CompressError(
                        f"NaN or infinite {what} of '{name}' at optimizer step {step}; nothing is pruned. Lower the "
                        f"learning rate or clip gradients, and resume from the last checkpoint"
                    )
        if not seen:
            raise NothingToCompress(
                f"none of the {len(self.weights)} selected layers was called in training in the {self._gathered} "
                f"steps before step {step}: {', '.join(self.weights)}; select layers that the forward calls"
            )

    def _reconstructed(self, name: str, sparsity: float) -> Tensor:
        layer, weight = self.hessians.layers[name][0], self.weights[name]
        mask, self.errors[name] = reconstruct_layer(
            name, layer, weight, self.hessians[name], sparsity, self.pattern, self.damping
        )
        return mask

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
        gathered: dict[str, Any] = {}
        if self._gathered is not None and self.hessians.layers:
            gathered = {"steps": self._gathered, "hessians": self.hessians.state_dict()}
        return saved_state(
            self.recipe(),
            clock=self.clock.state_dict(),
            masks=self.keeper.packed(),
            history=[list(row) for row in self.history],
            errors=dict(self.errors),
            gathered=gathered,
        )

    load_state_dict = keep_state

    def _take_over(self, state: dict[str, Any]) -> None:
        self.clock.load_state_dict(state["clock"])
        self.history = [(int(step), float(target), float(actual)) for step, target, actual in state["history"]]
        self.errors = {name: float(error) for name, error in state["errors"].items()}
        self.keeper.unpack(state["masks"])
        if state["gathered"]:
            self.hessians.start(self.weights)
            self.hessians.load_state_dict(state["gathered"]["hessians"])
            self._gathered = int(state["gathered"]["steps"])

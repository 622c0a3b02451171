"""GradualPruning: unstructured global pruning on a schedule, by masks applied in place after each optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_compress.callbacks.averages import averaged_models
from lightning_compress.callbacks.clock import Clock, restore_data_place, run_length
from lightning_compress.callbacks.contract import (
    check_state,
    check_strategy,
    check_unclaimed,
    described,
    gradients_are_read,
    is_final_at_setup,
    saved_state,
    state_key,
    warn_if_unfinished,
)
from lightning_compress.callbacks.order import Claim, check_together
from lightning_compress.errors import CheckpointMismatch, CompressError
from lightning_compress.pruning.criteria import magnitude
from lightning_compress.pruning.masks import apply_mask, pack_mask, unpack_mask
from lightning_compress.pruning.threshold import keep_masks
from lightning_compress.schedule import Cubic, Moment, Schedule, check_frequency, check_sparsity, resolve_window
from lightning_compress.select import patterns_or_none, select_weights

__all__ = ["ELEMENTWISE", "PRUNABLE", "GradualPruning"]

# These move each weight by its own gradient alone: what a masked weight's gradient is cannot matter to the others, and
# the weight is zeroed again after the step. Masking it anyway would cost a pass, and zero second moments make Adam's
# square root 15 times slower (Intel MKL). Others (Muon, Adafactor, LBFGS) mix entries.
ELEMENTWISE = frozenset(
    getattr(torch.optim, name)
    for name in ("Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD")
)

PRUNABLE: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class GradualPruning(L.Callback):
    """Prune the smallest weights of the whole selection, a few more at each update, to exactly the asked sparsity.

    Runs inside each optimizer step: weights that are out are zeroed again, and at the schedule's steps the masks
    are made anew. Where gradients are clipped or mixed, theirs are zeroed first. Zhu & Gupta 2017.

    Args:
        sparsity: fraction of zeros over all selected weights at the window's end, in [0, 1) (a cubic schedule from
            0); or a schedule, progress through the window -> sparsity. 0 switches the callback off.
        window: first and last update; floats are fractions of the run, ints are optimizer steps.
        frequency: distance between updates; a float is a fraction of the run, an int optimizer steps.
        include: names, globs, class names or types to prune; None is every Linear and Conv but the output head.
        exclude: the same, left out.
        criterion: weight -> non-negative scores of its shape, higher = keep.
        enabled: False is plain training.

    Raises:
        ValueError: a sparsity outside [0, 1), a window out of order or longer than the run.
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
        criterion: Callable[[Tensor], Tensor] = magnitude,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("sparsity", sparsity), ("criterion", criterion)):
            if not callable(value) and not (name == "sparsity" and isinstance(value, (int, float))):
                raise TypeError(f"{name} must be a function{' or a number' * (name == 'sparsity')}, got {value!r}")
        self.schedule: Schedule = Cubic(check_sparsity(sparsity)) if isinstance(sparsity, (int, float)) else sparsity
        final = check_sparsity(self.schedule(1.0))
        self.window = (window[0], window[1]) if len(window) == 2 else tuple(window)
        self.frequency = check_frequency(frequency)
        self.include, self.exclude = patterns_or_none(include), patterns_or_none(exclude)
        self.criterion = criterion
        self.enabled = enabled and not (final == 0.0 and isinstance(self.schedule, Cubic))
        self.clock = Clock()
        self.weights: dict[str, nn.Parameter] = {}
        self.masks: dict[str, Tensor] = {}
        self.history: list[tuple[int, float, float]] = []
        self._steps = (0, 0, 1)
        self._restored: dict[str, Any] | None = None
        self._unlogged: dict[str, float] = {}
        self._gradients_are_read = True

    @property
    def complete(self) -> bool:
        """Whether the last update has been made."""
        return not self.enabled or (bool(self.masks) and self.clock.steps >= self._steps[1])

    def claims(self) -> list[Claim]:
        """Say which weights this callback prunes."""
        return [Claim(type(self).__name__, "prune", frozenset(self.weights))] if self.weights else []

    def recipe(self) -> dict[str, Any]:
        """Return the options as primitives, as a checkpoint and a logger keep them."""
        options = ("schedule", "window", "frequency", "include", "exclude", "criterion")
        return {option: described(getattr(self, option)) for option in options}

    # Attaching and detaching

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not self.enabled:
            return
        check_strategy(trainer, self)
        self.weights, self._restored = {}, None
        if trainer.global_step == 0:  # a fresh run with the same callback object
            self.clock.reset()
            self.masks, self.history = {}, []
        if is_final_at_setup(pl_module):
            self._prepare(trainer, pl_module)

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = run_length(trainer, (*self.window, self.frequency))
        begin, end = resolve_window(self.window, total, ("begin", "end"))
        interval = round(self.frequency * total) if isinstance(self.frequency, float) else self.frequency
        self._steps = (begin, end, max(1, interval))
        self.weights = select_weights(pl_module, PRUNABLE, self.include, self.exclude)
        check_together(trainer.callbacks)  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.enabled:
            return
        self._prepare(trainer, pl_module)

        def after_step(optimizer: Optimizer, time_moved: bool) -> None:
            if time_moved and self._due(self.clock.steps):
                self._update(trainer, self.clock.steps)
            else:
                self._apply(self._owned(optimizer))

        self._gradients_are_read = gradients_are_read(self, trainer, pl_module)

        self.clock.attach(trainer.optimizers, after_step)

    def _owned(self, optimizer: Optimizer) -> list[str]:
        ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return [name for name, weight in self.weights.items() if id(weight) in ids]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.enabled:
            return
        restore_data_place(trainer)
        if self._restored is not None:
            self._take_over(self._restored)
            self._restored = None
        elif self.clock.steps == 0 and trainer.global_step > 0:  # resumed from a run without this callback
            self.clock.start_at(trainer.global_step // max(1, len(trainer.optimizers)))
        if not self.masks and self.clock.steps >= self._steps[0] and self._target(self.clock.steps) > 0.0:
            self._update(trainer, self.clock.steps)
        self._apply(self.weights)

    on_train_end = warn_if_unfinished

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        self.clock.detach()
        self.weights = {}

    # Updating and applying masks

    def _target(self, step: int) -> float:
        begin, end, _ = self._steps
        return check_sparsity(self.schedule(min(1.0, (step - begin) / (end - begin))))

    def _due(self, step: int) -> bool:
        begin, end, interval = self._steps
        return step == end or (begin <= step < end and (step - begin) % interval == 0)

    @torch.no_grad()
    def _update(self, trainer: L.Trainer, step: int) -> None:
        target = self._target(step)
        scores = self._scores(step)
        total = sum(score.numel() for score in scores)
        masks, threshold = keep_masks(scores, round(target * total))
        self.masks = dict(zip(self.weights, masks, strict=True))
        self._apply(self.weights)
        for average in averaged_models(trainer):
            self._apply(self.masks, average)
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, LBFGS):  # its curvature pairs belong to a loss with other weights in it
                optimizer.state.clear()
        zeros = sum(int((weight == 0).sum()) for weight in self.weights.values())
        self.history.append((step, target, zeros / total))
        self._unlogged = {
            "compress/sparsity": zeros / total,
            "compress/sparsity_target": target,
            "compress/threshold": threshold.value,
        }

    def _scores(self, step: int) -> list[Tensor]:
        scores = []
        for name, weight in self.weights.items():
            score = self.criterion(weight)
            if score.shape != weight.shape or not score.is_floating_point():
                raise ValueError(
                    f"criterion {described(self.criterion)} must return float scores of shape {tuple(weight.shape)} "
                    f"for '{name}', got {score.dtype} {tuple(score.shape)}"
                )
            if not bool(torch.isfinite(score).all()) or bool((score < 0).any()):
                raise CompressError(
                    f"criterion {described(self.criterion)} gave NaN, infinite or negative scores for '{name}' at "
                    f"optimizer step {step}; the masks are left as they were. Lower the learning rate or clip "
                    f"gradients, and resume from the last checkpoint"
                )
            scores.append(score)
        mixed = len({score.dtype for score in scores}) > 1
        return [score.float() for score in scores] if mixed else scores

    def _apply(self, names: Iterable[str], weights: dict[str, nn.Parameter] | None = None) -> None:
        for name in names if self.masks else ():
            weight = (weights or self.weights).get(name)
            if weight is not None:
                apply_mask(weight, self.masks[name].to(weight.device))  # SWA keeps its average on the CPU

    def _mask_gradients(self, names: Iterable[str]) -> None:
        for name in names if self.masks else ():
            gradient = self.weights[name].grad
            if gradient is not None:
                apply_mask(gradient, self.masks[name])

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        # Before clipping: weights that are out held most of a layer's gradient norm.
        if self.masks and (self._gradients_are_read or type(optimizer) not in ELEMENTWISE):
            self._mask_gradients(self._owned(optimizer))

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Manual optimization may clip before the step, and LBFGS evaluates several gradients inside one.
        mixed = any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers)
        if self.masks and (mixed or not pl_module.automatic_optimization):
            self._mask_gradients(self.weights)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self._unlogged:
            for logger in trainer.loggers:
                logger.log_metrics(self._unlogged, step=trainer.global_step)
            self._unlogged = {}

    # Checkpoints

    state_key = property(state_key)
    on_load_checkpoint = check_unclaimed

    def state_dict(self) -> dict[str, Any]:
        if not self.enabled:
            return {}
        masks = {name: pack_mask(mask) for name, mask in self.masks.items()}
        history = [list(row) for row in self.history]
        return saved_state(self.recipe(), clock=self.clock.state_dict(), masks=masks, history=history)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.enabled and state_dict:
            check_state(state_dict, self.recipe(), self)
            self._restored = state_dict

    def _take_over(self, state: dict[str, Any]) -> None:
        self.clock.load_state_dict(state["clock"])
        self.history = [(int(step), float(target), float(actual)) for step, target, actual in state["history"]]
        packed: dict[str, Tensor] = state["masks"]
        if packed and packed.keys() != self.weights.keys():
            differing = sorted(packed.keys() ^ self.weights.keys())
            raise CheckpointMismatch(
                f"the checkpoint has masks for other weights than this model's selection; first difference: "
                f"'{differing[0]}'; resume with the model and include/exclude that made it"
            )
        self.masks = {
            name: unpack_mask(packed[name].cpu(), weight.shape).to(weight.device)
            for name, weight in self.weights.items()
            if packed
        }

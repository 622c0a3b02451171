"""WeightSharing: at one moment of the run weights get a few values a layer, which are then trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_compress.callbacks.averages import averaged_models
from lightning_compress.callbacks.clock import Clock, run_length
from lightning_compress.callbacks.contract import (
    check_unclaimed,
    described,
    gradients_are_read,
    is_final_at_setup,
    saved_state,
    state_key,
    warn_if_unfinished,
)
from lightning_compress.callbacks.lifecycle import go_on, keep_state, log_unlogged, release
from lightning_compress.callbacks.masking import ELEMENTWISE
from lightning_compress.callbacks.order import Claim, check_together
from lightning_compress.callbacks.sameness import takes_part
from lightning_compress.divergence import check_same
from lightning_compress.errors import CheckpointMismatch, CompressError
from lightning_compress.select import layers_of, patterns_or_none, select_weights
from lightning_compress.weight_sharing.codebook import MOST_ENTRIES, linear
from lightning_compress.weight_sharing.codes import Codes, found_codes, pack_codes, unpack_codes
from lightning_compress.weight_sharing.sharing import SHAREABLE, entries_of
from lightning_compress.window import Moment, resolve_moment
from lightning_compress.zero import moved_by

__all__ = ["WeightSharing"]


class WeightSharing(L.Callback):
    """Let the weights of each layer share a few values from one moment of the run on, and train the values.

    Runs once after the batch of step `at`, where k-means finds the values and which weight has which; then before each
    optimizer step, where all weights of a value get the mean of their gradients, and after it, where they get their
    mean. Zeros stay zeros. `weight_sharing.sharing.share_weights` does the same without training. Han et al. 2016.

    Args:
        entries: values a layer, 2 to 256, that of zeros counted; or class name of a layer -> entries, such as
            {"Conv2d": 256, "Linear": 32}.
        at: the optimizer step after which to share: a float is a fraction of the run, an int a step. Pruning has to
            end before.
        start: a function, (values, entries) -> where k-means begins (`weight_sharing.codebook`).
        include: names, globs, class names or types; None is every Linear and Conv but the output head.
        exclude: the same, left as they are.
        enabled: False is plain training.

    Raises:
        ValueError: entries out of range or more than a weight has values, a class without entries, `at` after the run.
        NothingToCompress: nothing is selected.
        IncompatibleCallbacks: another callback shares one of these weights, or prunes it at step `at` or later.
        CompressError: NaN or infinite weights at step `at`.
    """

    def __init__(
        self,
        entries: int | Mapping[str, int] = 16,
        at: Moment = 0.8,
        start: Callable[..., Tensor] = linear,
        include: list[str | type] | None = None,
        exclude: list[str | type] | None = None,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        for each in entries.values() if isinstance(entries, Mapping) else [entries]:
            if isinstance(each, bool) or not isinstance(each, int) or not 2 <= each <= MOST_ENTRIES:
                raise ValueError(f"entries is a number of values a layer, 2 to {MOST_ENTRIES}, got {each!r}")
        if not callable(start):
            raise TypeError(f"start must be a function such as weight_sharing.codebook.density, got {start!r}")
        self.entries, self.at, self.start = entries, at, start
        self.include, self.exclude = patterns_or_none(include), patterns_or_none(exclude)
        self.enabled = enabled
        self.clock, self.at_step, self._length = Clock(), 0, 0
        self.codes: dict[str, Codes] = {}
        self._layers: dict[str, nn.Module] = {}
        self._wanted: dict[str, int] = {}
        self._gradients_are_read = True
        self._restored: dict[str, Any] | None = None
        self._unlogged: dict[str, float] = {}

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The selected weights by clean name, as they are now; empty outside a fit."""
        # Asked of the layers, for StructuredPruning puts smaller parameters into them.
        return {name: dict(layer.named_parameters(recurse=False))["weight"] for name, layer in self._layers.items()}

    @property
    def complete(self) -> bool:
        """Whether the weights share their values."""
        return not self.enabled or bool(self.codes)

    @property
    def books(self) -> dict[str, Tensor]:
        """The values of each weight by its clean name, (entries,), zero first; empty outside a fit and before `at`."""
        weights = self.weights
        return {
            name: torch.zeros(len(codes.counts), dtype=weight.dtype, device=weight.device).index_copy(
                0, codes.entry.flatten().long(), weight.detach().flatten()
            )
            for name, codes in self.codes.items()
            if (weight := weights.get(name)) is not None
        }

    def claims(self) -> list[Claim]:
        """Say which weights will share values."""
        return [Claim(type(self).__name__, "share", frozenset(self.weights))] if self.weights else []

    def recipe(self) -> dict[str, Any]:
        """Return the options as primitives, as a checkpoint and a logger keep them."""
        return {option: described(getattr(self, option)) for option in ("entries", "at", "start", "include", "exclude")}

    # Attaching and detaching

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not takes_part(self, trainer, pl_module, stage):
            return
        self._layers, self._restored = {}, None
        if trainer.global_step == 0:  # a fresh run with the same callback object
            self.clock.reset()
            self.codes = {}
        if is_final_at_setup(pl_module):
            self._prepare(trainer, pl_module)

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._length = run_length(trainer, (self.at,))
        self.at_step = resolve_moment(self.at, self._length, "at")
        weights = select_weights(pl_module, SHAREABLE, self.include, self.exclude)
        self._layers = layers_of(pl_module, weights)
        self._wanted = {name: entries_of(name, layer, self.entries) for name, layer in self._layers.items()}
        check_together(trainer.callbacks)  # type: ignore[attr-defined]

    def step_of(self, moment: Moment) -> int:
        """Return a moment of this run as an optimizer step, for callbacks whose end `at` has to follow."""
        return round(moment * self._length) if isinstance(moment, float) else moment

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.enabled:
            return
        self._prepare(trainer, pl_module)
        self._gradients_are_read = gradients_are_read(self, trainer, pl_module)
        self.clock.attach(trainer.optimizers, self._after_step)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.enabled:
            return
        go_on(trainer, self.clock, self._restored, self._take_over)
        self._restored = None
        self._share_if_due(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._average(self.weights)
        for average in averaged_models(trainer):  # to the bit: their means were rounded
            self._average(average)
        warn_if_unfinished(self, trainer, pl_module)

    teardown = on_exception = release

    def _release(self) -> None:
        self.clock.detach()
        self._layers = {}

    # Sharing

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        # Not inside the step, where it would matter whether pruning has zeroed its weights yet.
        self._share_if_due(trainer)
        log_unlogged(self, trainer)

    @torch.no_grad()
    def _share_if_due(self, trainer: L.Trainer) -> None:
        if not self.enabled or self.codes or self.clock.steps < self.at_step:
            return
        step, weights = self.clock.steps, self.weights
        for name, weight in weights.items():
            if not bool(torch.isfinite(weight).all()):
                raise CompressError(
                    f"NaN or infinite weights of '{name}' at optimizer step {step}; nothing is shared. Lower the "
                    f"learning rate or clip gradients, and resume from the last checkpoint"
                )
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        self.codes = {name: found_codes(each, self._wanted[name], self.start) for name, each in weights.items()}
        check_same({name: codes.entry for name, codes in self.codes.items()}, "codes", step)
        for held in (weights, *averaged_models(trainer)):
            self._average(held)
        self._average_moments(trainer.optimizers)
        self._unlogged = {"compress/sharing_error": _relative_error(weights, before)}

    def _average(self, weights: Mapping[str, nn.Parameter]) -> None:
        for name, codes in self.codes.items():
            if name in weights:
                codes.to(weights[name].device).average(weights[name].detach(), zeros=True)

    def _average_moments(self, optimizers: Iterable[Any]) -> None:
        # Members that share a value, a gradient and their moments are moved alike, to rounding.
        weights = self.weights
        for optimizer in optimizers:
            raw = getattr(optimizer, "optimizer", optimizer)
            if isinstance(raw, LBFGS):  # its curvature pairs belong to weights that each went their own way
                raw.state.clear()
            for name, codes in self.codes.items():
                for value in raw.state.get(weights[name], {}).values():
                    if isinstance(value, Tensor) and value.shape == codes.entry.shape:
                        codes.average(value, zeros=False)

    def _after_step(self, optimizer: Optimizer, time_moved: bool) -> None:
        self._average(self._moved_by(optimizer))

    def _moved_by(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        ids = {id(parameter) for parameter in moved_by(optimizer)}
        return {name: weight for name, weight in self.weights.items() if name in self.codes and id(weight) in ids}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if self.codes and pl_module.automatic_optimization:
            # Zero second moments make Adam's square root slow: zeros keep a gradient that nobody reads.
            pinned = self._gradients_are_read or type(optimizer) not in ELEMENTWISE
            self._average_gradients(self._moved_by(optimizer), zeros=pinned)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Where no hook may follow: manual optimization, and LBFGS, which asks several times.
        manual = not pl_module.automatic_optimization
        if self.codes and (manual or any(isinstance(each, LBFGS) for each in trainer.optimizers)):
            self._average_gradients(self.weights, zeros=True)

    def _average_gradients(self, weights: Mapping[str, nn.Parameter], zeros: bool) -> None:
        for name, weight in weights.items():
            if weight.grad is not None:
                self.codes[name].average(weight.grad, zeros)

    # Checkpoints

    state_key = property(state_key)
    on_load_checkpoint = check_unclaimed

    def state_dict(self) -> dict[str, Any]:
        if not self.enabled:
            return {}
        codes = {name: pack_codes(codes) for name, codes in self.codes.items()}
        return saved_state(self.recipe(), clock=self.clock.state_dict(), codes=codes)

    load_state_dict = keep_state

    def _take_over(self, state: dict[str, Any]) -> None:
        self.clock.load_state_dict(state["clock"])
        packed = state["codes"]
        if packed and packed.keys() != self.weights.keys():
            raise CheckpointMismatch(
                f"the checkpoint has codes for other weights than this model's selection; first difference: "
                f"'{sorted(packed.keys() ^ self.weights.keys())[0]}'; resume with the model and include/exclude that "
                f"made it"
            )
        self.codes = {
            name: unpack_codes(packed[name].cpu(), weight.shape).to(weight.device)
            for name, weight in self.weights.items()
            if packed
        }


def _relative_error(weights: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> float:
    """Squared change of all weights over their squares."""
    change = sum(float((weights[name] - before[name]).double().square().sum()) for name in before)
    return change / max(sum(float(value.double().square().sum()) for value in before.values()), 1e-30)

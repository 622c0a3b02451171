"""LowRank: at one moment of the run layers become two smaller ones each, which are then trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as L
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_compress.callbacks.clock import Clock, run_length
from lightning_compress.callbacks.contract import (
    SHARDING,
    check_unclaimed,
    described,
    is_tensor_parallel,
    is_whole_at_setup,
    saved_state,
    state_key,
    warn_if_unfinished,
)
from lightning_compress.callbacks.evidence import Evidence
from lightning_compress.callbacks.factoring import (
    PlainOptimizers,
    check_followers,
    check_found,
    factor_again,
    factor_layers,
    merge_layers,
    seen,
    shapes_of,
)
from lightning_compress.callbacks.lifecycle import go_on, keep_state, log, release
from lightning_compress.callbacks.loading import restoring_shapes, save_factors
from lightning_compress.callbacks.order import Claim, check_first, check_together
from lightning_compress.callbacks.sameness import takes_part
from lightning_compress.divergence import check_same
from lightning_compress.errors import NothingToCompress, UnsupportedStrategy
from lightning_compress.factorization.factors import factored_layers
from lightning_compress.factorization.lowrank import Decompose, check_weights, select_factorable, wants
from lightning_compress.factorization.ranks import Energy, Rank, check_rank
from lightning_compress.factorization.svd import activation_weighted_svd
from lightning_compress.select import patterns_or_none
from lightning_compress.window import Moment, resolve_moment

__all__ = ["LowRank"]

LEAVE_WHOLE = "let LowRank act before the layers are cut: at=0.0 with decompose=svd and merge=False, \
in a module that builds its layers in __init__"

CURE = "Lower the learning rate or clip gradients, and resume from the last checkpoint"


class LowRank(L.Callback):
    """Replace layers by two smaller ones each, where that saves weights and MACs, and train those on in the same run.

    Runs in the training forwards of the `batches` optimizer steps up to step `at`, where it gathers what the
    decomposition asks for, and once after the batch of step `at`, where the layers change; with `at=0.0` at `setup`,
    before optimizers and strategies see the module. Checkpoints carry the ranks: resume as ever, or load them with
    `lightning_compress.load_from_checkpoint`. `factorization.lowrank.factorize` does the same without training.

    Args:
        rank: one for all layers, or a rule such as `ranks.Budget(0.5)`; None is `ranks.Energy(0.9)`.
        at: the optimizer step after which to act: a float is a fraction of the run, an int a step.
        decompose: a function of `factorization.svd`, or one of weight, and of moment or fisher where it asks for them.
        batches: optimizer steps whose inputs and gradients count.
        include: names, globs, class names or types; None is every Linear, Conv1d and Conv2d that learns and runs, but
            the output head.
        exclude: the same, left as they are.
        merge: give plain layers and keys back at the end of the run.
        enabled: False is plain training.

    Raises:
        ValueError: an option out of its range, `at` after the run, or step 0 with a decomposition that wants batches.
        NothingToCompress: nothing is selected, or no layer would get smaller.
        IncompatibleCallbacks: another callback changes one of these weights.
        CompressError: an included layer cannot be two; NaN or infinite weights or inputs at step `at`.
    """

    def __init__(
        self,
        rank: Rank | None = None,
        at: Moment = 0.1,
        decompose: Decompose = activation_weighted_svd,
        batches: int = 8,
        include: list[str | type] | None = None,
        exclude: list[str | type] | None = None,
        merge: bool = False,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        rank = Energy(0.9) if rank is None else rank
        if isinstance(rank, bool) or not (callable(rank) or (isinstance(rank, int) and rank >= 1)):
            raise ValueError(f"rank is a number of at least 1, or a rule such as ranks.Energy(0.9), got {rank!r}")
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
            raise ValueError(f"batches is a number of optimizer steps, at least 1, got {batches!r}")
        if not callable(decompose):
            raise TypeError(f"decompose must be a function such as factorization.svd.svd, got {decompose!r}")
        asked = wants(decompose) - {"weight"}
        self.rank, self.at, self.decompose, self.batches = rank, at, decompose, batches
        self.include, self.exclude = patterns_or_none(include), patterns_or_none(exclude)
        self.merge, self.enabled = merge, enabled
        self.clock, self.evidence = Clock(), Evidence(asked)
        self.ranks: dict[str, int] = {}
        self._layers: dict[str, nn.Module] = {}
        self._steps = (0, 0)
        self._in_the_run = True
        self._restored: dict[str, Any] | None = None
        self._acted_at_setup = False
        self._optimizers: PlainOptimizers | None = None
        self._undo: list[Callable[[], None]] = []

    @property
    def complete(self) -> bool:
        """Whether the layers are two."""
        return not self.enabled or bool(self.ranks)

    def claims(self) -> list[Claim]:
        """Say which weights will be replaced while others may hold them."""
        names = frozenset(f"{name}.weight" for name in self._layers if self._in_the_run and not self.ranks)
        return [Claim(type(self).__name__, "factor", names)] if names else []

    def recipe(self) -> dict[str, Any]:
        """Return the options as primitives, as a checkpoint and a logger keep them."""
        options = ("rank", "at", "decompose", "batches", "include", "exclude", "merge")
        return {option: described(getattr(self, option)) for option in options}

    # Attaching and detaching

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        sharding = SHARDING if self.at == 0 and not self.merge and is_whole_at_setup(trainer, pl_module) else ()
        if not takes_part(self, trainer, pl_module, stage, sharding, LEAVE_WHOLE):
            return
        if is_tensor_parallel(trainer):
            raise UnsupportedStrategy(
                "LowRank makes layers two, which a plan of parallelize_module does not know; use "
                "tensor_parallel_size=1, or remove the callback"
            )
        self._release()
        self._undo.append(restoring_shapes(trainer, pl_module))
        if stage != "fit":
            return
        self._optimizers = PlainOptimizers(pl_module, self._two_since_the_run_began)
        self._undo.append(self._optimizers.stop)
        self._restored = None
        if trainer.global_step == 0:  # a fresh run with the same callback object
            self.clock.reset()
            self.ranks = {}
        if is_whole_at_setup(trainer, pl_module):
            self._prepare(trainer, pl_module)
            if not self._in_the_run and not self.ranks:
                check_first(self, trainer.callbacks)  # type: ignore[attr-defined]
                self._factor_at_setup(trainer, pl_module)

    def _two_since_the_run_began(self) -> Iterable[str]:
        ranks: dict[str, int] = self.ranks if self._restored is None else self._restored["ranks"]
        return ranks if self._in_the_run else ()

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # At `setup`, and again at `on_fit_start`, when the module's own hooks may have made layers.
        at = resolve_moment(self.at, run_length(trainer, (self.at,)), "at")
        if at < 1 and self.evidence.asked:
            raise ValueError(
                f"at={self.at} is optimizer step {at}, before which there were no inputs or gradients to weigh errors "
                f"by; set it to 1 or later, or decompose=lightning_compress.factorization.svd.svd"
            )
        self._steps = (max(0, at - self.batches), at)
        self._in_the_run = at > 0 or not is_whole_at_setup(trainer, pl_module)
        self._layers, _ = select_factorable(pl_module, self.include, self.exclude, frozen=False)
        found = {name: layer.rank for name, layer in factored_layers(pl_module).items()}
        if not self._layers:  # a second fit of a module whose layers are two
            check_found(found, self.rank)
            self.ranks = found
        elif not found:
            check_rank(self.rank, shapes_of(self._layers))
        check_together(trainer.callbacks)  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.enabled:
            return
        if self._optimizers is not None:
            self._optimizers.follow(trainer)
        if self._restored is not None:
            self.ranks = dict(self._restored["ranks"])
        elif self._acted_at_setup and not factored_layers(pl_module):  # the run goes on from a plain checkpoint
            self.ranks, self._acted_at_setup = {}, False
        if not self.ranks:
            self._prepare(trainer, pl_module)
        if not self.ranks:
            check_followers(trainer.optimizers)
            self.evidence.attach(trainer, pl_module, self._layers)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.enabled:
            return
        self.clock.attach(trainer.optimizers, self._after_step)
        go_on(trainer, self.clock, self._restored, self._take_over)
        self._restored = None
        factor_again(trainer, pl_module, self.ranks)  # once the optimizers have their state of merged layers
        self._begin_if_due()
        self._factor_if_due(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        warn_if_unfinished(self, trainer, pl_module)
        if self.enabled and self.merge:
            merge_layers(trainer, pl_module, self.ranks)

    teardown = on_exception = release

    def _release(self) -> None:
        self.clock.detach()
        self.evidence.detach()
        self._layers, self._optimizers = {}, None
        while self._undo:
            self._undo.pop()()

    # Gathering, and factoring

    def _begin_if_due(self) -> None:
        # A run that was resumed later than this, without our state, gathers as long from where it is.
        if not self.ranks and not self.evidence.gathers and self.clock.steps >= self._steps[0]:
            self.evidence.begin()

    def _after_step(self, optimizer: Optimizer, time_moved: bool) -> None:
        if time_moved and self.evidence.steps is not None:
            self.evidence.steps += 1
        self._begin_if_due()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self.evidence.before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.enabled:
            self._factor_if_due(trainer, pl_module)

    def _factor_if_due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        steps = self.evidence.steps
        if not self.ranks and steps is not None and steps >= self._steps[1] - self._steps[0]:
            self._factor(trainer, pl_module)

    def _factor_at_setup(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        try:
            self._factor(trainer, pl_module)
        except NothingToCompress:
            # A checkpoint may still bring other weights; if none does, it is said once more at `on_train_start`.
            if isinstance(trainer.strategy, SHARDING):
                raise
        self._acted_at_setup = bool(self.ranks)

    @torch.no_grad()
    def _factor(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        when = f" at optimizer step {self.clock.steps}"
        check_weights(self._layers, f"{when}; nothing is factored. {CURE}")
        known = self.evidence.of_layers(when) if self.evidence.layers else {name: {} for name in self._layers}
        layers = seen(self._layers, known, self.include is not None, self.evidence.steps)
        self.evidence.detach()
        found = {name: layer.rank for name, layer in factored_layers(pl_module).items()}
        try:
            self.ranks = factor_layers(trainer, pl_module, layers, known, self.decompose, self.rank)
        except NothingToCompress:
            if not found:
                raise
            self.ranks = found  # one more fit, of what an earlier one has left
        check_same({name: torch.tensor(self.ranks.get(name, 0)) for name in self._layers}, "ranks", self.clock.steps)
        size = float(sum(parameter.numel() for parameter in pl_module.parameters()))
        log(trainer, {"compress/parameters": size, "compress/factored_layers": float(len(self.ranks))})

    # Checkpoints

    state_key = property(state_key)
    on_load_checkpoint = check_unclaimed

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.enabled:
            save_factors(trainer, pl_module, checkpoint)

    def state_dict(self) -> dict[str, Any]:
        if not self.enabled:
            return {}
        gathered = self.evidence.state_dict()
        return saved_state(self.recipe(), clock=self.clock.state_dict(), ranks=dict(self.ranks), gathered=gathered)

    load_state_dict = keep_state

    def _take_over(self, state: dict[str, Any]) -> None:
        self.clock.load_state_dict(state["clock"])
        self.evidence.load_state_dict(state["gathered"])

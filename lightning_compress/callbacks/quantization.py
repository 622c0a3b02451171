"""QuantizationAwareTraining: calibrate, then train with rounded weights and inputs, then freeze the ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.callbacks.clock import Clock, restore_data_place, run_length
from lightning_compress.callbacks.contract import (
    ZERO,
    check_learning,
    check_state,
    check_unclaimed,
    described,
    is_final_at_setup,
    is_tensor_parallel,
    saved_state,
    state_key,
    warn_if_unfinished,
)
from lightning_compress.callbacks.lifecycle import log, release
from lightning_compress.callbacks.order import Claim, check_together
from lightning_compress.callbacks.sameness import takes_part
from lightning_compress.divergence import check_same
from lightning_compress.errors import NothingToCompress
from lightning_compress.quantization.attach import Phase
from lightning_compress.quantization.batchnorm import freeze_batch_norm, unfreeze_batch_norm
from lightning_compress.quantization.choosing import Override, Recipe, grids_of, override_of, select_quantizable
from lightning_compress.quantization.details import Details
from lightning_compress.quantization.fake import forget_compiled_code
from lightning_compress.quantization.grid import FLOAT_BITS
from lightning_compress.quantization.inputs import InputGrid
from lightning_compress.quantization.layers import QuantizedLayers
from lightning_compress.quantization.outputs import Ranges
from lightning_compress.quantization.placed import PlacedOutputs
from lightning_compress.quantization.weights import WeightGrid
from lightning_compress.quantization.whole_weights import check_tensor_parallel
from lightning_compress.select import patterns_or_none
from lightning_compress.window import Moment, resolve_window

__all__ = ["QuantizationAwareTraining"]


class QuantizationAwareTraining(L.Callback):
    """Train with rounded weights and inputs: by default weights per output channel, inputs per tensor, both to 8 bits.

    Runs in each forward of the selected layers, training and validation alike: first only the inputs' ranges are
    observed, then weights and inputs are rounded with a straight-through gradient, at last the ranges are frozen, and
    with them what grids learn. Zeros of pruning stay zero. Jacob et al. 2018. The projections of `MultiheadAttention`
    are layers; `Details(attention=True)` rounds its products.

    Args:
        weights: width of weight codes, 2 to 8, for `Symmetric(bits)`; or a grid, as in `quantization.weights`.
        inputs: width of input codes, 2 to 8, for `Affine(bits)`; or a grid, as in `quantization.inputs`; or None, which
            leaves inputs in floating point.
        window: when to observe, when to round, when to freeze the ranges; floats are fractions of the run, ints are
            optimizer steps.
        include: names, globs, class names or types; None is every Linear, Conv and MultiheadAttention but the output
            head. It may name ConvTranspose, and Embedding, whose weight only is rounded.
        exclude: the same, left in floating point.
        per_layer: pattern -> (weights, inputs), or weights' width, of selected layers; the last that matches counts.
        details: what makes ranges, learning rate of grids that learn, moments, noise, what else is rounded, compiled.
        enabled: False is plain training.

    Raises:
        ValueError: an option out of its range, a window out of order or longer than the run, integer weights, groups
            that do not divide a weight, a grid that learns under fp16's gradient scaler, inputs that are never finite.
        NothingToCompress: nothing is selected, or no selected layer was ever called.
        IncompatibleCallbacks: another callback quantizes one of these layers, or its weight is reparametrized.
    """

    def __init__(
        self,
        weights: int | WeightGrid = 8,
        inputs: int | InputGrid | None = 8,
        window: tuple[Moment, Moment, Moment] = (0.6, 0.7, 0.9),
        include: list[str | type] | None = None,
        exclude: list[str | type] | None = None,
        per_layer: Mapping[str, Override] | None = None,
        details: Details | None = None,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        grids = grids_of(weights, inputs)
        self.weights, self.inputs = grids.weights, grids.inputs
        self.window = tuple(window)
        self.include, self.exclude = patterns_or_none(include), patterns_or_none(exclude)
        self.per_layer = {pattern: override_of(each, inputs) for pattern, each in (per_layer or {}).items()}
        self.details, self.enabled = details or Details(), enabled
        self.clock = Clock()
        self.quantized = QuantizedLayers(Recipe(grids, tuple(self.per_layer.items())), self.details)
        self.steps, self._inputs_at, self._norms_at = (0, 0, 0), 0, float("inf")
        self._phase: tuple[Phase, bool] | None = None
        self._frozen_norms: list[nn.Module] = []
        self.outputs, self._folded_at = PlacedOutputs(self.details, self.quantized.gathered), 0
        self._restored: dict[str, Any] | None = None

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The selected layers by clean name; empty outside a run."""
        return self.quantized.layers

    @property
    def complete(self) -> bool:
        """Whether the ranges are frozen."""
        return not self.enabled or self._phase == (Phase.FROZEN, False)

    def ranges(self) -> Ranges:
        """Return what was trained, by layer name and, for outputs, `output_key`; for `export_onnx`, `fake_quantized`.

        Raises:
            NothingToCompress: no range was learned yet.
        """
        ranges = self.quantized.ranges()
        if not ranges:
            raise NothingToCompress("no ranges were learned here; call ranges() after fit, or load a checkpoint first")
        return {**ranges, **self.outputs.ranges()}

    def claims(self) -> list[Claim]:
        """Say which layers this callback quantizes."""
        return [Claim(type(self).__name__, "quantize", frozenset(self.layers))] if self.layers else []

    def recipe(self) -> dict[str, Any]:
        """Return the options as primitives, as a checkpoint and a logger keep them."""
        options = ("weights", "inputs", "window", "include", "exclude", "per_layer", "details")
        return {option: described(getattr(self, option)) for option in options}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not takes_part(self, trainer, pl_module, stage, ZERO):
            return
        self.quantized.layers, self._restored = {}, None
        if stage == "fit" and trainer.global_step == 0:  # a fresh run with the same callback object
            self.clock.reset()
            self.quantized.clear()
            self.outputs, self._folded_at = PlacedOutputs(self.details, self.quantized.gathered), 0
        if is_final_at_setup(pl_module):
            self._prepare(trainer, pl_module, stage)

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            late = (self.details.inputs_from, self.details.batch_norm_from)
            total = run_length(trainer, (*self.window, *(moment for moment in late if moment is not None)))
            self.steps = resolve_window(self.window, total, ("observe", "round", "freeze"))  # type: ignore[assignment]
            self._inputs_at, self._norms_at = self.details.resolved(total, *self.steps[1:])
        layers = select_quantizable(pl_module, self.include, self.exclude)
        learning = self.quantized.choose(pl_module, layers, trainer.strategy.model or pl_module)
        if is_tensor_parallel(trainer):
            grids = {name: self.quantized.grids(name) for name in layers}
            check_tensor_parallel(grids, self.details, type(self).__name__)
        if learning and stage == "fit":
            check_learning(trainer, self, str(learning))
        check_together(trainer.callbacks)  # type: ignore[attr-defined]
        self.quantized.attach(self.details.compiled, keep_weight=trainer.accumulate_grad_batches > 1)
        if self.outputs.placed:
            self.outputs.attach(pl_module, compiled=self.details.compiled)
        forget_compiled_code()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.enabled:
            self._prepare(trainer, pl_module, "fit")
            self.clock.attach(trainer.optimizers, self._after_step)

    def _after_step(self, optimizer: Optimizer, time_moved: bool) -> None:
        self.quantized.after_step(optimizer)

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not self.enabled:
            return
        if not self.layers or stage != "fit":
            self._prepare(trainer, pl_module, stage)
        if self._restored is not None:
            self._take_over(self._restored)
            self.quantized.check_known()
            self.clock.load_state_dict(self._restored["clock"])
            self._prepare(trainer, pl_module, stage)
            self._restored = None
        elif stage == "fit" and self.clock.steps == 0 and trainer.global_step > 0:
            self.clock.start_at(trainer.global_step // max(1, len(trainer.optimizers)))
        if stage == "fit":
            self._folded_at = self.clock.steps
            self._phase = None
            self._enter_phase(trainer)
        else:
            phase = Phase.FROZEN if self.quantized.extremes else Phase.OFF
            self.quantized.set_phase(phase)
            self.outputs.set_phase(phase)

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module, "fit")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.enabled:
            restore_data_place(trainer)
        self._start(trainer, pl_module, "fit")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._start(trainer, pl_module, "validate")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module, "test")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module, "predict")

    on_train_end = warn_if_unfinished
    teardown = on_exception = release

    def _release(self) -> None:
        self.clock.detach()
        self._thaw()
        self.quantized.detach()
        self.outputs.detach()
        forget_compiled_code()

    # Phases and ranges

    def _enter_phase(self, trainer: L.Trainer) -> None:
        phase = Phase(sum(self.clock.steps >= moment for moment in self.steps))
        entered = (phase, phase == Phase.ROUND and self.clock.steps < self._inputs_at)
        # In ROUND, a layer that is called for the first time starts rounding once it has a range.
        if entered == self._phase and not (phase == Phase.ROUND and self.quantized.some_wait):
            return
        self.outputs.enter(Phase.OBSERVE if entered == (Phase.ROUND, True) else phase, self.quantized.states)
        self._warn(self.quantized.enter(*entered, self.clock.steps))
        if self._phase is None or phase != self._phase[0]:
            bits = self.quantized.bits if phase >= Phase.ROUND else float(FLOAT_BITS)
            log(trainer, {"compress/bits": bits})
        self._phase = entered
        check_same({n: state.extremes for n, state in self.quantized.states.items()}, "range", self.clock.steps)

    def _warn(self, sentences: list[str]) -> None:
        for sentence in sentences:
            rank_zero_warn(f"{type(self).__name__}: {sentence}")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.enabled and self.clock.steps >= self._norms_at:
            self._frozen_norms = freeze_batch_norm(pl_module)
        if self.enabled:
            self.outputs.watch(pl_module)
        self.quantized.noise_at(self.clock.steps)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if self.enabled:
            self.quantized.forget_stale_gradients()
            phase = self._phase[0] if self._phase else Phase.OFF
            sentences = self.outputs.place(pl_module, self.layers, phase, self.details.compiled)
            if sentences is not None:
                self._warn(sentences)
                forget_compiled_code()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._thaw()
        if self.enabled and self.clock.steps != self._folded_at:
            self._folded_at = self.clock.steps
            self._warn(self.quantized.fold(self.details.average, self.clock.steps, self.outputs.by_key))
            self.outputs.share(self.quantized.states)
            self._enter_phase(trainer)

    def on_train_epoch_end(self, *_: Any) -> None:
        self._warn(self.quantized.not_finite())

    def _thaw(self) -> None:
        self.quantized.noise_at(None)
        unfreeze_batch_norm(self._frozen_norms)
        self._frozen_norms = []

    # Checkpoints

    state_key = property(state_key)
    on_load_checkpoint = check_unclaimed

    def state_dict(self) -> dict[str, Any]:
        if not self.enabled:
            return {}
        state = {**self.quantized.state_dict(), "outputs": self.outputs.state_dict()}
        return saved_state(self.recipe(), clock=self.clock.state_dict(), **state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.enabled and state_dict:
            check_state(state_dict, self.recipe(), self)
            self._restored = state_dict
            self._take_over(state_dict)

    def _take_over(self, state: dict[str, Any]) -> None:
        self.quantized.load_state_dict(state)
        self.outputs.load_state_dict(state["outputs"])

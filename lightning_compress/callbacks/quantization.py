"""QuantizationAwareTraining: calibrate, then train with rounded weights and inputs, then freeze the ranges."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.callbacks.clock import Clock, restore_data_place, run_length
from lightning_compress.callbacks.contract import (
    check_state,
    check_strategy,
    check_unclaimed,
    described,
    is_final_at_setup,
    saved_state,
    state_key,
    warn_if_unfinished,
)
from lightning_compress.callbacks.order import Claim, check_together
from lightning_compress.errors import CheckpointMismatch, NothingToCompress
from lightning_compress.quantization.attach import QUANTIZABLE, FakeQuant, Phase, attach, check_weight, detach
from lightning_compress.quantization.fake import compiler_available
from lightning_compress.quantization.grid import Range, check_bits
from lightning_compress.quantization.observers import move_ranges
from lightning_compress.select import patterns_or_none, select_layers
from lightning_compress.sharding import all_reduce_max
from lightning_compress.window import Moment, resolve_window

__all__ = ["QuantizationAwareTraining"]


class QuantizationAwareTraining(L.Callback):
    """Train with weights rounded per output channel (symmetric) and inputs rounded per tensor (affine).

    Runs in each forward of the selected layers, training and validation alike: first only the inputs' ranges are
    observed, then weights and inputs are rounded with a straight-through gradient, at last the ranges are frozen.
    Zeros of pruning stay zero. Jacob et al. 2018. `nn.MultiheadAttention` stays in floating point.

    Args:
        weight_bits: width of weight codes, 2 to 8.
        activation_bits: width of input codes, 2 to 8.
        window: when to observe, when to round, when to freeze the ranges; floats are fractions of the run, ints are
            optimizer steps.
        momentum: weight of the newest step in the moving average of ranges, in (0, 1].
        include: names, globs, class names or types; None is every Linear and Conv1d/2d/3d but the output head.
        exclude: the same, left in floating point.
        compiled: compile the rounding functions with `torch.compile` (about 10-20 s once); needs a compiler.
        enabled: False is plain training.

    Raises:
        ValueError: an option out of its range, a window out of order or longer than the run, integer weights.
        NothingToCompress: nothing is selected, or no selected layer was ever called.
        IncompatibleCallbacks: another callback quantizes one of these layers, or its weight is reparametrized.
    """

    def __init__(
        self,
        weight_bits: int = 8,
        activation_bits: int = 8,
        window: tuple[Moment, Moment, Moment] = (0.6, 0.7, 0.9),
        momentum: float = 0.1,
        include: list[str | type] | None = None,
        exclude: list[str | type] | None = None,
        compiled: bool = False,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        self.weight_bits, self.activation_bits = check_bits(weight_bits), check_bits(activation_bits)
        self.window = tuple(window)
        if not 0.0 < momentum <= 1.0:
            raise ValueError(f"momentum is the newest step's weight in (0, 1], got {momentum}")
        self.momentum = float(momentum)
        self.include, self.exclude = patterns_or_none(include), patterns_or_none(exclude)
        self.compiled, self.enabled = compiled, enabled
        self.clock = Clock()
        self.layers: dict[str, nn.Module] = {}
        self._extremes: dict[str, Tensor] = {}
        self._steps = (0, 0, 0)
        self._folded_at = 0
        self._phase: Phase | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def complete(self) -> bool:
        """Whether the ranges are frozen."""
        return not self.enabled or self._phase == Phase.FROZEN

    def ranges(self) -> dict[str, Range]:
        """Return the trained range of each layer by name; for `export_onnx` and `fake_quantized` after the fit.

        Raises:
            NothingToCompress: no range was learned yet.
        """
        self._collect()
        if not self._extremes:
            raise NothingToCompress("no ranges were learned here; call ranges() after fit, or load a checkpoint first")
        return {
            name: FakeQuant(self.activation_bits, self.weight_bits, extremes=extremes).range
            for name, extremes in self._extremes.items()
        }

    def claims(self) -> list[Claim]:
        """Say which layers this callback quantizes."""
        return [Claim(type(self).__name__, "quantize", frozenset(self.layers))] if self.layers else []

    def recipe(self) -> dict[str, Any]:
        """Return the options as primitives, as a checkpoint and a logger keep them."""
        options = ("weight_bits", "activation_bits", "window", "momentum", "include", "exclude")
        return {option: described(getattr(self, option)) for option in options}

    # Attaching and detaching

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not self.enabled:
            return
        check_strategy(trainer, self)
        self.layers, self._restored = {}, None
        if stage == "fit" and trainer.global_step == 0:  # a fresh run with the same callback object
            self.clock.reset()
            self._extremes, self._folded_at = {}, 0
        if is_final_at_setup(pl_module):
            self._prepare(trainer, pl_module, stage)

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            total = run_length(trainer, self.window)
            observe, rounding, freeze = resolve_window(self.window, total, ("observe", "round", "freeze"))
            self._steps = (observe, rounding, freeze)
        # The projection of nn.MultiheadAttention is used without being called: hooks never see it.
        inside_attention = [layer.out_proj for layer in pl_module.modules() if isinstance(layer, nn.MultiheadAttention)]
        selected = select_layers(pl_module, QUANTIZABLE, self.include, self.exclude).layers
        self.layers = {n: m for n, m in selected.items() if not any(m is other for other in inside_attention)}
        if not self.layers:
            raise NothingToCompress("only nn.MultiheadAttention projections are selected, which stay in floating point")
        check_together(trainer.callbacks)  # type: ignore[attr-defined]
        for name, layer in self.layers.items():
            check_weight(name, layer)
        for name, layer in self.layers.items():
            self._attach(name, layer, trainer)
        forget_compiled_code()

    def _attach(self, name: str, layer: nn.Module, trainer: L.Trainer) -> None:
        device = next(layer.parameters()).device
        state = attach(layer, self.activation_bits, self.weight_bits)
        state.compiled = self.compiled and compiler_available(device)
        state.keep_weight = trainer.accumulate_grad_batches > 1
        state.extremes = self._extremes.get(name, state.extremes).to(device, copy=True)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.enabled:
            self._prepare(trainer, pl_module, "fit")
            self.clock.attach(trainer.optimizers, self._after_step)

    def _after_step(self, optimizer: Optimizer, time_moved: bool) -> None:
        for layer in self.layers.values():
            attach(layer).kept = None

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not self.enabled:
            return
        if not self.layers or stage != "fit":
            self._prepare(trainer, pl_module, stage)
        if self._restored is not None:
            self._take_over(self._restored)
            self._restored = None
        elif stage == "fit" and self.clock.steps == 0 and trainer.global_step > 0:
            self.clock.start_at(trainer.global_step // max(1, len(trainer.optimizers)))
        if stage == "fit":
            self._folded_at = self.clock.steps
            self._phase = None
            self._enter_phase(trainer)
        else:
            self._set_phase(Phase.FROZEN if self._extremes else Phase.OFF)

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

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        self.clock.detach()
        self._collect()
        for layer in self.layers.values():
            detach(layer)
        self.layers = {}
        forget_compiled_code()

    # Phases and ranges

    def _states(self) -> dict[str, FakeQuant]:
        return {name: attach(layer) for name, layer in self.layers.items()}

    def _set_phase(self, phase: Phase) -> None:
        without_range = Phase.OFF if phase == Phase.FROZEN else min(phase, Phase.OBSERVE)
        for state in self._states().values():
            state.phase = phase if phase <= Phase.OBSERVE or state.observed else without_range

    def _enter_phase(self, trainer: L.Trainer) -> None:
        phase = Phase(sum(self.clock.steps >= moment for moment in self._steps))
        states = self._states().values()
        # In ROUND, a layer that is called for the first time starts rounding once it has a range.
        if phase == self._phase and not (phase == Phase.ROUND and any(s.phase == Phase.OBSERVE for s in states)):
            return
        if phase >= Phase.ROUND and not any(state.observed for state in states):
            raise NothingToCompress(
                f"none of the {len(self.layers)} selected layers was called in training while ranges were observed, "
                f"so nothing can be rounded: {', '.join(self.layers)}; select layers that the forward calls, "
                f"and in a run resumed without ranges round only after step {self.clock.steps}"
            )
        self._set_phase(phase)
        if phase != self._phase:
            bits = float(self.weight_bits) if phase >= Phase.ROUND else 32.0
            for logger in trainer.loggers:
                logger.log_metrics({"compress/bits": bits}, step=trainer.global_step)
        self._phase = phase

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not self.enabled or self.clock.steps == self._folded_at:
            return
        self._folded_at = self.clock.steps
        states = [state for state in self._states().values() if state.phase in (Phase.OBSERVE, Phase.ROUND)]
        if states:
            self._fold(states)
        self._enter_phase(trainer)

    @torch.no_grad()
    def _fold(self, states: list[FakeQuant]) -> None:
        nothing = torch.full((2,), float("-inf"), device=states[0].extremes.device)
        pending = torch.stack([nothing if state.pending is None else state.pending for state in states])
        extremes = torch.stack([state.extremes for state in states])
        moved = move_ranges(extremes, all_reduce_max(pending), self.momentum)
        for state, row in zip(states, moved.unbind(), strict=True):
            state.extremes.copy_(row)
            state.pending = None

    def _collect(self) -> None:
        for name, state in self._states().items():
            if state.observed:
                self._extremes[name] = state.extremes.detach().cpu().clone()

    # Checkpoints

    state_key = property(state_key)
    on_load_checkpoint = check_unclaimed

    def state_dict(self) -> dict[str, Any]:
        if not self.enabled:
            return {}
        self._collect()
        return saved_state(self.recipe(), clock=self.clock.state_dict(), extremes=dict(self._extremes))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.enabled and state_dict:
            check_state(state_dict, self.recipe(), self)
            self._restored = state_dict
            self._extremes = {name: extremes.float().cpu() for name, extremes in state_dict["extremes"].items()}

    def _take_over(self, state: dict[str, Any]) -> None:
        unknown = sorted(state["extremes"].keys() - self.layers.keys())
        if unknown:
            raise CheckpointMismatch(
                f"the checkpoint has a range for '{unknown[0]}', which this model's selection does not contain; resume "
                f"with the model and include/exclude that made it"
            )
        self.clock.load_state_dict(state["clock"])
        for name, fake_quant in self._states().items():
            if name in self._extremes:
                fake_quant.extremes = self._extremes[name].to(fake_quant.extremes.device, copy=True)


def forget_compiled_code() -> None:
    """Drop compiled graphs: Dynamo does not guard on hooks, so old code would run without (or with) ours."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()

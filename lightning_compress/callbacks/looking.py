"""When the monitor looks, and what it sees: zeros, widths and rounding errors of all weights at one moment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import lightning.pytorch as L
import torch
from torch import Tensor

from lightning_compress.callbacks.clock import ENDLESS, run_length
from lightning_compress.callbacks.quantization import QuantizationAwareTraining
from lightning_compress.measure.layer_states import LayerState, count_each, sqnr_of_each, stored_bytes
from lightning_compress.measure.size import Count, LayerRow
from lightning_compress.parts import Part
from lightning_compress.quantization.attach import FakeQuant, Phase
from lightning_compress.quantization.projections import weight_names
from lightning_compress.schedule import Moment
from lightning_compress.sharding import clean_name

__all__ = ["Look", "Pace", "look", "moments", "pace"]

LEAST_STEPS = 40  # between looks at fractions of a run, so that a short run doesn't pay more a step than a long one


@dataclass(frozen=True)
class Pace:
    """How far apart looks are, in steps; or as a fraction of the steps so far, where nobody knows the run's length.

    >>> [step for step in range(50) if Pace(20).due(step, 20, changed=False)]
    [40, 41, 42, 43, 44, 45, 46, 47, 48, 49]
    >>> Pace(20).due(30, 20, changed=True), Pace(20).due(25, 20, changed=True)
    (True, False)
    """

    interval: int = 0
    growth: float = 0.0

    def due(self, step: int, last: int, changed: bool) -> bool:
        """Say whether to look at `step`, after a look at `last`; after a change of masks in half the time."""
        passed = step - last
        interval = self.interval or max(LEAST_STEPS, int(self.growth * last))
        return passed >= interval or (changed and passed > 0 and 2 * passed >= interval)


def pace(trainer: L.Trainer, every: Moment) -> Pace:
    """Return the pace of this run. Runs at `on_train_start`, once the data is there."""
    total = run_length(trainer, ()) * max(1, len(trainer.optimizers))
    if not isinstance(every, float):
        return Pace(every)
    return Pace(growth=every) if total >= ENDLESS else Pace(max(LEAST_STEPS, round(every * total)))


def moments(trainer: L.Trainer, chosen: Iterable[Moment]) -> list[int]:
    """Return the steps of chosen moments, in order; fractions of a run of unknown length but its begin are left out."""
    total = run_length(trainer, ()) * max(1, len(trainer.optimizers))
    known = (each for each in chosen if total < ENDLESS or not isinstance(each, float) or each == 0.0)
    return sorted({round(each * total) if isinstance(each, float) else each for each in known})


@dataclass(frozen=True)
class Look:
    """What all parameters were like at one step.

    Args:
        step: the loggers' step.
        counts: of every parameter, by clean name.
        shapes: of the whole of each.
        bits: widths.
        sqnr_db: of the weights that are rounded now.
    """

    step: int
    counts: Mapping[str, Count]
    shapes: Mapping[str, tuple[int, ...]]
    bits: Mapping[str, int]
    sqnr_db: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all parameters."""
        counts = self.counts.values()
        return Count(sum(count.nonzero for count in counts), sum(count.total for count in counts)).sparsity

    @property
    def stored_bytes(self) -> int:
        """What the parameters would take with their zeros and widths: an estimate, no file was written."""
        return stored_bytes(self.counts, self.bits)

    def states(self) -> list[LayerState]:
        """One row for each weight, that is a parameter of two dimensions or more."""
        return [
            LayerState(self.step, name, count.sparsity, self.bits[name], self.sqnr_db.get(name))
            for name, count in self.counts.items()
            if len(self.shapes[name]) > 1
        ]

    def rows(self, biases: bool) -> list[LayerRow]:
        """One row for each weight, or for each parameter."""
        return [
            LayerRow.counted(name, self.shapes[name], count, self.bits[name])
            for name, count in self.counts.items()
            if biases or len(self.shapes[name]) > 1
        ]


@torch.no_grad()
def look(
    step: int, pl_module: L.LightningModule, compressions: Iterable[object], parts: Mapping[str, Part] | None
) -> Look:
    """Count all parameters, and round the weights that are rounded in training to see what that changes.

    Args:
        step: the loggers' step.
        pl_module: whose parameters.
        compressions: the run's callbacks; those that quantize know widths and grids.
        parts: what each process holds, where the strategy shards: all of them call this then, and no rounding is done.
    """
    parameters = {clean_name(name): parameter for name, parameter in pl_module.named_parameters()}
    shapes = {n: tuple(p.shape if parts is None else parts[n].shape) for n, p in parameters.items()}
    bits = {name: parameter.element_size() * 8 for name, parameter in parameters.items()}
    rounding: dict[str, tuple[FakeQuant, Tensor]] = {}
    for callback in compressions:
        if isinstance(callback, QuantizationAwareTraining) and callback.enabled:
            rounding |= _rounding(pl_module, callback)
    bits |= {name: state.weights.bits for name, (state, _) in rounding.items() if name in bits}
    sqnr_db = sqnr_of_each(_rounded(rounding)) if parts is None else {}
    return Look(step, count_each(parameters, parts), shapes, bits, sqnr_db)


def _rounding(pl_module: L.LightningModule, callback: QuantizationAwareTraining) -> dict[str, tuple[FakeQuant, Tensor]]:
    """The state and weight of each layer that a callback rounds now, by the weight's name."""
    states = {n: state for n, state in callback.quantized.states.items() if state.phase >= Phase.ROUND}
    names = weight_names(pl_module, states) if states else {}
    return {names[n]: (state, callback.layers[n].get_parameter("weight")) for n, state in states.items()}


def _rounded(rounding: Mapping[str, tuple[FakeQuant, Tensor]]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each weight with its rounded form, one at a time, by the grid alone: without noise that a forward may draw."""
    for name, (state, weight) in rounding.items():
        rows = state.arranged(weight)
        yield name, rows, state.weights.rounded(rows, state.learned["weight"])

"""The rounded outputs of one model: phases, ranges and what a checkpoint keeps, beside those of its layers' inputs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from lightning_compress.quantization import placement
from lightning_compress.quantization.attach import QUANTIZABLE, Phase
from lightning_compress.quantization.dataflow import Flow, watched
from lightning_compress.quantization.fake import compiler_available
from lightning_compress.quantization.gathered import Gathered, Gathering
from lightning_compress.quantization.outputs import (
    OutputFakeQuant,
    OutputRange,
    attach_output,
    detach_output,
    output_key,
    share_grids,
)
from lightning_compress.quantization.placement import PlacedOutput
from lightning_compress.quantization.ranges import RangeRule
from lightning_compress.sharding import clean_name

__all__ = ["PlacedOutputs"]


class PlacedOutputs:
    """The outputs that a placement rounds, by clean name. Ranges outlive the attachment.

    Args:
        bits: width of the codes.
        rule: makes their ranges, as those of inputs; None leaves them to the moving average.
    """

    def __init__(self, bits: int = 8, rule: RangeRule | None = None) -> None:
        self.bits, self.gathered = bits, Gathered(rule)
        self.places: tuple[PlacedOutput, ...] = ()
        self.parts: dict[str, nn.Module] = {}
        self.extremes: dict[str, Tensor] = {}
        self.placed = False
        self._watch = ExitStack()
        self._flow: Flow | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running forward, so that copies and pickles can be made at any time."""
        return {**self.__dict__, "_watch": ExitStack(), "_flow": None}

    def watch(self, module: nn.Module) -> None:
        """Watch the forwards from now on, unless the outputs are known. Runs before the first training batch."""
        if not self.placed:
            self._flow = self._watch.enter_context(watched(module))

    def place(
        self, module: nn.Module, layers: Mapping[str, nn.Module], phase: Phase, compiled: bool
    ) -> list[str] | None:
        """Attach to the outputs that the watched forward needs rounded. Runs after it, before its backward.

        Returns:
            Sentences to warn with; None where nothing was watched.
        """
        flow, self._flow = self._flow, None
        self._watch.close()
        if flow is None:
            return None
        found = placement.place(module, flow, [n for n, layer in layers.items() if isinstance(layer, QUANTIZABLE)])
        self.attach(module, found.outputs, compiled)
        self.set_phase(min(phase, Phase.OBSERVE))
        return [f"an output stays in floating point: {reason}" for reason in found.unplaced]

    def attach(self, module: nn.Module, places: tuple[PlacedOutput, ...] | None = None, compiled: bool = False) -> None:
        """Attach to every placed output, switched off, with the ranges that are there already. Runs after `place`.

        Args:
            module: the module that was placed.
            places: what `place` found; None takes what a checkpoint held.
            compiled: use the compiled rounding function where there is a compiler.
        """
        self.places, self.placed = self.places if places is None else places, True
        every = {clean_name(name): part for name, part in module.named_modules()}
        device = next(module.parameters()).device
        for place in self.places:
            part = self.parts[place.name] = every[place.name]
            state = attach_output(part, self.bits, place.low, place.high)
            state.compiled = compiled and compiler_available(device)
            state.extremes = self.extremes.get(place.name, state.extremes).to(device, copy=True)
            self.gathered.start(place.name, state)

    def detach(self) -> None:
        """Take everything off; ranges and places stay."""
        self._watch.close()
        self._flow = None
        self.collect()
        for part in self.parts.values():
            detach_output(part)
        self.parts = {}

    @property
    def states(self) -> dict[str, OutputFakeQuant]:
        """The state of each attached output."""
        return {name: attach_output(part) for name, part in self.parts.items()}

    def enter(self, phase: Phase, inputs: Mapping[str, Gathering]) -> None:
        """Set the phase in training; a rule's ranges are made when rounding begins, and go to their readers."""
        if phase >= Phase.ROUND:
            self.gathered.settle(self.states)
        self.set_phase(phase)
        share_grids(self.places, self.states, inputs)

    def set_phase(self, phase: Phase) -> None:
        """Set the phase of every output that has a range; the others go on observing until ranges are frozen."""
        without_range = Phase.OFF if phase == Phase.FROZEN else min(phase, Phase.OBSERVE)
        for state in self.states.values():
            state.phase = phase if phase <= Phase.OBSERVE or state.observed else without_range

    def share(self, inputs: Mapping[str, Gathering]) -> None:
        """Give readers the range of what they read. Runs once after each optimizer step, when all ranges have moved."""
        states = self.states
        if any(state.phase in (Phase.OBSERVE, Phase.ROUND) for state in states.values()):
            self.gathered.fold(states)
            share_grids(self.places, states, inputs)

    def collect(self) -> None:
        """Copy the ranges from the hooks."""
        for name, state in self.states.items():
            if state.observed:
                self.extremes[name] = state.extremes.detach().cpu().clone()

    def ranges(self) -> dict[str, OutputRange]:
        """Return what was trained, under the keys that an exporter looks for."""
        self.collect()
        return {output_key(n): OutputFakeQuant(self.bits, extremes=row).range for n, row in self.extremes.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return ranges and places as plain containers of tensors and numbers; empty before outputs are placed."""
        if not self.placed:
            return {}
        self.collect()
        places = [[place.name, place.low, place.high, list(place.readers)] for place in self.places]
        return {"extremes": dict(self.extremes), "places": places, "gathered": self.gathered.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint kept; `attach` puts it on the module."""
        self.placed = bool(state)
        if not state:
            return
        self.extremes = {name: row.float().cpu() for name, row in state["extremes"].items()}
        self.gathered.load_state_dict(state["gathered"])
        self.places = tuple(PlacedOutput(n, low, high, tuple(readers)) for n, low, high, readers in state["places"])

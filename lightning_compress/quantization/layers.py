"""The rounded layers of one model: phases, ranges, and what their grids learn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.errors import CheckpointMismatch, NothingToCompress
from lightning_compress.quantization import doubts
from lightning_compress.quantization.attach import FakeQuant, Phase, attach, detach
from lightning_compress.quantization.choosing import Grids, Recipe
from lightning_compress.quantization.details import Details
from lightning_compress.quantization.fake import compiler_available
from lightning_compress.quantization.gathered import Gathered
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.inputs import InputGrid
from lightning_compress.quantization.learning import LearnedValues
from lightning_compress.quantization.lowbit import Binary
from lightning_compress.quantization.noise import noise_keys
from lightning_compress.quantization.observers import fold_extremes
from lightning_compress.quantization.outputs import OutputFakeQuant
from lightning_compress.quantization.whole_weights import WholeWeights

__all__ = ["QuantizedLayers"]


class QuantizedLayers:
    """The layers that a recipe rounds, by clean name. Ranges and learned values outlive the attachment.

    Args:
        recipe: the grids.
        details: learning rate of grids, the rule that makes ranges, noise.
    """

    def __init__(self, recipe: Recipe, details: Details) -> None:
        self.recipe, self.noise = recipe, details.noise
        self.layers: dict[str, nn.Module] = {}
        self.by_channel: list[str] = []  # their weights' grids learn more than a number, as a step a channel
        self.whole = WholeWeights({}, nn.Module())
        self.learned, self.gathered = LearnedValues(details.learning_rate), Gathered(details.observer)
        self.clear()

    def clear(self) -> None:
        """Forget what was observed and learned; for a fresh run with the same object."""
        self.extremes: dict[str, Tensor] = {}
        self.choices: dict[str, tuple[int, bool]] = {}
        self.learned.clear()
        self.gathered.clear()
        self._at_rounding: dict[str, Tensor] = {}
        self._not_finite: dict[str, int] = {}
        self._not_finite_since: Tensor | None = None
        self._calls: dict[str, tuple[Tensor, Tensor]] = {}

    # Attaching

    def choose(self, module: nn.Module, layers: Mapping[str, nn.Module], root: nn.Module) -> Grids | None:
        """Take these layers of a module; return the grids of the first that learns something. Runs at `setup`.

        Raises:
            ValueError: a pattern of the recipe matches none of them, or a grid cannot round one.
        """
        self.layers, self.choices = dict(layers), self.recipe.choices(module, layers)
        self.by_channel = []
        self.noise.check({name: self.grids(name) for name in layers})
        self.whole = WholeWeights(self.layers, root)
        learning = [self.grids(name) for name in layers if self._learns(name)]
        return learning[0] if learning else None

    def _learns(self, name: str) -> bool:
        grids, low, high = self.grids(name), torch.tensor(0.0), torch.tensor(1.0)  # a range that all input grids take
        start = self.whole.start(name, grids)
        if any(value.dim() > 0 for value in start.values()):
            self.by_channel.append(name)
        return bool(start or (grids.inputs and grids.inputs.learned(low, high)))

    def grids(self, name: str) -> Grids:
        """Return the grids of one layer."""
        return self.recipe.grids(self.choices[name])

    @property
    def without_zero(self) -> list[str]:
        """The layers whose grid has no zero, so that pruned weights would come back."""
        return [name for name in self.layers if isinstance(self.grids(name).weights, Binary)]

    def attach(self, compiled: bool, keep_weight: bool) -> None:
        """Attach to every layer, switched off, with the ranges and learned values that are there already."""
        keep = keep_weight and not self.whole.parts  # a sharded model would be held whole until the step
        for name, layer in self.layers.items():
            device, grids = next(layer.parameters()).device, self.grids(name)
            state = attach(layer, grids.weights, grids.inputs)
            state.compiled, state.keep_weight = compiled and compiler_available(device), keep
            state.extremes = self.extremes.get(name, state.extremes).to(device, copy=True)
            self.gathered.start(name, state, counting=grids.inputs is not None)
            state.noise = self.noise
            self.learned.move(name, device)
            self._use_learned(name, state)

    def detach(self) -> None:
        """Take everything off the layers; ranges and learned values stay."""
        self.collect()
        for layer in self.layers.values():
            detach(layer)
        self.layers = {}

    @property
    def states(self) -> dict[str, FakeQuant]:
        """The state of each attached layer."""
        return {name: attach(layer) for name, layer in self.layers.items()}

    # Phases

    def enter(self, phase: Phase, inputs_wait: bool, step: int) -> list[str]:
        """Set the phase of all layers, one that was never called excepted; return sentences to warn with.

        Raises:
            ValueError: a layer saw only NaN or infinite inputs.
            NothingToCompress: nothing can be rounded, because no layer was called while ranges were observed.
        """
        states = self.states
        if phase >= Phase.ROUND:
            self._check_finite(states)
        if phase >= Phase.ROUND and not any(state.observed for state in states.values()):
            raise NothingToCompress(
                f"none of the {len(states)} selected layers was called in training while ranges were observed, "
                f"so nothing can be rounded: {', '.join(states)}; select layers that the forward calls, "
                f"and in a run resumed without ranges round only after step {step}"
            )
        warnings = list(self._doubts(states, phase))
        self.gathered.settle(states if phase >= Phase.ROUND and not inputs_wait else {})
        self.set_phase(phase, inputs_wait)
        if phase == Phase.FROZEN:
            self.learned.freeze()
        return warnings

    def set_phase(self, phase: Phase, inputs_wait: bool = False) -> None:
        """Set the phase of every layer that has a range; grids that learn get their start values."""
        without_range = Phase.OFF if phase == Phase.FROZEN else min(phase, Phase.OBSERVE)
        for name, state in self.states.items():
            state.phase = phase if phase <= Phase.OBSERVE or state.observed else without_range
            state.inputs_wait = inputs_wait
            if state.phase >= Phase.ROUND:
                self._begin_to_learn(name, state)

    @property
    def some_wait(self) -> bool:
        """Whether a layer is still observed that may have got its range, when the others round already."""
        return any(state.phase == Phase.OBSERVE and state.observed for state in self.states.values())

    @torch.no_grad()
    def _begin_to_learn(self, name: str, state: FakeQuant) -> None:
        if not self.learned.of(name, "weight"):
            self.learned.add(name, "weight", self.whole.start(name, self.grids(name)))
        if state.inputs and not state.inputs_wait and not self.learned.of(name, "input"):
            self.learned.add(name, "input", _input_start(name, state.inputs, state.extremes))
        self._use_learned(name, state)

    def _use_learned(self, name: str, state: FakeQuant) -> None:
        for kind in ("weight", "input"):
            state.learn(kind, self.learned.of(name, kind))

    def noise_at(self, step: int | None) -> None:
        """Let layers that round draw this optimizer step's noise; None ends it. Runs around each training batch."""
        for name, state in self.states.items() if self.noise.some else ():
            state.keys = None
            if step is not None and state.phase == Phase.ROUND:
                state.keys = noise_keys(name, step, self.noise.seed).to(state.extremes.device)

    # After each optimizer step

    def after_step(self, optimizer: Optimizer) -> None:
        """Step what was learned for the optimizer's weights, and forget rounded weights. Runs inside its step."""
        for state in self.states.values():
            state.kept = None
        if self.learned.parameters:
            owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            self.learned.step(n for n, layer in self.layers.items() if id(layer.get_parameter("weight")) in owned)

    def forget_stale_gradients(self) -> None:
        """Clear learned values' gradients where the weight's was cleared. Runs before each backward."""
        if self.learned.parameters:
            cleared = (name for name, layer in self.layers.items() if layer.get_parameter("weight").grad is None)
            self.learned.forget_stale_gradients(cleared)

    def fold(self, momentum: float | None, step: int, outputs: Mapping[str, OutputFakeQuant]) -> list[str]:
        """Move all ranges, of `outputs` by key too; return sentences to warn with. Runs once after each step."""
        states = self.states
        if not any(state.phase in (Phase.OBSERVE, Phase.ROUND) for state in states.values()):
            return []
        self._calls = {n: (s.narrowest, s.pending) for n, s in states.items() if _called_twice(s)}  # type: ignore[misc]
        seen = fold_extremes([*states.values(), *outputs.values()], momentum)
        for state in states.values():
            state.narrowest = None
        self.gathered.fold({**states, **outputs})
        return self._note_not_finite(seen[: len(states)], step)

    # What looks wrong

    def _note_not_finite(self, seen: Tensor, step: int) -> list[str]:
        now, since = torch.where(seen.eq(torch.inf).any(dim=1), step, -1), self._not_finite_since
        self._not_finite_since = now if since is None else torch.where(since < 0, now, since)
        return self.not_finite() if seen.device.type == "cpu" else []  # an accelerator would have to be waited for

    def not_finite(self) -> list[str]:
        """Return a sentence for each layer that has seen NaN or infinity since this was last asked."""
        since = [] if self._not_finite_since is None else self._not_finite_since.tolist()
        found = {n: s for n, s in zip(self.layers, since, strict=False) if s >= 0 and n not in self._not_finite}
        self._not_finite |= found
        return [
            f"the input of '{name}' held NaN or infinity in optimizer step {step}: its range leaves such steps out; "
            f"look for what makes them, or exclude=['{name}']"
            for name, step in found.items()
        ]

    def _check_finite(self, states: Mapping[str, FakeQuant]) -> None:
        self.not_finite()
        for name, step in self._not_finite.items():
            if name in states and not states[name].observed:
                raise ValueError(
                    f"the input of '{name}' was never finite while its range was observed, first in optimizer step "
                    f"{step}, so it cannot be rounded; look for NaN or infinity before it, or exclude=['{name}']"
                )

    def _doubts(self, states: Mapping[str, FakeQuant], phase: Phase) -> Iterator[str]:
        yield from self.not_finite()
        ranges = {n: s.extremes.clone() for n, s in states.items() if s.observed and s.inputs is not None}
        if phase == Phase.ROUND:
            fresh = {name: row for name, row in ranges.items() if name not in self._at_rounding}
            yield from doubts.zero_ranges(fresh)
            yield from doubts.unlike_calls({name: pair for name, pair in self._calls.items() if name in fresh})
            self._at_rounding |= fresh
        elif phase == Phase.FROZEN:
            yield from doubts.exploded(self._at_rounding, ranges)

    # What was trained

    def collect(self) -> None:
        """Copy the ranges from the layers."""
        for name, state in self.states.items():
            if state.observed:
                self.extremes[name] = state.extremes.detach().cpu().clone()

    def ranges(self) -> dict[str, Range]:
        """Return what was trained, by name."""
        self.collect()
        found: dict[str, Range] = {}
        for name, extremes in self.extremes.items():
            grids = self.grids(name)
            state = FakeQuant(grids.weights, grids.inputs, extremes=extremes)
            self._use_learned(name, state)
            found[name] = state.range
        return found

    @property
    def bits(self) -> float:
        """Mean width of the selected weights' codes, each weight counted once."""
        widths = [(self.grids(name).weights.bits, self.whole.size(name)) for name in self.layers]
        return sum(bits * size for bits, size in widths) / sum(size for _, size in widths)

    def state_dict(self) -> dict[str, Any]:
        """Return ranges, choices and learned values, as plain containers of tensors."""
        self.collect()
        choices = {name: [index, int(has_input)] for name, (index, has_input) in self.choices.items()}
        kept = {"learned": self.learned.state_dict(), "gathered": self.gathered.state_dict()}
        return {"extremes": dict(self.extremes), "choices": choices, **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint kept; layers that are attached take it up with `attach`."""
        self.clear()
        self.extremes = {name: extremes.float().cpu() for name, extremes in state["extremes"].items()}
        self.choices = {name: (int(index), bool(has)) for name, (index, has) in state["choices"].items()}
        self.learned.load_state_dict(state["learned"])
        self.gathered.load_state_dict(state["gathered"])

    def check_known(self) -> None:
        """Raise if a checkpoint was of other layers. Runs at `on_train_start`.

        Raises:
            CheckpointMismatch: with the first layer that is unknown.
        """
        unknown = sorted(self.extremes.keys() - self.layers.keys())
        if unknown:
            raise CheckpointMismatch(
                f"the checkpoint has a range for '{unknown[0]}', which this model's selection does not contain; resume "
                f"with the model and include/exclude that made it"
            )


def _called_twice(state: FakeQuant) -> bool:
    return state.inputs is not None and state.pending is not None and state.narrowest is not state.pending


def _input_start(name: str, inputs: InputGrid, extremes: Tensor) -> dict[str, Tensor]:
    try:
        return inputs.learned(-extremes[0], extremes[1].clone())
    except ValueError as error:
        raise ValueError(f"the input of '{name}' cannot be rounded: {error}") from error

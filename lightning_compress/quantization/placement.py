"""Which outputs must be rounded besides the layers' inputs, so that a runtime finds integers on every side.

An integer convolution writes codes, an integer addition or concatenation reads codes on each input and writes codes.
Where a convolution's output goes straight into another quantized layer, that layer's input rounding is enough. Where it
goes into an addition, a concatenation, a pooling before a float head, or an activation that is no clipping, its own
output needs a grid, and so does every other input of the addition; in training too, or the file is not what was
trained (Jacob et al. 2018, section 2.2 and figure C.4).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_compress.quantization.attach import QUANTIZABLE
from lightning_compress.quantization.dataflow import Flow, watched
from lightning_compress.sharding import clean_name

__all__ = ["PlacedOutput", "Placement", "find_outputs", "place"]

NORMS = ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
# What hands codes on as they are: the grid behind is the grid before.
MOVES = (
    "view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "permute", "transpose", "clone", "_to_copy",
    "max_pool2d_with_indices", "max_pool1d", "native_dropout",
)  # fmt: skip
JOINS = ("add", "cat")


@dataclass(frozen=True)
class PlacedOutput:
    """One module whose output is to be rounded.

    `low` and `high` are the limits of what is read from it: where a ReLU alone reads it, `low` is 0, and rounding
    before the ReLU on a grid that starts at 0 is rounding behind it. `readers` are quantized layers whose input is this
    very value; their input grid should be this output's (`share_grids`), so that nothing is rounded twice.
    """

    name: str
    low: float = -math.inf
    high: float = math.inf
    readers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Placement:
    """Outputs to round, and why others cannot be: what stays float in the file."""

    outputs: tuple[PlacedOutput, ...]
    unplaced: tuple[str, ...]


def find_outputs(
    module: nn.Module, layers: Collection[str], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Placement:
    """Run one forward in eval mode and find the outputs to round. Runs before training, or at any time without hooks.

    Args:
        module: the module to train; left as it was.
        layers: names of its quantized layers.
        args: an example of what `module(*args, **kwargs)` takes; one row is enough.
        kwargs: the same.

    Raises:
        KeyError: a name in `layers` is not a Linear or Conv layer of `module`.

    >>> class Residual(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.first, self.second = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
    ...     def forward(self, image):
    ...         image = self.first(image)
    ...         return image + self.second(image)
    >>> find_outputs(Residual(), ["first", "second"], [torch.zeros(1, 1, 2, 2)]).outputs[0]
    PlacedOutput(name='first', low=-inf, high=inf, readers=('second',))
    """
    modes = {part: part.training for part in module.modules()}
    try:
        for part in modes:
            part.training = False
        with torch.no_grad(), watched(module) as flow:
            module(*args, **(kwargs or {}))
    finally:
        for part, mode in modes.items():
            part.training = mode
    return place(module, flow, layers)


def place(module: nn.Module, flow: Flow, layers: Collection[str]) -> Placement:
    """Return the outputs to round in a forward that was watched. Runs once, after `watched`.

    Raises:
        KeyError: a name in `layers` is not a Linear or Conv layer of `module`.
    """
    kinds = {clean_name(name): part for name, part in module.named_modules()}
    unknown = [name for name in layers if not isinstance(kinds.get(name), QUANTIZABLE)]
    if unknown:
        raise KeyError(f"expected names of Linear or Conv layers of {type(module).__name__}, got {unknown}")
    search = _Search(flow, frozenset(layers), {n for n in layers if not isinstance(kinds[n], nn.Linear)})
    search.run()
    return Placement(tuple(search.found.values()), tuple(dict.fromkeys(search.unplaced)))


@dataclass
class _Search:
    """Walks the steps in the order they ran: whatever an addition reads has been decided before it."""

    flow: Flow
    layers: frozenset[str]
    convolutions: set[str]
    rounded: set[int] = field(default_factory=set)
    found: dict[str, PlacedOutput] = field(default_factory=dict)
    unplaced: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reading = self.flow.readers()

    def run(self) -> None:
        for index, step in enumerate(self.flow.steps):
            inside = step.modules[-1] if step.modules else ""
            if "convolution" in step.operator and inside in self.convolutions:
                self.keep_integer(self.behind_norm(index), f"the convolution '{inside}'")
            elif step.operator in JOINS and len(step.inputs) > 1 and any(map(self.on_grid, step.inputs)):
                self.join(index)

    def join(self, index: int) -> None:
        """Round every input of an addition or concatenation, then its output."""
        step = self.flow.steps[index]
        what = f"the {'addition' if step.operator == 'add' else 'concatenation'} in '{step.modules[-1]}'"
        if all(self.on_grid(value) or self.round(value, what) for value in step.inputs):
            self.keep_integer(index, what)

    def keep_integer(self, index: int, what: str) -> None:
        """Round a value, or what clips it, unless all its readers do so themselves."""
        index = self.behind_clip(index)
        if not self.rounded_by_readers(index):
            self.round(index, what)

    def round(self, value: int, what: str) -> bool:
        """Place a value at a module; return whether that could be done."""
        if value in self.flow.outputs:
            self.unplaced.append(f"{what} stays float: the forward returns its value")
            return False
        places = [PlacedOutput(name) for name in self.flow.made_by.get(value, ())]
        step = self.flow.steps[value]
        limits = _limits(step.operator, step.numbers)
        if limits and len(step.inputs) == 1 and self.reading[step.inputs[0]] == [value]:
            places = [PlacedOutput(n, *limits) for n in self.flow.made_by.get(step.inputs[0], ())] + places
        if not places:
            where = step.modules[-1] if step.modules else ""
            self.unplaced.append(
                f"{what} stays float: the forward of '{where}' computes a value it needs ({step.operator}) that is no "
                f"module's output; pass that value through an nn.Identity, or use a module such as nn.ReLU"
            )
            return False
        # A module called twice would round both values on one grid, made for the wider one.
        best = min(places, key=lambda placed: self.flow.calls[placed.name])
        earlier = self.found.get(best.name, best)
        readers = dict.fromkeys((*earlier.readers, *self.reading_layers(value)))
        low, high = min(best.low, earlier.low), max(best.high, earlier.high)
        self.found[best.name] = PlacedOutput(best.name, low, high, tuple(readers))
        self.rounded.add(value)
        return True

    def behind_norm(self, index: int) -> int:
        reading = self.reading[index]
        return reading[0] if len(reading) == 1 and self.flow.steps[reading[0]].operator in NORMS else index

    def behind_clip(self, index: int) -> int:
        reading = self.reading[index]
        clips = len(reading) == 1 and _limits(self.flow.steps[reading[0]].operator, self.flow.steps[reading[0]].numbers)
        return reading[0] if clips and index not in self.flow.outputs else index

    def on_grid(self, value: int) -> bool:
        """Whether a value is rounded, itself or before it was moved."""
        step = self.flow.steps[value]
        return value in self.rounded or (step.operator in MOVES and any(map(self.on_grid, step.inputs)))

    def rounded_by_readers(self, value: int) -> bool:
        """Whether nothing reads a value but the inputs of quantized layers."""
        reading = self.reading[value]
        return value not in self.flow.outputs and bool(reading) and all(map(self.is_rounding, reading))

    def is_rounding(self, reader: int) -> bool:
        step = self.flow.steps[reader]
        return self.layer_of(reader) is not None or (step.operator in MOVES and self.rounded_by_readers(reader))

    def reading_layers(self, value: int) -> list[str]:
        """Return the quantized layers whose input is this value, moved or not."""
        found: list[str] = []
        for reader in self.reading[value]:
            layer = self.layer_of(reader)
            if layer is not None:
                found.append(layer)
            elif self.flow.steps[reader].operator in MOVES:
                found += self.reading_layers(reader)
        return found

    def layer_of(self, reader: int) -> str | None:
        return next((name for name in self.flow.steps[reader].modules[::-1] if name in self.layers), None)


def _limits(operator: str, numbers: Sequence[float]) -> tuple[float, float] | None:
    """Return the bounds of an operator that only clips, None for any other.

    >>> _limits("hardtanh", (0.0, 6.0))
    (0.0, 6.0)
    """
    if operator == "relu":
        return 0.0, math.inf
    if operator in ("hardtanh", "clamp") and len(numbers) == 2:
        return numbers[0], numbers[1]
    return None

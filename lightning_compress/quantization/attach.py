"""Attach fake-quantization to a module by two forward hooks, so that no class, key or parameter changes.

The pre-hook puts the rounded weight into the module's `__dict__`, where it shadows the registered parameter, and
rounds the input; the forward hook, called even after an exception, takes it away again. Foreign subclasses keep
their own forward, and copies and pickles of the module work, because the hooks are plain functions that read the
state they need from the module they are called with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.errors import IncompatibleCallbacks, NothingToCompress
from lightning_compress.quantization import fake
from lightning_compress.quantization.grid import FLOAT_BITS, Range
from lightning_compress.quantization.histograms import count_values
from lightning_compress.quantization.inputs import Affine, InputGrid
from lightning_compress.quantization.noise import NO_NOISE, Noise, drop_rounding, uniform_noise
from lightning_compress.quantization.observers import widen
from lightning_compress.quantization.projections import Projection, projections_in
from lightning_compress.quantization.scales import input_grid
from lightning_compress.quantization.weights import Symmetric, WeightGrid, output_first
from lightning_compress.shadowing import remember, restore
from lightning_compress.sharding import clean_name, is_distributed, local, on_piece

__all__ = ["ON_REQUEST", "QUANTIZABLE", "FakeQuant", "Phase", "attach", "detach", "fake_quantized"]

QUANTIZABLE: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ON_REQUEST: tuple[type[nn.Module], ...] = (*TRANSPOSED, nn.Embedding)  # rounded only where `include` names them
STATE = "_fake_quant"
WEIGHTS, INPUTS = Symmetric(), Affine()


class Phase(IntEnum):
    """What a layer's fake-quantization does now."""

    OFF = 0
    OBSERVE = 1
    ROUND = 2
    FROZEN = 3


@dataclass
class FakeQuant:
    """State of one attached layer: grids, phase, what they learned, and what its last forwards saw.

    Plain tensors rather than buffers: a buffer would be rounded by a bf16 module conversion and overwritten by
    DDP's buffer broadcast in the middle of an accumulation. What is learned is kept twice, with gradient and as the
    same memory without: an exporter would warn of a parameter.
    """

    weights: WeightGrid = WEIGHTS
    inputs: InputGrid | None = INPUTS
    phase: Phase = Phase.OFF
    inputs_wait: bool = False  # only the weight is rounded yet
    compiled: bool = False
    keep_weight: bool = False
    groups: int = 0  # of a transposed convolution, whose output channels are not dimension 0
    learning: dict[str, dict[str, Tensor]] = field(default_factory=lambda: {"weight": {}, "input": {}})
    learned: dict[str, dict[str, Tensor]] = field(default_factory=lambda: {"weight": {}, "input": {}})
    extremes: Tensor = field(default_factory=lambda: torch.full((2,), float("nan")))
    pending: Tensor | None = None
    narrowest: Tensor | None = None
    counts: Tensor | None = None  # of values, where a rule waits for them
    settled: bool = False  # a rule has made the range, which stays
    noise: Noise = NO_NOISE
    keys: Tensor | None = None  # of this step's noise for weight and input; None outside of training batches
    kept: tuple[Tensor, int, Tensor] | None = None
    shadowed: list[Any] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)

    @property
    def observed(self) -> bool:
        """Whether this layer has a range."""
        return not bool(torch.isnan(self.extremes).any())

    @property
    def bits(self) -> int:
        """Width of the input's code."""
        return self.inputs.bits if self.inputs else FLOAT_BITS

    @property
    def range(self) -> Range:
        """What was trained, as an exporter needs it."""
        low, high, bits = 0.0 - self.extremes[0].item(), self.extremes[1].item(), self.bits
        learned = {kind: {key: t.detach().cpu().clone() for key, t in v.items()} for kind, v in self.learned.items()}
        return Range(
            low, high, bits, self.weights.bits,
            None if isinstance(self.weights, Symmetric) and self.weights.group == WEIGHTS.group else self.weights,
            None if isinstance(self.inputs, Affine) else self.inputs,
            learned["weight"], learned["input"],
        )  # fmt: skip

    def learn(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Use these tensors as what the grid of the "weight" or the "input" has learned."""
        self.learning[kind] = dict(tensors)
        self.learned[kind] = {key: tensor.detach() for key, tensor in tensors.items()}

    def learns(self, weight: Tensor) -> bool:
        """Whether a forward shall give learned values their gradient: as long as the layer's weight gets one."""
        training = self.phase == Phase.ROUND and torch.is_grad_enabled() and not torch.compiler.is_exporting()
        return training and weight.requires_grad

    @property
    def observes(self) -> bool:
        """Whether a forward shall note what it sees; a range that is settled or that a grid has learned from stays."""
        stays = self.settled or bool(self.learned["input"])
        waiting = self.phase == Phase.OBSERVE or (self.phase == Phase.ROUND and not stays)
        # Gradients are off in validation; a recomputation under activation checkpointing sees the same extremes again.
        return waiting and torch.is_grad_enabled()

    def note(self, value: Any) -> None:
        """Take in the extremes of an input; of one that stays in floating point only that the layer was called."""
        value = local(value) if isinstance(value, Tensor) else value
        seen = torch.zeros_like(self.extremes) if self.inputs is None else widen(None, value)
        if self.counts is not None:
            self.counts += count_values(value)
        if self.pending is None or self.narrowest is None:
            self.pending = self.narrowest = seen
        else:
            self.narrowest = torch.where(seen.max() < self.narrowest.max(), seen, self.narrowest)
            self.pending = torch.maximum(self.pending, seen)

    def rounded_weight(self, weight: Tensor, learns: bool = False) -> Tensor:
        """Return the fake-quantized weight; with `keep_weight`, its values are computed once per optimizer step."""
        if not isinstance(self.weights, Symmetric):
            values = (self.learning if learns else self.learned)["weight"]
            return self.arranged(self.weights.rounded(self.arranged(weight), values))
        # What shadows the parameter (a gate) is another tensor in each forward, and channels may be taken out of it.
        keep = self.keep_weight and torch.is_grad_enabled() and isinstance(weight, nn.Parameter)
        if not keep or torch.compiler.is_compiling():
            return fake.straight_through(weight, self._symmetric(weight, self.weights))
        if self.kept is None or self.kept[0] is not weight or self.kept[1] != weight._version:
            self.kept = (weight, weight._version, self._symmetric(weight, self.weights))
        return fake.straight_through(weight, self.kept[2])

    def _symmetric(self, weight: Tensor, grid: Symmetric) -> Tensor:
        rows = self.arranged(weight)
        if self.keys is not None and self.noise.weights:
            return self.arranged(grid.values_at_random(rows, uniform_noise(rows, self.keys[0])))
        plain = not torch.compiler.is_compiling() and not is_distributed(weight)
        if self.compiled and grid.group == "channel" and plain:
            return self.arranged(fake.compiled_functions()[0](rows, grid.bits))
        return self.arranged(grid.values(rows))

    def arranged(self, weight: Tensor) -> Tensor:
        """Exchange a weight's stored form and that of a grid, which has output channels first."""
        return output_first(weight, self.groups) if self.groups else weight

    def rounded_input(self, value: Tensor, learns: bool = False) -> Tensor:
        """Return the fake-quantized input."""
        if is_distributed(value):
            return on_piece(lambda piece: self.rounded_input(piece, learns), value)
        if value.is_nested:  # nn.TransformerEncoder packs padded batches so in evaluation
            return torch.nested.as_nested_tensor([self.rounded_input(row, learns) for row in value.unbind()])
        low, high, grid = -self.extremes[0], self.extremes[1], self.inputs
        if grid is None:
            return value
        if self.compiled and isinstance(grid, Affine) and not torch.compiler.is_compiling():
            rounded = fake.compiled_functions()[1](value, *input_grid(low, high, grid.bits), grid.bits)
        else:
            rounded = grid.rounded(value, low, high, (self.learning if learns else self.learned)["input"])
        if self.keys is None or not self.noise.inputs:
            return rounded
        return drop_rounding(value, rounded, uniform_noise(value, self.keys[1]), self.noise.inputs)


def _before_forward(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    state: FakeQuant = module.__dict__[STATE]
    remember(module, state.shadowed)
    # A foreign forward may have its own name for the input.
    name = "input" if "input" in kwargs else next((n for n, v in kwargs.items() if isinstance(v, Tensor)), "")
    if not args and not name:  # the forward itself says best what is missing
        return args, kwargs
    value = args[0] if args else kwargs[name]
    if state.observes:
        state.note(value)
    if state.phase >= Phase.ROUND:
        weight: Tensor = module.weight  # type: ignore[assignment]
        learns = state.learns(weight)
        module.__dict__["weight"] = state.rounded_weight(weight, learns)
        if state.inputs is not None and not state.inputs_wait:
            value = state.rounded_input(value, learns)
    return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, name: value})


def _after_forward(module: nn.Module, args: Any, output: Any) -> None:
    restore(module, module.__dict__[STATE].shadowed)


def check_weight(name: str, module: nn.Module) -> None:
    """Raise if a layer's weight is not a plain floating-point parameter that can be shadowed. Runs before attaching.

    Raises:
        IncompatibleCallbacks: the weight is reparametrized (`torch.nn.utils.prune`, `parametrize`).
        ValueError: the weight holds integers, or an embedding changes it in its forward.
    """
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None:
        raise IncompatibleCallbacks(
            f"quantization needs {name}.weight to be a plain parameter, but it is reparametrized (torch.nn.utils.prune "
            f"or parametrize, or Lightning's ModelPruning); use GradualPruning, or exclude=['{name}']"
        )
    if not weight.is_floating_point():
        raise ValueError(
            f"quantization needs floating-point weights, got {weight.dtype} in '{name}'; start from the "
            f"unquantized model or exclude=['{name}']"
        )
    if getattr(module, "max_norm", None) is not None:
        raise ValueError(
            f"'{name}' rescales its weight in each forward (max_norm={module.max_norm}), which would then happen to "
            f"the rounded copy; take max_norm off the embedding or exclude=['{name}']"
        )


def channels_first(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a layer's weight as a grid sees it: output channels are dimension 0."""
    return output_first(weight, module.groups) if isinstance(module, TRANSPOSED) else weight


def attach(
    module: nn.Module, weights: WeightGrid = WEIGHTS, inputs: InputGrid | None = INPUTS, *, compiled: bool = False
) -> FakeQuant:
    """Attach fake-quantization, switched off, to one layer; a layer that has it keeps its state."""
    state: FakeQuant | None = module.__dict__.get(STATE)
    if state is None:
        groups = module.groups if isinstance(module, TRANSPOSED) else 0
        state = FakeQuant(weights, inputs, compiled=compiled, groups=groups)
        module.__dict__[STATE] = state
        state.handles = [
            module.register_forward_pre_hook(_before_forward, with_kwargs=True),
            # Before a gate's, whose hooks are around these.
            module.register_forward_hook(_after_forward, always_call=True, prepend=True),
        ]
        if isinstance(module, Projection):
            module.route()
    return state


def detach(module: nn.Module) -> None:
    """Take fake-quantization off one layer; a layer without it is left as it is."""
    state: FakeQuant | None = module.__dict__.pop(STATE, None)
    for handle in state.handles if state else ():
        handle.remove()
    if state and isinstance(module, Projection):
        module.unroute()


@contextmanager
def fake_quantized(module: nn.Module, ranges: Mapping[str, Range]) -> Iterator[nn.Module]:
    """Let `module` compute, inside the block, with the ranges of training: what a converted model should reproduce.

    Args:
        module: the trained module; left as it was at the end.
        ranges: name of a layer -> its range, from `QuantizationAwareTraining.ranges()`; a `module.` prefix that the
            LightningModule had must be cut off when only a submodule is passed.

    Raises:
        NothingToCompress: `ranges` is empty.
        AttributeError: a name is not a submodule of `module`.

    >>> layer = nn.Sequential(nn.Linear(2, 1, bias=False))
    >>> with torch.no_grad(), fake_quantized(layer, {"0": Range(0.0, 2.55)}):
    ...     _ = layer[0].weight.copy_(torch.ones(1, 2))
    ...     layer(torch.tensor([[0.104, 9.0]]))
    tensor([[2.6500]])
    """
    if not ranges:
        raise NothingToCompress("fake_quantized got no ranges; pass QuantizationAwareTraining(...).ranges() after fit")
    clean = {clean_name(name): layer for name, layer in module.named_modules(remove_duplicate=False)}
    clean |= projections_in(module)
    layers = {name: clean[name] if name in clean else module.get_submodule(name) for name in ranges}
    try:
        for name, layer in layers.items():
            trained = ranges[name]
            state = attach(layer, trained.weight_grid, trained.input_grid)
            device = layer.get_parameter("weight").device
            state.extremes = torch.tensor([-trained.low, trained.high], device=device)
            state.learn("weight", {key: tensor.to(device) for key, tensor in trained.weights_learned.items()})
            state.learn("input", {key: tensor.to(device) for key, tensor in trained.inputs_learned.items()})
            state.phase = Phase.FROZEN
        yield module
    finally:
        for layer in layers.values():
            detach(layer)

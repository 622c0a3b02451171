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
from lightning_compress.quantization.grid import Range, input_grid
from lightning_compress.quantization.observers import widen
from lightning_compress.shadowing import remember, restore
from lightning_compress.sharding import clean_name

__all__ = ["QUANTIZABLE", "FakeQuant", "Phase", "attach", "detach", "fake_quantized"]

QUANTIZABLE: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
STATE = "_fake_quant"


class Phase(IntEnum):
    """What a layer's fake-quantization does now."""

    OFF = 0
    OBSERVE = 1
    ROUND = 2
    FROZEN = 3


@dataclass
class FakeQuant:
    """State of one attached layer: grids, phase, and what its last forwards saw.

    Plain tensors rather than buffers: a buffer would be rounded by a bf16 module conversion and overwritten by
    DDP's buffer broadcast in the middle of an accumulation.
    """

    bits: int = 8
    weight_bits: int = 8
    phase: Phase = Phase.OFF
    compiled: bool = False
    keep_weight: bool = False
    extremes: Tensor = field(default_factory=lambda: torch.full((2,), float("nan")))
    pending: Tensor | None = None
    kept: tuple[Tensor, int, Tensor] | None = None
    shadowed: list[Any] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)

    @property
    def observed(self) -> bool:
        """Whether this layer has a range."""
        return not bool(torch.isnan(self.extremes).any())

    @property
    def range(self) -> Range:
        """The trained range and widths, as an exporter needs them."""
        low, high = 0.0 - self.extremes[0].item(), self.extremes[1].item()
        return Range(low, high, self.bits, self.weight_bits)

    def rounded_weight(self, weight: Tensor) -> Tensor:
        """Return the fake-quantized weight; with `keep_weight`, its values are computed once per optimizer step."""
        if torch.compiler.is_compiling():
            return fake.fake_quantize_weight(weight, self.weight_bits)
        rounding = fake.compiled_functions()[0] if self.compiled else fake.round_weight
        # What shadows the parameter (a gate) is another tensor in each forward, and channels may be taken out of it.
        if not (self.keep_weight and torch.is_grad_enabled() and isinstance(weight, nn.Parameter)):
            return fake.straight_through(weight, rounding(weight, self.weight_bits))
        if self.kept is None or self.kept[0] is not weight or self.kept[1] != weight._version:
            self.kept = (weight, weight._version, rounding(weight, self.weight_bits))
        return fake.straight_through(weight, self.kept[2])

    def rounded_input(self, value: Tensor) -> Tensor:
        """Return the fake-quantized input."""
        if value.is_nested:  # nn.TransformerEncoder packs padded batches so in evaluation
            return torch.nested.as_nested_tensor([self.rounded_input(row) for row in value.unbind()])
        scale, zero_point = input_grid(-self.extremes[0], self.extremes[1], self.bits)
        if torch.compiler.is_compiling():
            return fake.fake_quantize_input(value, scale, zero_point, self.bits)
        if self.compiled:
            return fake.compiled_functions()[1](value, scale, zero_point, self.bits)
        return fake.fake_quantize_input_eager(value, scale, zero_point, self.bits)


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
    # Gradients are off in validation; a recomputation under activation checkpointing sees the same extremes again.
    if state.phase in (Phase.OBSERVE, Phase.ROUND) and torch.is_grad_enabled():
        state.pending = widen(state.pending, value)
    if state.phase >= Phase.ROUND:
        module.__dict__["weight"] = state.rounded_weight(module.weight)  # type: ignore[arg-type]
        value = state.rounded_input(value)
    return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, name: value})


def _after_forward(module: nn.Module, args: Any, output: Any) -> None:
    restore(module, module.__dict__[STATE].shadowed)


def check_weight(name: str, module: nn.Module) -> None:
    """Raise if a layer's weight is not a plain floating-point parameter that can be shadowed. Runs before attaching.

    Raises:
        IncompatibleCallbacks: the weight is reparametrized (`torch.nn.utils.prune`, `parametrize`).
        ValueError: the weight holds integers.
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


def attach(module: nn.Module, bits: int = 8, weight_bits: int = 8, *, compiled: bool = False) -> FakeQuant:
    """Attach fake-quantization, switched off, to one layer; a layer that has it keeps its state."""
    state: FakeQuant | None = module.__dict__.get(STATE)
    if state is None:
        state = FakeQuant(bits=bits, weight_bits=weight_bits, compiled=compiled)
        module.__dict__[STATE] = state
        state.handles = [
            module.register_forward_pre_hook(_before_forward, with_kwargs=True),
            # Before a gate's, whose hooks are around these.
            module.register_forward_hook(_after_forward, always_call=True, prepend=True),
        ]
    return state


def detach(module: nn.Module) -> None:
    """Take fake-quantization off one layer; a layer without it is left as it is."""
    state: FakeQuant | None = module.__dict__.pop(STATE, None)
    for handle in state.handles if state else ():
        handle.remove()


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
    layers = {name: clean[name] if name in clean else module.get_submodule(name) for name in ranges}
    try:
        for name, layer in layers.items():
            trained = ranges[name]
            state = attach(layer, trained.bits, trained.weight_bits)
            weight = layer.get_parameter("weight")
            state.extremes = torch.tensor([-trained.low, trained.high], device=weight.device)
            state.phase = Phase.FROZEN
        yield module
    finally:
        for layer in layers.values():
            detach(layer)

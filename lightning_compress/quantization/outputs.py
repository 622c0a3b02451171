"""Round a module's output on an affine grid of an observed range, by one forward hook.

For the outputs that `placement` finds: what feeds a residual addition, a concatenation, a pooling or an activation
that is no clipping. Phases, observing and folding are those of a layer's input (`attach`): one loop serves both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.quantization import fake
from lightning_compress.quantization.attach import Phase, fake_quantized
from lightning_compress.quantization.attention import attach_products, detach_products, is_product_key
from lightning_compress.quantization.gathered import Gathering
from lightning_compress.quantization.grid import Range, input_grid
from lightning_compress.quantization.histograms import count_values
from lightning_compress.quantization.observers import widen
from lightning_compress.quantization.placement import PlacedOutput
from lightning_compress.sharding import clean_name

__all__ = [
    "OUTPUT_STATE", "OutputFakeQuant", "OutputRange", "Ranges", "attach_output", "detach_output", "output_key",
    "outputs_of", "products_of", "rounded_as_trained", "share_grids",
]  # fmt: skip

OUTPUT_STATE = "_fake_quant_output"
SUFFIX = ":output"  # no module's name holds a colon in practice, and one layer may have both ranges


@dataclass(frozen=True)
class OutputRange:
    """What training decided about one module's output, beside the layers' `Range`s under `output_key(name)`.

    Or about one operand of a product inside a module, under `product_key(name, operand)`.
    """

    low: float
    high: float
    bits: int = 8

    @property
    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, computed in float32 exactly as in training."""
        return input_grid(torch.tensor(self.low), torch.tensor(self.high), self.bits)

    @property
    def scale(self) -> float:
        """Step of the grid."""
        return float(self.grid[0])

    @property
    def zero_point(self) -> int:
        """Code of the value 0.0, in 0 .. 2^bits - 1."""
        return int(self.grid[1])


Ranges = Mapping[str, Range | OutputRange]


def output_key(name: str) -> str:
    """Return the key of a module's `OutputRange` among ranges.

    >>> output_key("layer1.0.bn2")
    'layer1.0.bn2:output'
    """
    return name + SUFFIX


def outputs_of(ranges: Ranges) -> tuple[dict[str, Range], dict[str, OutputRange]]:
    """Return the layers' ranges and the outputs' ranges, each by module name.

    >>> outputs_of({"a": Range(0.0, 1.0), "a:output": OutputRange(0.0, 2.0)})[1]
    {'a': OutputRange(low=0.0, high=2.0, bits=8)}
    """
    layers = {name: trained for name, trained in ranges.items() if isinstance(trained, Range)}
    outputs = {n: trained for n, trained in ranges.items() if isinstance(trained, OutputRange)}
    return layers, {n.removesuffix(SUFFIX): trained for n, trained in outputs.items() if not is_product_key(n)}


def products_of(ranges: Ranges) -> dict[str, dict[str, OutputRange]]:
    """Return the ranges of products' operands, by module name and operand.

    >>> products_of({"a": Range(0.0, 1.0), "a:product0.left": OutputRange(0.0, 2.0)})
    {'a': {'product0.left': OutputRange(low=0.0, high=2.0, bits=8)}}
    """
    found: dict[str, dict[str, OutputRange]] = {}
    for key, trained in ranges.items():
        if isinstance(trained, OutputRange) and is_product_key(key):
            name, _, operand = key.rpartition(":")
            found.setdefault(name, {})[operand] = trained
    return found


@dataclass
class OutputFakeQuant:
    """State of one module's output: names mean what they do in `FakeQuant`."""

    bits: int = 8
    low: float = -math.inf
    high: float = math.inf
    phase: Phase = Phase.OFF
    compiled: bool = False
    extremes: Tensor = field(default_factory=lambda: torch.full((2,), float("nan")))
    pending: Tensor | None = None
    counts: Tensor | None = None
    settled: bool = False
    handles: list[RemovableHandle] = field(default_factory=list)

    @property
    def observed(self) -> bool:
        """Whether this output has a range."""
        return not bool(torch.isnan(self.extremes).any())

    @property
    def range(self) -> OutputRange:
        """The trained range, as an exporter needs it."""
        return OutputRange(0.0 - self.extremes[0].item(), self.extremes[1].item(), self.bits)

    def seen(self, value: Tensor) -> Tensor:
        """Return the pending extremes widened by a value, within the limits of what is read from it."""
        seen = widen(self.pending, value)
        return torch.stack([seen[0].clamp(-self.high, -self.low), seen[1].clamp(self.low, self.high)])

    def note(self, value: Tensor) -> None:
        """Take in what an output held, within the limits of what is read from it."""
        self.pending = self.seen(value)
        if self.counts is not None:
            self.counts += count_values(value.detach().clamp(self.low, self.high))

    def rounded(self, value: Tensor) -> Tensor:
        """Return the fake-quantized output."""
        scale, zero_point = input_grid(-self.extremes[0], self.extremes[1], self.bits)
        if torch.compiler.is_compiling():
            return fake.fake_quantize_input(value, scale, zero_point, self.bits)
        if self.compiled:
            return fake.compiled_functions()[1](value, scale, zero_point, self.bits)
        return fake.fake_quantize_input_eager(value, scale, zero_point, self.bits)

    def passed(self, value: Tensor) -> Tensor:
        """Observe a value, and return what is read of it: itself, or rounded."""
        if self.phase in (Phase.OBSERVE, Phase.ROUND) and not self.settled and torch.is_grad_enabled():
            self.note(value)
        return self.rounded(value) if self.phase >= Phase.ROUND else value


def _after_forward(module: nn.Module, args: Any, output: Any) -> Any:
    state: OutputFakeQuant = module.__dict__[OUTPUT_STATE]
    if state.phase == Phase.OFF:
        return None
    if not isinstance(output, Tensor):
        raise TypeError(
            f"rounding the output of a {type(module).__name__} needs it to be one tensor, got {type(output).__name__}; "
            "place it at the part whose output the tensor is"
        )
    return state.passed(output)


def attach_output(
    module: nn.Module, bits: int = 8, low: float = -math.inf, high: float = math.inf, *, compiled: bool = False
) -> OutputFakeQuant:
    """Attach rounding of a module's output, switched off; a module that has it keeps its state.

    Args:
        module: any module that returns one tensor.
        bits: width of the code.
        low: what is read of the output begins here (`PlacedOutput.low`).
        high: and ends here.
        compiled: use the compiled rounding function.
    """
    state: OutputFakeQuant | None = module.__dict__.get(OUTPUT_STATE)
    if state is None:
        state = OutputFakeQuant(bits, low, high, compiled=compiled)
        module.__dict__[OUTPUT_STATE] = state
        state.handles = [module.register_forward_hook(_after_forward)]
    return state


def detach_output(module: nn.Module) -> None:
    """Take the rounding off a module's output; a module without it is left as it is."""
    state: OutputFakeQuant | None = module.__dict__.pop(OUTPUT_STATE, None)
    for handle in state.handles if state else ():
        handle.remove()


def share_grids(
    placed: Iterable[PlacedOutput], outputs: Mapping[str, OutputFakeQuant], inputs: Mapping[str, Gathering]
) -> None:
    """Give layers that read a rounded output its range. Runs after ranges have moved, once an optimizer step.

    Rounding on the same grid again changes nothing, so the file needs one rounding only.
    """
    for place in placed:
        for reader in place.readers:
            if place.name in outputs and outputs[place.name].observed and reader in inputs:
                inputs[reader].extremes.copy_(outputs[place.name].extremes)
                inputs[reader].counts = None


@contextmanager
def rounded_as_trained(module: nn.Module, ranges: Ranges) -> Iterator[nn.Module]:
    """Let `module` compute, inside the block, with all trained ranges, those of outputs too: what a file must equal.

    Raises:
        NothingToCompress: no layer has a range.
        AttributeError: a name is not a submodule of `module`.

    >>> layer = nn.Sequential(nn.Linear(1, 1, bias=False))
    >>> with torch.no_grad(), rounded_as_trained(layer, {"0": Range(0.0, 2.55), "0:output": OutputRange(0.0, 25.5)}):
    ...     _ = layer[0].weight.copy_(torch.ones(1, 1))
    ...     layer(torch.tensor([[1.23]]))
    tensor([[1.2000]])
    """
    layers, outputs = outputs_of(ranges)
    clean = {clean_name(name): part for name, part in module.named_modules(remove_duplicate=False)}
    products = products_of(ranges)
    parts = {name: clean[name] if name in clean else module.get_submodule(name) for name in (*outputs, *products)}
    with ExitStack() as stack:
        stack.enter_context(fake_quantized(module, layers))
        device = next(module.parameters()).device
        for name, trained in outputs.items():
            state = attach_output(parts[name], trained.bits)
            stack.callback(detach_output, parts[name])
            state.extremes = _extremes(trained, device)
            state.phase = Phase.FROZEN
        for name, operands in products.items():
            stack.callback(detach_products, parts[name])
            attach_products(parts[name], {
                operand: OutputFakeQuant(trained.bits, phase=Phase.FROZEN, extremes=_extremes(trained, device))
                for operand, trained in operands.items()
            })  # fmt: skip
        yield module


def _extremes(trained: OutputRange, device: torch.device) -> Tensor:
    return torch.tensor([-trained.low, trained.high], device=device)

"""Ranges of layers' inputs from a few batches, without training.

One pass notes each batch's extremes, and counts values by their bfloat16 pattern: 65 536 bins that need no range in
advance and are at most 0.4 % of a value off, small values included. A rule then makes the range of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressError
from lightning_compress.pruning.calibration import evaluating, run
from lightning_compress.quantization.attach import QUANTIZABLE, check_weight
from lightning_compress.quantization.grid import Range, check_bits, input_grid
from lightning_compress.select import Pattern, patterns_or_none, select_layers

__all__ = ["RangeRule", "Seen", "calibrate", "mean_square_error", "min_max", "moving_average", "percentile"]

PATTERNS = 1 << 16
CHUNK = 1 << 22  # values counted at a time: their patterns take 8 bytes each
SHRINKS = 80


@dataclass
class Seen:
    """What one layer's input held over the batches.

    Args:
        extremes: (low, high) of each call, float32.
        counts: (65536,) int64, how often each bfloat16 pattern was seen; pattern -32768 comes first.
    """

    extremes: list[Tensor] = field(default_factory=list)
    counts: Tensor = field(default_factory=lambda: torch.zeros(PATTERNS, dtype=torch.int64))

    def add(self, value: Tensor) -> None:
        """Note one call's input. Runs in each calibration forward."""
        value = value.detach()
        flat = torch.cat([row.flatten() for row in value.unbind()]) if value.is_nested else value.flatten()
        if flat.numel() == 0:  # as a detector's layer gets when nothing was found
            return
        self.extremes.append(torch.stack(torch.aminmax(flat)).float())
        for piece in torch.split(flat, CHUNK):
            codes = piece.bfloat16().view(torch.int16).to(torch.int64) + PATTERNS // 2
            self.counts += torch.bincount(codes, minlength=PATTERNS).to(self.counts.device)

    def histogram(self) -> tuple[Tensor, Tensor]:
        """Return the values seen, ascending, and how often: float32 and float64."""
        places = self.counts.nonzero().flatten()
        values = (places - PATTERNS // 2).to(torch.int16).view(torch.bfloat16).float()
        order = values.argsort()
        values, counts = values[order], self.counts[places][order].double()
        values[0], values[-1] = min_max(self)  # which are known exactly
        return values, counts


RangeRule = Callable[[Seen, int], tuple[float, float]]


# Rules


def min_max(seen: Seen, bits: int = 8) -> tuple[float, float]:
    """Return the smallest and largest value seen: nothing is clipped. Runs once a layer, after the batches.

    >>> seen = Seen()
    >>> seen.add(torch.tensor([-1.0, 3.0])), seen.add(torch.tensor([0.0, 9.0]))
    (None, None)
    >>> min_max(seen)
    (-1.0, 9.0)
    """
    every = torch.stack(seen.extremes)
    return float(every[:, 0].min()), float(every[:, 1].max())


def moving_average(seen: Seen, bits: int = 8, momentum: float = 0.1) -> tuple[float, float]:
    """Return extremes averaged over the batches as training does: `range += momentum (seen - range)`.

    Jacob et al. 2018, section 3.1.

    Args:
        seen: at least one call.
        bits: not used.
        momentum: weight of the newest batch, in (0, 1].

    >>> seen = Seen()
    >>> seen.add(torch.tensor([0.0, 1.0])), seen.add(torch.tensor([0.0, 2.0]))
    (None, None)
    >>> moving_average(seen, momentum=0.5)
    (0.0, 1.5)
    """
    average = seen.extremes[0]
    for extremes in seen.extremes[1:]:
        average = torch.lerp(average, extremes, momentum)
    return float(average[0]), float(average[1])


def percentile(seen: Seen, bits: int = 8, share: float = 0.9999) -> tuple[float, float]:
    """Return the range that leaves out 1 - share of the values at either end.

    Args:
        seen: at least one call.
        bits: not used.
        share: in (0.5, 1].

    Raises:
        ValueError: `share` is out of its range.

    >>> seen = Seen()
    >>> seen.add(torch.arange(101.0))
    >>> percentile(seen, share=0.95)
    (5.0, 95.0)
    """
    if not 0.5 < share <= 1.0:
        raise ValueError(f"share is in (0.5, 1], got {share!r}")
    values, counts = seen.histogram()
    below = counts.cumsum(0)
    most = math.floor((1.0 - share) * float(below[-1]) + 1e-6)  # 1 - 0.99 is a little above 0.01
    from_above = counts.flip(0).cumsum(0).flip(0)
    return float(values[(below > most).nonzero()[0]]), float(values[(from_above > most).nonzero()[-1]])


def mean_square_error(seen: Seen, bits: int = 8) -> tuple[float, float]:
    """Return the range whose rounding to `bits` has the least mean square error over the values seen.

    Searched: both ends shrunk together to k/80 of what was seen, k from 80 down to 1, then each end alone from there.

    >>> seen = Seen()
    >>> seen.add(torch.cat([torch.linspace(0, 1, 1000), torch.tensor([10.0])]))
    >>> mean_square_error(seen, 4)
    (0.0, 6.875)
    """
    values, counts = seen.histogram()
    low, high = min_max(seen)
    # The widest first, so that it is kept where another is no better.
    shrinks = torch.arange(SHRINKS, 0, -1, dtype=torch.float32) / SHRINKS
    fixed = torch.ones_like(shrinks)
    for of_low, of_high in ((shrinks, shrinks), (shrinks, fixed), (fixed, shrinks)):
        ends = list(zip((low * of_low).tolist(), (high * of_high).tolist(), strict=True))
        errors = [_error(values, counts, *each, bits) for each in ends]
        low, high = ends[errors.index(min(errors))]
    return low, high


def _error(values: Tensor, counts: Tensor, low: float, high: float, bits: int) -> float:
    scale, zero_point = input_grid(torch.tensor(low), torch.tensor(high), bits)
    codes = (values / scale).round().clamp(-zero_point, 2**bits - 1 - zero_point)
    return float((counts * (codes * scale - values).square()).sum())


# Surgery


@contextmanager
def _noting(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Seen]]:
    seen: dict[str, Seen] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
            if value is not None:
                seen.setdefault(name, Seen()).add(value)

        return hook

    handles = [layer.register_forward_pre_hook(note(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _check(seen: Mapping[str, Seen], layers: Mapping[str, nn.Module]) -> None:
    for name, noted in seen.items():  # in the order of the forward: the first is where it began
        for call, extremes in enumerate(noted.extremes):
            if not bool(torch.isfinite(extremes).all()):
                raise CompressError(
                    f"calibration needs finite inputs, got NaN or infinity into '{name}' in its call {call}, before "
                    f"any other selected layer; look at that batch and the layers before '{name}'"
                )
    missing = [name for name in layers if name not in seen or not seen[name].extremes]
    if missing:
        raise CompressError(
            f"calibration found no input of {missing}: the forward never calls these layers as modules, or with "
            f"empty inputs; calibrate with batches that reach them, or exclude={missing}"
        )
    zero = [name for name, noted in seen.items() if min_max(noted) == (0.0, 0.0)]
    if zero:
        raise CompressError(
            f"the input of {zero} is zero in every batch, so it has no range; calibrate with real inputs, or "
            f"exclude={zero}"
        )


def calibrated_layers(
    module: nn.Module, include: Iterable[Pattern] | Pattern | None, exclude: Iterable[Pattern] | Pattern | None
) -> dict[str, nn.Module]:
    """Return the layers to quantize by clean name. Runs first in every call of this room.

    The projections of `nn.MultiheadAttention`, which it uses without calling them, are left out unless included.

    Raises:
        ValueError, NothingToCompress, IncompatibleCallbacks: as `select_layers` and `check_weight`.
    """
    layers = dict(select_layers(module, QUANTIZABLE, patterns_or_none(include), patterns_or_none(exclude)).layers)
    if include is None:
        inside = {id(layer.out_proj) for layer in module.modules() if isinstance(layer, nn.MultiheadAttention)}
        layers = {name: layer for name, layer in layers.items() if id(layer) not in inside}
    for name, layer in layers.items():
        check_weight(name, layer)
    return layers


def calibrate(
    module: nn.Module,
    batches: Iterable[Any],
    input_bits: int = 8,
    weight_bits: int = 8,
    rule: RangeRule = min_max,
    include: Iterable[Pattern] | Pattern | None = None,
    exclude: Iterable[Pattern] | Pattern | None = None,
) -> dict[str, Range]:
    """Run a module over a few batches and return the range of each selected layer's input. Changes nothing.

    Args:
        module: in any mode; it runs in eval mode and is put back.
        batches: inputs on the module's device: a tensor, a tuple or list of positional arguments, or a dict of keyword
            arguments each; read once, one at a time.
        input_bits: width of input codes, 2 to 8.
        weight_bits: width of weight codes, 2 to 8; noted in the ranges only.
        rule: `min_max`, `moving_average`, `percentile`, `mean_square_error`, or any `(seen, bits) -> (low, high)`;
            options through `functools.partial`.
        include: names, globs, class names or types; None is every Linear and Conv1d/2d/3d but the output head.
        exclude: the same, left in floating point.

    Returns:
        Name of a layer -> its range, for `export_onnx(ranges=...)` and `fake_quantized`.

    Raises:
        ValueError: no batches, bits out of range, a pattern that matches nothing.
        NothingToCompress: nothing is selected.
        CompressError: NaN or infinite inputs, a layer that never runs, an input that is always zero; each names it.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> ranges = calibrate(net, [torch.tensor([[-1.0, 0.5]]), torch.tensor([[0.0, 1.5]])])
    >>> list(ranges), ranges["0"].low, ranges["0"].high
    (['0'], -1.0, 1.5)
    """
    check_bits(input_bits), check_bits(weight_bits)
    layers = calibrated_layers(module, include, exclude)
    with evaluating(module), _noting(layers) as seen:
        count = 0
        for batch in batches:
            run(module, [batch])
            count += 1
    if not count:
        raise ValueError("calibration needs at least one batch of inputs, got none")
    _check(seen, layers)
    ranges = {name: rule(seen[name], input_bits) for name in layers}
    for name, ends in ranges.items():
        if not all(map(math.isfinite, ends)) or ends[0] > ends[1]:
            raise CompressError(f"the rule gave '{name}' the range {ends}; expected finite low <= high")
    return {name: Range(low, high, input_bits, weight_bits) for name, (low, high) in ranges.items()}

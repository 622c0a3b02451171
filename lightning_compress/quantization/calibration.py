"""Ranges of layers' inputs from a few batches, without training: one pass notes what was seen, a rule makes ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressError
from lightning_compress.pruning.calibration import evaluating, run
from lightning_compress.quantization.attach import QUANTIZABLE, check_weight
from lightning_compress.quantization.grid import Range, check_bits
from lightning_compress.quantization.ranges import RangeRule, Seen, min_max, range_by, reads_counts
from lightning_compress.select import Pattern, patterns_or_none, select_layers

__all__ = ["calibrate", "calibrated_layers"]


@contextmanager
def _noting(layers: Mapping[str, nn.Module], counted: bool) -> Iterator[dict[str, Seen]]:
    seen: dict[str, Seen] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
            if value is not None:
                seen.setdefault(name, Seen()).add(value, counted)

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
        rule: of `quantization.ranges`: `min_max`, `moving_average`, `percentile`, `mean_square_error`, or any
            `(seen, bits) -> (low, high)`; options through `functools.partial`.
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
    with evaluating(module), _noting(layers, reads_counts(rule)) as seen:
        count = 0
        for batch in batches:
            run(module, [batch])
            count += 1
    if not count:
        raise ValueError("calibration needs at least one batch of inputs, got none")
    _check(seen, layers)
    ranges = {name: range_by(rule, name, seen[name], input_bits) for name in layers}
    return {name: Range(low, high, input_bits, weight_bits) for name, (low, high) in ranges.items()}

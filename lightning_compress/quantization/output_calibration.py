"""Ranges of outputs from a few batches: what an int8 convolution or addition needs besides its inputs' ranges."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_compress.errors import CompressError
from lightning_compress.pruning.calibration import evaluating, run
from lightning_compress.quantization.attach import QUANTIZABLE
from lightning_compress.quantization.grid import FLOAT_BITS, Range
from lightning_compress.quantization.outputs import OutputRange, output_key
from lightning_compress.quantization.placement import PlacedOutput, find_outputs
from lightning_compress.quantization.ranges import RangeRule, Seen, min_max, range_by, reads_counts

__all__ = ["calibrate_outputs"]

BITS = 8


@contextmanager
def _noting(module: nn.Module, places: Iterable[PlacedOutput], counted: bool) -> Iterator[dict[str, Seen]]:
    seen = {place.name: Seen() for place in places}

    def note(place: PlacedOutput, output: Tensor) -> None:
        seen[place.name].add(output.clamp(place.low, place.high), counted)

    with ExitStack() as stack:
        for place in places:
            part = module.get_submodule(place.name)
            handle = part.register_forward_hook(lambda _part, _args, output, place=place: note(place, output))
            stack.callback(handle.remove)
        yield seen


def calibrate_outputs(
    module: nn.Module, batches: Iterable[Any], ranges: Mapping[str, Range], rule: RangeRule = min_max
) -> dict[str, Range | OutputRange]:
    """Add to calibrated ranges those of the outputs that an int8 file must round too. Runs after `calibrate`.

    Without them a convolution whose output goes into an addition, a concatenation or a float head stays in floating
    point in ONNX Runtime, and so does the addition (`quantization.placement`). Layers that read a rounded output get
    its range, so that nothing is rounded twice. Changes nothing in the module.

    Args:
        module: as `calibrate` got it.
        batches: as `calibrate` takes them, held as a list.
        ranges: of `calibrate` or `quantize_post_training`.
        rule: as there.

    Returns:
        All ranges: for `export_onnx(ranges=...)` and `rounded_as_trained`.

    Raises:
        ValueError: no batches.
        CompressError: a rounded output is NaN or infinite.

    >>> import torch
    >>> from lightning_compress.quantization.calibration import calibrate
    >>> net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    >>> images = [torch.rand(1, 1, 2, 2)]
    >>> list(calibrate_outputs(net, images, calibrate(net, images)))
    ['0', '0:output']
    """
    inputs = list(batches)
    if not inputs:
        raise ValueError("calibration needs at least one batch of inputs, got none")
    kinds = dict(module.named_modules())
    layers = [name for name, trained in ranges.items()
              if trained.bits < FLOAT_BITS and isinstance(kinds.get(name), QUANTIZABLE)]  # fmt: skip
    args, kwargs = _arguments(inputs[0])
    places = find_outputs(module, layers, args, kwargs).outputs
    with evaluating(module), _noting(module, places, reads_counts(rule)) as seen:
        run(module, inputs)
    found: dict[str, Range | OutputRange] = dict(ranges)
    for place in places:
        low, high = _range(rule, place.name, seen[place.name])
        found[output_key(place.name)] = OutputRange(low, high, BITS)
        found.update({name: dataclasses.replace(ranges[name], low=low, high=high) for name in place.readers})
    return found


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def _range(rule: RangeRule, name: str, seen: Seen) -> tuple[float, float]:
    if not all(bool(extremes.isfinite().all()) for extremes in seen.extremes):
        raise CompressError(f"calibration needs finite outputs, got NaN or infinity from '{name}'; look at its batches")
    return range_by(rule, name, seen, BITS)

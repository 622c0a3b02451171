"""What each layer's weight is like at one moment of a run: zeros, width, rounding error, spread of its values."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from lightning_compress.measure.size import Count, packed_bits
from lightning_compress.parts import Part
from lightning_compress.sharding import all_reduce_sum, local

__all__ = ["LayerState", "count_each", "sqnr_of_each", "stored_bytes", "value_counts", "write_rows"]

FLOAT_BITS = 32


@dataclass(frozen=True)
class LayerState:
    """One weight at one moment.

    Args:
        step: the logger's step.
        layer: the parameter's name.
        sparsity: its fraction of zeros.
        bits: width of the codes it is rounded to, or of its dtype.
        sqnr_db: its signal against what rounding changes; None where nothing is rounded, or nothing changed by it.
    """

    step: int
    layer: str
    sparsity: float
    bits: int
    sqnr_db: float | None = None


@torch.no_grad()
def count_each(parameters: Mapping[str, Tensor], parts: Mapping[str, Part] | None = None) -> dict[str, Count]:
    """Count the non-zeros of each tensor; all of them wait for the device once. NaN counts, -0.0 does not.

    Args:
        parameters: by name.
        parts: where each process has a piece of them (`sharding.parts_of`); every process has to call this then.

    >>> count_each({"a": torch.tensor([1.0, 0.0]), "b": torch.zeros(2, 2)})
    {'a': Count(nonzero=1, total=2), 'b': Count(nonzero=0, total=4)}
    """
    if not parameters:
        return {}
    pieces = {name: local(parameter) for name, parameter in parameters.items()}
    counts = torch.stack([torch.count_nonzero(piece) for piece in pieces.values()])
    if parts is None:
        return {n: Count(c, pieces[n].numel()) for n, c in zip(pieces, counts.tolist(), strict=True)}
    counted = torch.tensor([parts[name].counted for name in pieces], device=counts.device)
    totals = [math.prod(parts[name].shape) for name in pieces]
    nonzero = all_reduce_sum(counts * counted).tolist()
    return {name: Count(c, total) for name, c, total in zip(pieces, nonzero, totals, strict=True)}


@torch.no_grad()
def sqnr_of_each(rounded: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, float | None]:
    """Return 10 log10(sum w^2 / sum (w - q)^2) by name of each weight w and its rounded form q, in dB.

    None where the rounding changes nothing or the weight is all zeros or not finite.

    >>> sqnr_of_each([("a", torch.tensor([10.0, 0.0]), torch.tensor([9.0, 0.0]))])
    {'a': 20.0}
    """
    powers = {n: (w.float().square().sum(), (w.float() - q.float()).square().sum()) for n, w, q in rounded}
    if not powers:
        return {}
    ratios = torch.stack([10 * torch.log10(signal / noise) for signal, noise in powers.values()]).tolist()
    return {name: ratio if math.isfinite(ratio) else None for name, ratio in zip(powers, ratios, strict=True)}


def stored_bytes(counts: Mapping[str, Count], bits: Mapping[str, int]) -> int:
    """Estimate what the weights take when each is stored the smaller way of two: all, or a bitmap and its non-zeros.

    Args:
        counts: of every tensor.
        bits: width of an element; 32 where a name is missing.

    >>> stored_bytes({"dense": Count(8, 8), "sparse": Count(8, 80)}, {"sparse": 8})
    50
    """
    return -(-sum(packed_bits(count, bits.get(name, FLOAT_BITS)) for name, count in counts.items()) // 8)


@torch.no_grad()
def value_counts(weight: Tensor, bins: int = 64) -> tuple[list[int], list[float]] | None:
    """Count the finite non-zero values of a weight in bins of one width; None without any.

    Returns:
        `bins` counts, and the `bins` + 1 edges.

    >>> value_counts(torch.tensor([0.0, 1.0, 1.2, 3.0]), bins=2)
    ([2, 1], [1.0, 2.0, 3.0])
    """
    values = weight.detach().flatten().float()
    values = values[(values != 0) & values.isfinite()]
    if not values.numel():
        return None
    low, high = (bound.item() for bound in values.aminmax())
    if low == high:  # binary weights of one sign, or a single one: a bin around it
        low, high = low - 0.5 * abs(low), high + 0.5 * abs(high)
    counts = torch.histc(values, bins, low, high).to(torch.int64).tolist()
    return counts, [low + (high - low) * index / bins for index in range(bins + 1)]


def write_rows(rows: Sequence[LayerState], path: Path) -> Path:
    """Write one line a layer and moment as CSV, an empty field for None."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(LayerState))
        writer.writerows((row.step, row.layer, row.sparsity, row.bits, row.sqnr_db) for row in rows)
    return path

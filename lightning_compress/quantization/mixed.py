"""Another width for each layer: what a width costs, and the choice that harms least within a budget."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from lightning_compress.measure.flops import macs_per_weight
from lightning_compress.quantization.allocation import Table, allocate, check_budget
from lightning_compress.quantization.scales import check_bits
from lightning_compress.quantization.sensitivity import (
    check_widths,
    hessian_sensitivity,
    hessian_traces,
    loss_sensitivity,
)
from lightning_compress.quantization.trials import (
    Group,
    Loss,
    Patterns,
    first_pass,
    measuring,
    weight_groups,
    weight_of,
)
from lightning_compress.search.allocate import stored_bytes as bytes_of_codes
from lightning_compress.sharding import clean_name

__all__ = ["bit_operations", "bits_table", "choose_bits", "stored_bytes", "weight_bytes"]

WIDTHS = (2, 3, 4, 6, 8)
InputBits = int | Literal["same"]


def choose_bits(  # noqa: PLR0913 - one call from a trained module to its widths
    module: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    budget: float,
    of: Literal["bytes", "bit_operations"] = "bytes",
    widths: Iterable[int] = WIDTHS,
    by: Literal["hessian", "loss"] | Table = "hessian",
    inputs: InputBits = 8,
    include: Patterns = None,
    exclude: Patterns = None,
) -> dict[str, int]:
    """Choose a width for each layer that harms the loss least within a budget. Runs once, before training.

    Args:
        module: trained; left as it was.
        batches: what `loss` takes, on the module's device; the first one also counts bit-operations.
        loss: (module, batch) -> a scalar tensor.
        budget: the most that the selected layers' weights may take, in bytes (codes and scales, `weight_bytes`), or
            one forward of the first batch, in bit-operations (`bit_operations`).
        of: what the budget counts.
        widths: candidates, 2 to 8 bits.
        by: "hessian" (HAWQ-V2, 16 samples a batch), "loss" (each layer rounded alone), or a table measured before:
            layer -> bits -> harm.
        inputs: width of the input codes of each layer; "same" is the width of its weights, and needs by="loss" or a
            table, as the Hessian knows of weights only.
        include: names, globs, class names or types; None is every Linear and Conv1d/2d/3d but the output head.
        exclude: the same, left in floating point.

    Returns:
        Bits of each selected layer by name; the same for layers that share a weight.

    Raises:
        ValueError: a budget that is not positive or not feasible (the smallest feasible one is named), an option out
            of its range, no batches, a layer that never runs, a loss that is NaN or not a scalar.
        TypeError: a loss that is no tensor.
        NothingToCompress: nothing is selected.
    """
    check_budget(budget)
    _check(of, by, inputs)
    widths, batches = check_widths(widths), list(batches)
    groups = weight_groups(module, include, exclude)
    harms = _harms(module, batches, loss, widths, by, inputs == "same", include, exclude)
    if of == "bytes":
        costs = weight_bytes(module, widths, include, exclude)
    else:
        costs = bit_operations(module, batches, loss, widths, inputs, include, exclude)
    chosen = allocate(harms, costs, budget)
    return {name: chosen[first] for first, group in groups.items() for name in group}


def _check(of: str, by: str | Table, inputs: InputBits) -> None:
    if of not in ("bytes", "bit_operations"):
        raise ValueError(f"of is what the budget counts, 'bytes' or 'bit_operations', got {of!r}")
    if isinstance(by, str) and by not in ("hessian", "loss"):
        raise ValueError(f"by is 'hessian', 'loss' or a table of sensitivities, got {by!r}")
    if inputs != "same":
        check_bits(inputs)
    elif by == "hessian":
        raise ValueError(
            "inputs='same' lets inputs get narrower together with weights, and the Hessian says nothing of inputs; "
            "use by='loss', or a fixed width such as inputs=8"
        )


def _harms(
    module: nn.Module,
    batches: list[Any],
    loss: Loss,
    widths: tuple[int, ...],
    by: str | Table,
    with_inputs: bool,
    include: Patterns,
    exclude: Patterns,
) -> Table:
    if by == "hessian":
        traces = hessian_traces(module, batches, loss, include=include, exclude=exclude)
        return hessian_sensitivity(module, traces, widths)
    if isinstance(by, str):
        return loss_sensitivity(module, batches, loss, widths, with_inputs, include, exclude)
    return {name: {bits: harms[bits] for bits in widths if bits in harms} for name, harms in by.items()}


def stored_bytes(weight: Tensor, bits: int) -> int:
    """Return the bytes of a weight's codes, packed without gaps, and of one float32 scale an output channel.

    >>> stored_bytes(nn.Linear(10, 3).weight, bits=4)
    27
    """
    return bytes_of_codes(weight.numel(), weight.shape[0], bits=bits)


def weight_bytes(
    module: nn.Module, widths: Iterable[int] = WIDTHS, include: Patterns = None, exclude: Patterns = None
) -> dict[str, dict[int, int]]:
    """Return what each layer's weight takes at each width, in bytes (`stored_bytes`); a budget is a sum of these.

    Raises:
        ValueError: widths out of 2 to 8.
        NothingToCompress: nothing is selected.

    >>> costs = weight_bytes(nn.Sequential(nn.Linear(10, 3), nn.Linear(3, 2)), (4, 8))
    >>> costs, sum(cost[4] for cost in costs.values())
    ({'0': {4: 27, 8: 42}}, 27)
    """
    widths = check_widths(widths)
    groups = weight_groups(module, include, exclude)
    return {name: {b: stored_bytes(weight_of(group), b) for b in widths} for name, group in groups.items()}


def bit_operations(
    module: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    widths: Iterable[int] = WIDTHS,
    inputs: InputBits = 8,
    include: Patterns = None,
    exclude: Patterns = None,
) -> dict[str, dict[int, int]]:
    """Return each layer's multiply-accumulates x bits of its weight x bits of its input, at each width.

    Counted in one forward of the first batch, so for all its samples together, as in Cai and Vasconcelos 2020.

    Args:
        module: left as it was.
        batches: what `loss` takes; only the first one is used.
        loss: (module, batch) -> a scalar tensor.
        widths: of the weights, 2 to 8 bits.
        inputs: width of the input codes, 2 to 8; "same" is the width of the weights.
        include: names, globs, class names or types; None is every Linear and Conv1d/2d/3d but the output head.
        exclude: the same, left out.

    Raises:
        ValueError: a width out of 2 to 8, no batches, a layer that never runs, a loss that is NaN or not a scalar.
        NothingToCompress: nothing is selected.
    """
    widths, first = check_widths(widths), list(itertools.islice(batches, 1))
    if inputs != "same":
        check_bits(inputs)
    groups = weight_groups(module, include, exclude)
    counted = _LossOf(module, loss)
    with measuring(module):
        first_pass(module, first, loss, groups)
        positions = macs_per_weight(counted, first)
    names = {id(parameter): clean_name(name) for name, parameter in counted.named_parameters()}
    macs = {name: round(positions[names[id(w)]] * w.numel()) for name, w in _weights(groups).items()}
    return {name: {b: count * b * (b if inputs == "same" else inputs) for b in widths} for name, count in macs.items()}


def _weights(groups: Mapping[str, Group]) -> dict[str, nn.Parameter]:
    return {name: weight_of(group) for name, group in groups.items()}


class _LossOf(nn.Module):
    """The loss of a batch as a forward."""

    def __init__(self, network: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.network, batch)


def bits_table(module: nn.Module, bits: Mapping[str, int]) -> str:
    """Return chosen widths as a table of text: layer, weights, bits, bytes, and their sums; for printing.

    Args:
        module: what the names are of.
        bits: from `choose_bits`; a weight that several layers share is counted once.

    Raises:
        ValueError: a layer that the module does not have, or a width out of 2 to 8.

    >>> print(bits_table(nn.Sequential(nn.Linear(10, 3), nn.Linear(3, 2)), {"0": 4, "1": 8}))
    layer  weights  bits  bytes
    0           30     4     27
    1            6     8     14
    in all      36  4.67     41
    """
    layers = {clean_name(name): layer for name, layer in module.named_modules()}
    rows = [["layer", "weights", "bits", "bytes"]]
    weights = code_bits = size = 0
    seen: set[int] = set()
    for name, width in bits.items():
        if name not in layers:
            raise ValueError(f"expected widths of layers of {type(module).__name__}, got '{name}', which it lacks")
        weight = layers[name].get_parameter("weight")
        own, stored = (0, 0) if id(weight) in seen else (weight.numel(), stored_bytes(weight, check_bits(width)))
        seen.add(id(weight))
        rows.append([name, f"{own:,}", str(width), f"{stored:,}"])
        weights, code_bits, size = weights + own, code_bits + own * width, size + stored
    rows.append(["in all", f"{weights:,}", f"{code_bits / max(1, weights):.3g}", f"{size:,}"])
    return _aligned(rows)


def _aligned(rows: list[list[str]]) -> str:
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        right = (cell.rjust(size) for cell, size in zip(others, sizes[1:], strict=True))
        lines.append("  ".join([first.ljust(sizes[0]), *right]))
    return "\n".join(lines)

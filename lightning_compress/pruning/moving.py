"""Labels through operations that move elements: views, concatenations, splits, picks, padding, look-ups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_compress.pruning.calls import Call
from lightning_compress.pruning.labels import Labels, Value, varying

__all__ = ["by_number", "glu", "joined", "looked_up", "move", "padded", "parted"]


def move(labels: Labels, call: Call) -> Value:
    """Run the operation on the labels themselves."""
    target: Any = torch.reshape if call.name in ("view", "_unsafe_view") else call.target
    rest = [torch.empty(arg.shape, device="meta") if isinstance(arg, Value) else arg for arg in call.args[1:]]
    if isinstance(call.arg(1), torch.dtype):
        target, rest = torch.clone, []
    return labels.moved(call.args[0], lambda layer: target(layer, *rest, **call.kwargs), call.shapes)


def joined(labels: Labels, call: Call) -> Value:
    """Concatenate: along a dimension that tells channels apart, one after the other; along others, joined."""
    dim = call.arg(1, 0) % len(call.shapes)
    values = [value for value in call.args[0] if len(value.shape) == len(call.shapes)]
    if call.name == "stack":
        shapes = [(*value.shape[:dim], 1, *value.shape[dim:]) for value in call.args[0]]
        raised = [[layer.unsqueeze(dim) for layer in value.layers] for value in call.args[0]]
        values = [Value(shape, tuple(layers)) for shape, layers in zip(shapes, raised, strict=True)]
    across = [Value((*v.shape[:dim], 1, *v.shape[dim + 1 :]), _across(labels, v, dim)) for v in values]
    both = labels.product(across, [*call.shapes[:dim], 1, *call.shapes[dim + 1 :]], call.name)
    layers = [layer.expand(tuple(call.shapes)) for layer in both.layers]
    for at, value in enumerate(values):
        for layer in value.layers:
            if dim in varying(labels.compact(layer)):
                parts = [torch.zeros(v.shape, dtype=torch.int64) for v in values]
                parts[at] = layer.expand(value.shape)
                layers.append(torch.cat(parts, dim))
    return labels.value(call.shapes, _merged(labels, layers))


def _across(labels: Labels, value: Value, dim: int) -> tuple[Tensor, ...]:
    compact = [labels.compact(layer) for layer in value.layers]
    return tuple(layer for layer in compact if dim not in varying(layer))


def _merged(labels: Labels, layers: Sequence[Tensor]) -> list[Tensor]:
    """Put layers together that label different elements."""
    merged: list[Tensor] = []
    for layer in layers:
        for at, other in enumerate(merged):
            if not bool(((layer != 0) & (other != 0)).any()):
                merged[at] = layer + other
                break
        else:
            merged.append(layer)
    return merged


def parted(labels: Labels, call: Call) -> list[Value]:
    """Split into equal parts, the same channels of each of which go together; unequal parts are fixed in size."""
    value: Value = call.args[0]
    dim = call.arg(1, 0) if call.name == "unbind" else call.arg(2, 0)
    dim %= len(value.shape)
    sizes = {shape[dim] for shape in call.shapes} if call.name != "unbind" else {1}
    if call.name == "unbind" or len(sizes) > 1:
        value = labels.fixed(value, [dim], f"taken apart by number in {call.name}")
    parts = [call.target(layer.expand(value.shape), *call.args[1:]) for layer in value.layers]
    for part in parts:
        for piece in part[1:]:
            if piece.shape == part[0].shape:
                labels.join(part[0], piece)
    return [labels.value(shape, [part[at] for part in parts]) for at, shape in enumerate(call.shapes)]


def by_number(labels: Labels, call: Call) -> Value:
    """Select, slice, index: channels picked by number are fixed; along other dimensions anything goes."""
    value: Value = call.args[0]
    changed = _picked_dims(call, value)
    value = labels.fixed(value, changed, f"picked by number in {call.name}")
    labels.freeze_all(call.values[1:], f"used as numbers or contents in {call.name}")
    rest = [_numbers(arg) for arg in call.args[1:]]
    return labels.moved(value, lambda layer: call.target(layer, *rest), call.shapes)


def _picked_dims(call: Call, value: Value) -> list[int]:
    if call.name == "index":
        return [dim for dim, index in enumerate(call.args[1]) if index is not None]
    dim = call.arg(1, 0) % len(value.shape)
    whole = call.name == "slice" and tuple(call.shapes) == value.shape
    return [] if whole else [dim]


def _numbers(arg: Any) -> Any:
    # The labels do not vary along what is picked, so that any number picks the same.
    if isinstance(arg, (list, tuple)):
        return [_numbers(part) for part in arg]
    return torch.zeros(arg.shape, dtype=torch.int64) if isinstance(arg, Value) else arg


def padded(labels: Labels, call: Call) -> Value:
    """Pad: along dimensions that do not tell channels apart; the others are fixed."""
    value: Value = call.args[0]
    changed = [dim for dim, (old, new) in enumerate(zip(value.shape, call.shapes, strict=True)) if old != new]
    return replace(labels.fixed(value, changed, f"padded in {call.name}"), shape=tuple(call.shapes))


def looked_up(labels: Labels, call: Call) -> Value:
    """Embedding: rows are picked by number, columns are channels."""
    weight, index = call.args[:2]
    labels.freeze_all([index], "used as numbers in embedding")
    columns = labels.fixed(weight, [0], "picked by number in embedding")
    labels.made += columns.layers
    last = [layer.reshape((1,) * len(index.shape) + (-1,)) for layer in columns.layers]
    return labels.value(call.shapes, last)


def glu(labels: Labels, call: Call) -> Value:
    """Halves multiplied: a channel of each goes together."""
    dim = call.arg(1, -1)
    half = replace(call, name="chunk", target=torch.chunk, args=(call.args[0], 2, dim), shapes=[call.shapes] * 2)
    return labels.product(parted(labels, half), call.shapes, call.name)

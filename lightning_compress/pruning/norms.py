"""Labels through norms, orderings, reductions and pooling: what is normalised over may not lose a channel."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lightning_compress.pruning.calls import Call
from lightning_compress.pruning.labels import Labels, Value

__all__ = ["along", "batch_norm", "group_norm", "last_norm", "prelu", "reduced", "spatial"]

CHANGES = "without a channel the others would change"


def _each(shapes: Any, result: Callable[[tuple[int, ...]], Value]) -> Any:
    """Return a value for each of an operation's results: some have one, some a list."""
    return [result(tuple(shape)) for shape in shapes] if isinstance(shapes, list) else result(tuple(shapes))


def _columns(values: list[Value], rank: int) -> list[Value]:
    """Return parameters of one number a channel as they meet (batch, channels, ...)."""
    tail = (1,) * (rank - 2)
    return [Value((1, *v.shape, *tail), tuple(a.reshape(1, -1, *tail) for a in v.layers)) for v in values]


def batch_norm(labels: Labels, call: Call) -> Value:
    """Batch and instance norm: a factor, shift, mean and variance for each channel."""
    value: Value = call.args[0]
    return labels.product([value, *_columns(call.values[1:], len(value.shape))], call.shapes, call.name)


def prelu(labels: Labels, call: Call) -> Value:
    """One slope for all, or one for each channel."""
    return batch_norm(labels, call)


def last_norm(labels: Labels, call: Call) -> Value:
    """Layer and RMS norm, over the last dimensions."""
    dims = range(-len(call.args[1]), 0)
    value = labels.fixed(call.args[0], dims, f"normalised over by {call.name}: {CHANGES}", keep=True)
    return labels.product([value, *call.values[1:]], call.shapes, call.name)


def group_norm(labels: Labels, call: Call) -> Value:
    """Whole groups of channels go; the norm of a single group is fixed."""
    value, groups = call.args[:2]
    weights = _columns(call.values[1:], len(value.shape))
    value = labels.product([value, *weights], call.shapes, call.name)
    split = (value.shape[0], groups, value.shape[1] // groups, *value.shape[2:])
    apart = labels.moved(value, lambda layer: layer.reshape(split), split)
    # Without weights the layer has nothing that says how many groups are left.
    dims = range(2 if weights else 1, len(split))
    apart = labels.fixed(apart, dims, f"normalised over by {call.name}: {CHANGES}", keep=True)
    return labels.moved(apart, lambda layer: layer.reshape(value.shape), call.shapes)


def along(labels: Labels, call: Call) -> Any:
    """Softmax, running sums, sorting: along one dimension, which is fixed."""
    value: Value = call.args[0]
    dim = call.arg(2 if call.name == "topk" else 1, -1)
    value = labels.fixed(value, [dim], f"normalised or ordered over by {call.name}: {CHANGES}", keep=True)
    return _each(call.shapes, lambda shape: replace(value, shape=shape))


def reduced(labels: Labels, call: Call) -> Any:
    """Mean, sum, maximum, norm: over dimensions, which are fixed."""
    value: Value = call.args[0]
    rank = len(value.shape)
    after = call.arg(2 if "norm" in call.name else 1)
    dims = after if isinstance(after, (int, list, tuple)) and not isinstance(after, bool) else range(rank)
    chosen = {dim % rank for dim in ([dims] if isinstance(dims, int) else dims or range(rank))}
    value = labels.fixed(value, chosen, f"summed or compared over by {call.name}: {CHANGES}")

    def result(shape: tuple[int, ...]) -> Value:
        one = slice(0, 1) if len(shape) == rank else 0
        index = tuple(one if dim in chosen else slice(None) for dim in range(rank))
        return labels.moved(value, lambda layer: layer[index], shape)

    return _each(call.shapes, result)


def spatial(labels: Labels, call: Call) -> Any:
    """Pooling and resizing: an image's sizes change, channels do not."""
    found = re.search(r"(\d)d", call.name)
    images = int(found.group(1)) if found else 2
    value = labels.fixed(call.args[0], range(-images, 0), f"part of an image in {call.name}")
    return _each(call.shapes, lambda shape: replace(value, shape=shape))

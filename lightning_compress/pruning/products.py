"""Labels through sums of products: linear layers, matrix products, attention, convolutions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning_compress.pruning.calls import Call, unknown
from lightning_compress.pruning.labels import Labels, Value, varying

__all__ = ["added_product", "attention", "convolution", "einsum", "linear", "matmul"]


def linear(labels: Labels, call: Call) -> Value:
    """X W^T + b."""
    letters = _letters(len(call.args[0].shape) - 1)
    result = labels.contract(f"{letters}y,zy->{letters}z", call.args[:2], call.name)
    return _biased(labels, result, call.arg(2), call)


def matmul(labels: Labels, call: Call) -> Value:
    """Matrix products of broadcast batches, of vectors too."""
    first, second = call.args[:2]
    rank = max(len(first.shape), len(second.shape), 2)
    batch = _letters(rank - 2)
    left = batch[rank - len(first.shape) :] + "xy" if len(first.shape) > 1 else "y"
    right = batch[rank - len(second.shape) :] + "yz" if len(second.shape) > 1 else "y"
    out = batch + ("x" if "x" in left else "") + ("z" if "z" in right else "")
    return _broadcast(labels, (left, right, out), first, second, call.name)


def _broadcast(labels: Labels, names: tuple[str, str, str], first: Value, second: Value, op: str) -> Value:
    """Contract two values; where one has size 1 and the other has not, it has a letter of its own."""
    left, right, out = names
    sizes = [dict(zip(name, value.shape, strict=True)) for name, value in ((left, first), (right, second))]

    def own(mine: dict[str, int], other: dict[str, int]) -> str:
        return "".join(a.upper() if n == 1 < other.get(a, 1) else a for a, n in mine.items())

    return labels.contract(f"{own(*sizes)},{own(*sizes[::-1])}->{out}", [first, second], op)


def added_product(labels: Labels, call: Call) -> Value:
    """addmm, baddbmm: a bias and a product."""
    product = replace(call, args=tuple(call.args[1:3]))
    return _biased(labels, matmul(labels, product), call.args[0], call)


def einsum(labels: Labels, call: Call) -> Any:
    """Any sum of products; repeated letters in one factor have no rule."""
    equation = call.args[0].replace(" ", "")
    values = call.args[1]
    if "->" not in equation:
        letters = sorted(set(equation) - {",", "."})
        equation += "->" + ("..." if "..." in equation else "") + "".join(a for a in letters if equation.count(a) == 1)
    inputs, _ = equation.split("->")
    names = inputs.split(",")
    ranks = [len(v.shape) - len(n.replace("...", "")) for n, v in zip(names, values, strict=True) if "..." in n]
    if any(len(set(n)) < len(n.replace("...", "")) for n in names) or len(set(ranks)) > 1:
        return unknown(labels, call)
    dots = "ABCDEFGHIJKLM"[: max(ranks, default=0)]
    return labels.contract(equation.replace("...", dots), values, call.name)


def attention(labels: Labels, call: Call) -> Value:
    """scaled_dot_product_attention: heads whose channels are summed over go whole."""
    query, key, value = call.args[:3]
    if call.kwargs.get("enable_gqa"):
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (_repeated(labels, heads, repeats) for heads in (key, value))
    batch = _letters(len(query.shape) - 2)
    scores = _broadcast(labels, (batch + "xy", batch + "zy", batch + "xz"), query, key, call.name)
    if call.arg(3) is not None:
        scores = labels.product([scores, call.args[3]], scores.shape, call.name)
    scores = labels.fixed(scores, [-1], f"normalised over in {call.name}")
    return _broadcast(labels, (batch + "xy", batch + "yz", batch + "xz"), scores, value, call.name)


def _repeated(labels: Labels, heads: Value, repeats: int) -> Value:
    shape = (*heads.shape[:-3], heads.shape[-3] * repeats, *heads.shape[-2:])
    return labels.moved(heads, lambda layer: layer.repeat_interleave(repeats, -3), shape)


def _biased(labels: Labels, result: Value, bias: Value | None, call: Call) -> Value:
    return result if bias is None else labels.product([result, bias], call.shapes, call.name)


def _letters(count: int) -> str:
    return "abcdefghijklm"[:count]


def convolution(labels: Labels, call: Call) -> Any:
    """conv1d, 2d, 3d, also transposed: channels are summed over, within groups; images are not told apart."""
    value, weight, bias, groups = call.args[0], call.args[1], call.arg(2), call.arg(6, 1)
    images = len(weight.shape) - 2
    fixed = labels.fixed(value, range(-images, 0), f"part of an image in {call.name}")
    batch = value.shape[0] if len(value.shape) == images + 2 else 1
    pixels = Value((batch, value.shape[-images - 1]), tuple(a.reshape(a.shape[:-images]) for a in fixed.layers))
    kernel = _kernel(labels, weight, transposed="transpose" in call.name)
    if groups == 1:
        result = labels.contract("ac,oc->ao", [pixels.aligned(2), kernel], call.name)
    elif "transpose" in call.name:
        result = _whole_groups(labels, pixels.aligned(2), weight, groups, call)
    else:
        whole = groups >= weight.shape[1]
        result = (_whole_groups if whole else _same_of_each)(labels, pixels.aligned(2), kernel, groups, call)
    if bias is not None:
        result = labels.product([result, bias], result.shape, call.name)
    lead = tuple(call.shapes[:-images])
    layers = [a[(..., *(None,) * images)] for a in result.layers]
    return labels.value(call.shapes, [a if len(lead) == 2 else a[0] for a in layers])


def _kernel(labels: Labels, weight: Value, transposed: bool) -> Value:
    """Return a convolution's weight as outputs x inputs."""
    channels = [layer.flatten(2)[..., 0] for layer in weight.layers if len(varying(labels.compact(layer)) & {0, 1})]
    shape = weight.shape[:2]
    return Value(shape[::-1], tuple(a.T for a in channels)) if transposed else Value(shape, tuple(channels))


def _whole_groups(labels: Labels, pixels: Value, kernel: Value, groups: int, call: Call) -> Value:
    """A group's inputs and outputs all go, or none: for as many groups as channels in them, or more."""
    reason = f"within a group of {call.name}"
    batch, channels = pixels.shape
    ins = labels.moved(pixels, lambda a: a.reshape(batch, groups, -1), (batch, groups, channels // groups))
    first = labels.value(kernel.shape, [a for a in kernel.layers if 0 in varying(labels.compact(a))])
    each = kernel.shape[0] // groups
    outs = labels.moved(first, lambda a: a.flatten(1)[:, 0].reshape(1, groups, each), (1, groups, each))
    sides = [labels.fixed(side, [2], reason) for side in (ins, outs)]
    narrow = [Value((*side.shape[:2], 1), side.layers) for side in sides]
    both = labels.product(narrow, (batch, groups, 1), call.name)
    labels.made += both.layers
    size = call.shapes[-(len(call.args[1].shape) - 1)]
    spread = Value((batch, groups, size // groups), both.layers)
    return labels.moved(spread, lambda a: a.reshape(batch, size), (batch, size))


def _same_of_each(labels: Labels, pixels: Value, kernel: Value, groups: int, call: Call) -> Value:
    """The same inputs of every group go together, and so do the same outputs."""
    reason = f"one of the groups of {call.name}"
    batch, channels = pixels.shape
    outputs = kernel.shape[0]
    ins = labels.moved(pixels, lambda a: a.reshape(batch, groups, -1), (batch, groups, channels // groups))
    weight = labels.moved(
        kernel, lambda a: a.reshape(groups, -1, a.shape[1]), (groups, outputs // groups, kernel.shape[1])
    )
    weight = labels.fixed(weight, [0], reason)
    result = labels.contract("agc,goc->ago", [labels.fixed(ins, [1], reason), weight], call.name)
    return labels.moved(result, lambda a: a.reshape(batch, outputs), (batch, outputs))

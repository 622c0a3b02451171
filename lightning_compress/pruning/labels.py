"""Labels: which values of a forward belong to which channel of which parameter.

Each index along each dimension of each parameter has a number, its label. A value of the forward carries *layers*:
int64 tensors that broadcast to its shape and say, element by element, which channel makes it (0: none). Operations
that move elements move labels; operations that combine values join the labels of elements that meet: channels with
joined labels go together or stay together. A label that may not go is frozen, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Labels", "Value", "varying"]


@dataclass(frozen=True)
class Value:
    """A tensor of the forward: its shape, and its layers of labels (each of the same rank, size 1 where constant)."""

    shape: tuple[int, ...]
    layers: tuple[Tensor, ...] = ()

    def aligned(self, rank: int) -> Value:
        """Return it with leading dimensions of size 1, as broadcasting does."""
        lead = (1,) * (rank - len(self.shape))
        return Value(lead + self.shape, tuple(layer.reshape(lead + tuple(layer.shape)) for layer in self.layers))


def varying(layer: Tensor) -> set[int]:
    """Return the dimensions along which a layer (as `Labels.compact` returns it) is not constant.

    >>> varying(torch.tensor([[1, 2]]))
    {1}
    """
    return {dim for dim, size in enumerate(layer.shape) if size > 1}


@dataclass
class Labels:
    """All labels of a module: which are joined (union-find over `parent`), frozen and made by a layer."""

    parent: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    uneven: list[Tensor] = field(default_factory=list)

    def new(self, size: int) -> Tensor:
        """Return that many labels, none of them joined."""
        labels = torch.arange(len(self.parent), len(self.parent) + size)
        self.parent = torch.cat([self.parent, labels])
        return labels

    def root(self, labels: Tensor) -> Tensor:
        """Return for each label the one that stands for all that it is joined with."""
        roots = self.parent[labels]
        while not torch.equal(above := self.parent[roots], roots):
            roots = above
        self.parent[labels] = roots  # the next way up is short
        return roots

    def join(self, first: Tensor, second: Tensor) -> None:
        """Join labels element by element after broadcasting; 0 is joined with nothing."""
        both = (first != 0) & (second != 0)
        first, second = first.expand(both.shape)[both], second.expand(both.shape)[both]
        while True:
            first, second = self.root(first), self.root(second)
            apart = first != second
            if not bool(apart.any()):
                return
            first, second = first[apart], second[apart]
            self.parent.scatter_reduce_(0, torch.maximum(first, second), torch.minimum(first, second), "amin")

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Note that these labels, and what they are ever joined with, may not go."""
        labels = labels[labels != 0]
        if len(labels):
            self.frozen.append((labels, reason))

    def freeze_all(self, values: Iterable[Value], reason: str) -> None:
        """Freeze every label of some values."""
        for value in values:
            for layer in value.layers:
                self.freeze(layer, reason)

    def compact(self, layer: Tensor) -> Tensor:
        """Return a layer with roots for labels, and with size 1 along dimensions where it is constant."""
        for dim, (size, stride) in enumerate(zip(layer.shape, layer.stride(), strict=True)):
            if size > 1 and stride == 0:
                layer = layer.narrow(dim, 0, 1)
        layer = self.root(layer)
        for dim in range(layer.dim()):
            if layer.shape[dim] > 1 and bool((layer == layer.narrow(dim, 0, 1)).all()):
                layer = layer.narrow(dim, 0, 1)
        return layer

    def value(self, shape: Sequence[int], layers: Iterable[Tensor]) -> Value:
        """Return a value with those layers that still say something."""
        kept = [layer for layer in map(self.compact, layers) if varying(layer)]
        self.uneven += [layer for layer in kept if len(varying(layer)) > 1]
        return Value(tuple(shape), tuple(kept))

    def fix(self, layer: Tensor, dims: Iterable[int], reason: str) -> Tensor:
        """Return the layer after noting that sizes along `dims` may not change.

        Where its labels vary along other dimensions too (heads x channels of a head), those along `dims` are joined:
        they go as one. Where they do not, they are frozen, and still vary along `dims`.
        """
        layer = self.compact(layer)
        bound = varying(layer) & {dim % layer.dim() for dim in dims}
        if not bound:
            return layer
        if varying(layer) - bound:
            for dim in bound:
                self.join(layer, layer.narrow(dim, 0, 1))
            layer = self.compact(layer)
            if not varying(layer) & bound:
                return layer
        self.freeze(layer, reason)
        return layer

    def fixed(self, value: Value, dims: Iterable[int], reason: str, keep: bool = False) -> Value:
        """Return the value with layers constant along `dims`; others are frozen, and go no further unless `keep`."""
        chosen = {dim % len(value.shape) for dim in dims}
        layers = [self.fix(layer, chosen, reason) for layer in value.layers]
        return self.value(value.shape, [layer for layer in layers if keep or not varying(layer) & chosen])

    def moved(self, value: Value, move: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Value:
        """Return the value after an operation that only moves elements."""
        return self.value(shape, [move(layer.expand(value.shape)) for layer in value.layers])

    def product(self, values: Sequence[Value], shape: Sequence[int], op: str) -> Value:
        """Return what an elementwise operation of broadcast values gives: labels that meet are joined."""
        values = [self.value(v.shape, v.layers).aligned(len(shape)) for v in values]
        reason = f"meets a tensor of fixed size in {op}"
        before: list[Value] = []
        while [_variation(v) for v in before] != [_variation(v) for v in values]:  # one fixed may fix the next
            before = values
            values = [self._facing(value, values[:at] + values[at + 1 :], reason) for at, value in enumerate(values)]
        met: list[Tensor] = []
        for layer in (layer for value in values for layer in value.layers):
            met = self._meet(layer, met, reason)
        return self.value(shape, met)

    def _facing(self, value: Value, others: Sequence[Value], reason: str) -> Value:
        layers = []
        for layer in value.layers:
            alone = [dim for dim in varying(layer) if any(_stands_against(other, dim) for other in others)]
            layers.append(self.fix(layer, alone, reason))
        return self.value(value.shape, layers)

    def _meet(self, layer: Tensor, met: list[Tensor], reason: str) -> list[Tensor]:
        apart = []
        for other in met:
            if not varying(layer) & varying(other):
                apart.append(other)
                continue
            self.join(layer, other)
            merged = torch.where(layer != 0, layer, other)
            layer, other = layer.expand(merged.shape), other.expand(merged.shape)
            self.freeze(layer[other == 0], reason)
            self.freeze(other[layer == 0], reason)
            layer = merged
        return [*apart, self.compact(layer)]

    def contract(self, equation: str, values: Sequence[Value], op: str) -> Value:
        """Return what a product summed over shared dimensions gives, as torch.einsum writes it, without "...".

        Labels along a summed dimension are joined pairwise and end there. In a value whose labels vary along others
        as well (heads), the summed ones go as one.
        """
        inputs, out = equation.split("->")
        letters = "".join(dict.fromkeys(inputs.replace(",", "") + out))
        summed = [dim for dim, letter in enumerate(letters) if letter not in out]
        sizes = {a: n for names, v in zip(inputs.split(","), values, strict=True) for a, n in _sizes(names, v)}
        alone = [dim for dim in summed if inputs.count(letters[dim]) == 1]
        spread = [_spread(value, names, letters) for names, value in zip(inputs.split(","), values, strict=True)]
        spread = [self._summable(self.fixed(v, alone, f"summed over in {op}"), summed, op) for v in spread]
        joint = self._summable(self.product(spread, [sizes[letter] for letter in letters], op), summed, op)
        left = [layer for layer in joint.layers if not varying(layer) & set(summed)]
        self.made += left
        return self.value([sizes[letter] for letter in out], [_picked(layer, letters, out) for layer in left])

    def _summable(self, value: Value, summed: Sequence[int], op: str) -> Value:
        """Return the value with layers that vary along summed dimensions only, or not along them."""
        mixed = [bool(varying(layer) - set(summed)) for layer in value.layers]
        layers = [
            self.fix(layer, summed, f"summed over in part in {op}") if also else layer
            for layer, also in zip(value.layers, mixed, strict=True)
        ]
        return self.value(value.shape, layers)

    def straighten(self) -> None:
        """Join labels until along one dimension of every value they are told apart. Runs when the forward is done.

        Channels can only go in whole slices: of a value viewed as groups x channels, the same channels of every
        group, or whole groups, whichever are more.
        """
        everything = torch.arange(len(self.parent))
        before: Tensor | None = None
        while before is None or not torch.equal(before, self.root(everything)):
            before = self.root(everything)
            for layer in self.uneven:
                layer = self.compact(layer)
                longest = max(varying(layer), key=lambda dim: layer.shape[dim], default=0)
                for dim in varying(layer) - {longest}:
                    self.join(layer, layer.narrow(dim, 0, 1))


def _variation(value: Value) -> list[set[int]]:
    return [varying(layer) for layer in value.layers]


def _stands_against(value: Value, dim: int) -> bool:
    return value.shape[dim] != 1 and not any(dim in varying(layer) for layer in value.layers)


def _sizes(names: str, value: Value) -> Iterable[tuple[str, int]]:
    return zip(names, value.shape, strict=True)


def _spread(value: Value, names: str, letters: str) -> Value:
    """Return the value with one dimension for each letter, of size 1 for those it has not."""
    order = [names.index(letter) for letter in letters if letter in names]
    place = [slice(None) if letter in names else None for letter in letters]
    shape = tuple(value.shape[names.index(letter)] if letter in names else 1 for letter in letters)
    return Value(shape, tuple(layer.permute(order)[tuple(place)] for layer in value.layers))


def _picked(layer: Tensor, letters: str, out: str) -> Tensor:
    index = tuple(slice(None) if letter in out else 0 for letter in letters)
    remaining = [letter for letter in letters if letter in out]
    return layer[index].permute([remaining.index(letter) for letter in out])

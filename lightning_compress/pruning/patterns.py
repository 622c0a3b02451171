"""Patterns: which weights go together. A pattern is called with all targets, a sparsity and the window's progress.

It gives the masks one after another (True = keep) and the highest score that went. Any function of these three is a
pattern; these are frozen objects whose `check` runs at `setup`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_compress.pruning.scopes import Masks, Scope, Units, by_output, globally
from lightning_compress.pruning.targets import Target
from lightning_compress.pruning.threshold import keep_masks

__all__ = ["NM", "Blocks", "Columns", "Heads", "Kernels", "Layers", "MaskPattern", "Rows", "Unstructured"]

MaskPattern = Callable[[Sequence[Target], float, float], Masks]
Extents = tuple[int, ...]


@dataclass(frozen=True)
class Unstructured:
    """Single weights: the default.

    Args:
        scope: how layers compete: `globally`, `uniform`, `erk`, `lamp`, `by_output` of `pruning.scopes`.
    """

    scope: Callable[..., Any] = globally

    def __call__(self, targets: Sequence[Target], sparsity: float, progress: float) -> Masks:
        """Return the masks."""
        units = [Units(t.scores, t.weight.numel(), 1, t.weight.shape, t.piecewise, t.output_axis) for t in targets]
        masks: Masks = self.scope(units, sparsity)
        return masks


@dataclass(frozen=True)
class NM:
    """`keep` of every `of` consecutive weights along the inputs: 2:4 is NM(2, 4), at sparsity 0.5.

    Below the final sparsity only the lowest of those that will go are zero, so that the pattern is reached gradually.
    Groups run along the input features of a Linear and the input channels of a Conv, as sparse tensor cores want it.
    Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks", section 3; Zhou et al. 2021 for other N:M.
    """

    keep: int
    of: int

    def check(self, targets: Sequence[Target], sparsity: float) -> None:
        """Raise unless the groups divide each weight and the sparsity is the pattern's. Runs at `setup`."""
        if not 1 <= self.keep < self.of:
            raise ValueError(f"NM keeps some of each group, 1 <= keep < of, got NM({self.keep}, {self.of})")
        final = 1 - self.keep / self.of
        if abs(sparsity - final) > 1e-9:
            raise ValueError(
                f"NM({self.keep}, {self.of}) ends at sparsity {final:g}, got {sparsity:g}; write "
                f"GradualPruning({final:g}, pattern=NM({self.keep}, {self.of}))"
            )
        for target in targets:
            size = target.inputs
            if size % self.of:
                raise ValueError(
                    f"{self.keep}:{self.of} needs the inputs of each output of '{target.name}' to be a multiple "
                    f"of {self.of}, got {size}; exclude it with exclude=['{target.name.removesuffix('.weight')}']"
                )

    def __call__(self, targets: Sequence[Target], sparsity: float, progress: float) -> Masks:
        """Return the masks."""
        total = sum(target.weight.numel() for target in targets)
        last = total // self.of * (self.of - self.keep)
        count = min(round(sparsity * total), last)
        if count == last:
            return (self._best(target) for target in targets), float("nan")
        rest = [lambda target=target: target.scores()[~self._best(target)] for target in targets]
        masks, threshold = keep_masks(rest, count)
        return self._with_best(targets, masks), threshold.value

    def _with_best(self, targets: Sequence[Target], rest: Iterator[Tensor]) -> Iterator[Tensor]:
        for target, kept in zip(targets, rest, strict=True):
            best = self._best(target)
            yield best.masked_scatter(~best, kept.to(best.device))

    def _best(self, target: Target) -> Tensor:
        grouped = target.scores().movedim(target.input_axis, -1)
        order = grouped.reshape(*grouped.shape[:-1], -1, self.of).sort(dim=-1, descending=True, stable=True).indices
        best = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., : self.keep], True)
        return best.flatten(-2).movedim(-1, target.input_axis).contiguous()


def _blocked(
    targets: Sequence[Target], sparsity: float, scope: Scope, shapes: Sequence[tuple[Extents, Extents]]
) -> Masks:
    """Prune blocks that tile each weight, seen in a shape, by the mean of their scores."""
    units = []
    for target, (view, extents) in zip(targets, shapes, strict=True):
        tiles = [item for size, extent in zip(view, extents, strict=True) for item in (size // extent, extent)]
        inner = tuple(range(1, len(tiles), 2))

        def scores(target: Target = target, tiles: list[int] = tiles, inner: tuple[int, ...] = inner) -> Tensor:
            return (
                target.scores()
                .reshape(tiles)
                .mean(dim=inner, dtype=None if target.weight.dtype == torch.float64 else torch.float32)
            )

        size = prod(extents)
        axis = target.output_axis if len(view) == target.weight.dim() else 0
        units.append(Units(scores, target.weight.numel() // size, size, target.weight.shape, axis=axis))
    masks, threshold = scope(units, sparsity)
    return _spread(targets, masks, shapes), threshold


def _spread(
    targets: Sequence[Target], masks: Iterator[Tensor], shapes: Sequence[tuple[Extents, Extents]]
) -> Iterator[Tensor]:
    for target, mask, (_, extents) in zip(targets, masks, shapes, strict=True):
        whole = mask.to(target.weight.device)
        for dimension, extent in enumerate(extents):
            whole = whole.repeat_interleave(extent, dim=dimension) if extent > 1 else whole
        yield whole.reshape(target.weight.shape)


@dataclass(frozen=True)
class Blocks:
    """Blocks of `rows` x `columns` of the weight as a matrix: outputs x (inputs times kernel positions).

    Gray et al. 2017, "GPU Kernels for Block-Sparse Weights"; Lagunas et al. 2021, "Block Pruning".
    """

    rows: int
    columns: int
    scope: Callable[..., Any] = globally

    def check(self, targets: Sequence[Target], sparsity: float) -> None:
        """Raise unless the blocks tile each weight. Runs at `setup`."""
        for target in targets:
            sizes = (target.weight.shape[0], target.weight[0].numel())
            for size, extent, what in zip(sizes, (self.rows, self.columns), ("rows", "columns"), strict=True):
                if extent < 1 or size % extent:
                    raise ValueError(
                        f"Blocks({self.rows}, {self.columns}) does not divide '{target.name}', which has {size} "
                        f"{what} as a matrix; exclude it with exclude=['{target.name.removesuffix('.weight')}']"
                    )

    def __call__(self, targets: Sequence[Target], sparsity: float, progress: float) -> Masks:
        """Return the masks."""
        views = [(t.weight.shape[0], t.weight[0].numel()) for t in targets]
        return _blocked(targets, sparsity, self.scope, [(view, (self.rows, self.columns)) for view in views])


def _whole_but(target: Target, axes: tuple[int, ...]) -> tuple[Extents, Extents]:
    shape = tuple(target.weight.shape)
    return shape, tuple(1 if axis in axes else size for axis, size in enumerate(shape))


def _check_some_fit(targets: Sequence[Target], sparsity: float, sizes: Sequence[int], pattern: object) -> None:
    total = sum(target.weight.numel() for target in targets)
    if 0 < round(sparsity * total) < min(sizes):
        raise ValueError(
            f"sparsity {sparsity:g} of {total} weights is less than the smallest unit of {type(pattern).__name__}, "
            f"which has {min(sizes)}: nothing would be pruned; raise the sparsity, or select more layers"
        )


def _check_compares(pattern: Rows | Heads) -> None:
    if pattern.scope is by_output:
        raise ValueError(
            f"{type(pattern).__name__} are whole outputs, so that scope by_output has nothing to compare within one; "
            f"take scope=uniform"
        )


@dataclass(frozen=True)
class Rows:
    """Rows of a Linear, output channels of a Conv. Masks alone: `StructuredPruning` also removes them.

    Li et al. 2017, "Pruning Filters for Efficient ConvNets", section 3.1.
    """

    scope: Callable[..., Any] = globally

    def check(self, targets: Sequence[Target], sparsity: float) -> None:
        """Raise if no unit is small enough for the sparsity. Runs at `setup`."""
        _check_compares(self)
        _check_some_fit(targets, sparsity, [prod(_whole_but(t, (t.output_axis,))[1]) for t in targets], self)

    def __call__(self, targets: Sequence[Target], sparsity: float, progress: float) -> Masks:
        """Return the masks."""
        return _blocked(targets, sparsity, self.scope, [_whole_but(t, (t.output_axis,)) for t in targets])


@dataclass(frozen=True)
class Columns:
    """Columns of a Linear, input channels of a Conv.

    He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks".
    """

    scope: Callable[..., Any] = globally

    def check(self, targets: Sequence[Target], sparsity: float) -> None:
        """Raise if no unit is small enough for the sparsity. Runs at `setup`."""
        _check_some_fit(targets, sparsity, [prod(_whole_but(t, (t.input_axis,))[1]) for t in targets], self)

    def __call__(self, targets: Sequence[Target], sparsity: float, progress: float) -> Masks:
        """Return the masks."""
        return _blocked(targets, sparsity, self.scope, [_whole_but(t, (t.input_axis,)) for t in targets])


@dataclass(frozen=True)
class Kernels:
    """The kernel between one input and one output channel; in a Linear a single weight.

    Mao et al. 2017, "Exploring the Granularity of Sparsity in Convolutional Neural Networks".
    """

    scope: Callable[..., Any] = globally

    def __call__(self, targets: Sequence[Target], sparsity: float, progress: float) -> Masks:
        """Return the masks."""
        return _blocked(targets, sparsity, self.scope, [_whole_but(t, (0, 1)) for t in targets])


@dataclass(frozen=True)
class Heads:
    """`count` equal groups of consecutive outputs: the heads of a query, key or value projection, each by itself.

    Michel et al. 2019, "Are Sixteen Heads Really Better than One?". `StructuredPruning` takes the three together.
    """

    count: int
    scope: Callable[..., Any] = globally

    def check(self, targets: Sequence[Target], sparsity: float) -> None:
        """Raise unless the heads divide each weight's outputs. Runs at `setup`."""
        _check_compares(self)
        for target in targets:
            outputs = target.weight.shape[target.output_axis]
            if self.count < 1 or outputs % self.count:
                raise ValueError(
                    f"Heads({self.count}) does not divide the {outputs} outputs of '{target.name}'; name the "
                    f"attention projections with include=[...]"
                )
        _check_some_fit(targets, sparsity, [t.weight.numel() // self.count for t in targets], self)

    def __call__(self, targets: Sequence[Target], sparsity: float, progress: float) -> Masks:
        """Return the masks."""
        shapes = []
        for target in targets:
            shape = tuple(target.weight.shape)
            extents = (size // self.count if a == target.output_axis else size for a, size in enumerate(shape))
            shapes.append((shape, tuple(extents)))
        return _blocked(targets, sparsity, self.scope, shapes)


@dataclass(frozen=True)
class Layers:
    """Whole weights: layer drop, in residual networks whose branches may be empty.

    Fan et al. 2020, "Reducing Transformer Depth on Demand with Structured Dropout", section 3.
    """

    def check(self, targets: Sequence[Target], sparsity: float) -> None:
        """Raise if no unit is small enough for the sparsity. Runs at `setup`."""
        _check_some_fit(targets, sparsity, [prod(_whole_but(t, ())[1]) for t in targets], self)

    def __call__(self, targets: Sequence[Target], sparsity: float, progress: float) -> Masks:
        """Return the masks."""
        return _blocked(targets, sparsity, globally, [_whole_but(t, ()) for t in targets])

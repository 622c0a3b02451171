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

from lightning_compress.parts import Part
from lightning_compress.pruning.scopes import Masks, Units, by_output, globally
from lightning_compress.pruning.targets import Target
from lightning_compress.pruning.threshold import keep_masks
from lightning_compress.pruning.tiles import blocked, whole_but

__all__ = ["NM", "Blocks", "Columns", "Heads", "Kernels", "Layers", "MaskPattern", "Rows", "Unstructured"]

MaskPattern = Callable[[Sequence[Target], float, float], Masks]


@dataclass(frozen=True)
class Unstructured:
    """Single weights: the default.

    Args:
        scope: how layers compete: `globally`, `uniform`, `erk`, `lamp`, `by_output` of `pruning.scopes`.
    """

    scope: Callable[..., Any] = globally

    def __call__(self, targets: Sequence[Target], sparsity: float, progress: float) -> Masks:
        """Return the masks."""
        units = [Units(t.scores, t.shape.numel(), 1, t.shape, t.piecewise, t.output_axis, t.part) for t in targets]
        masks: Masks = self.scope(units, sparsity)
        return masks


@dataclass(frozen=True)
class _Rest:
    """The weights of a piece that are not the best of their group."""

    part: Part
    rest: Tensor

    @property
    def counted(self) -> bool:
        """Whether the piece counts."""
        return self.part.counted

    def positions(self, indices: Tensor) -> Tensor:
        """Return the places in the whole weight."""
        return self.part.positions(self.rest.flatten().nonzero().flatten().to(indices.device)[indices])


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
        total = sum(target.shape.numel() for target in targets)
        last = total // self.of * (self.of - self.keep)
        count = min(round(sparsity * total), last)
        if count == last:
            return (self._best(target) for target in targets), float("nan")
        rest = [lambda target=target: target.scores()[~self._best(target)] for target in targets]
        pieces = [_Rest(target.part, ~self._best(target)) for target in targets if target.part is not None]
        masks, threshold = keep_masks(rest, count, pieces or None)
        return self._with_best(targets, masks), threshold.value

    def _with_best(self, targets: Sequence[Target], rest: Iterator[Tensor]) -> Iterator[Tensor]:
        for target, kept in zip(targets, rest, strict=True):
            best = self._best(target)
            yield best.masked_scatter(~best, kept.to(best.device))

    def _best(self, target: Target) -> Tensor:
        if target.part is not None and not target.part.divides(target.input_axis, self.of):
            return target.cut(self._best_of(target.whole(target.scores()), target.input_axis))
        return self._best_of(target.scores(), target.input_axis)

    def _best_of(self, scores: Tensor, axis: int) -> Tensor:
        grouped = scores.movedim(axis, -1)
        groups = grouped.reshape(*grouped.shape[:-1], grouped.shape[-1] // self.of, self.of)
        order = groups.sort(dim=-1, descending=True, stable=True).indices
        best = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., : self.keep], True)
        return best.flatten(-2).movedim(-1, axis).contiguous()


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
            sizes = (target.shape[0], target.shape[1:].numel())
            for size, extent, what in zip(sizes, (self.rows, self.columns), ("rows", "columns"), strict=True):
                if extent < 1 or size % extent:
                    raise ValueError(
                        f"Blocks({self.rows}, {self.columns}) does not divide '{target.name}', which has {size} "
                        f"{what} as a matrix; exclude it with exclude=['{target.name.removesuffix('.weight')}']"
                    )

    def __call__(self, targets: Sequence[Target], sparsity: float, progress: float) -> Masks:
        """Return the masks."""
        views = [(t.shape[0], t.shape[1:].numel()) for t in targets]
        return blocked(targets, sparsity, self.scope, [(view, (self.rows, self.columns)) for view in views])


def _check_some_fit(targets: Sequence[Target], sparsity: float, sizes: Sequence[int], pattern: object) -> None:
    total = sum(target.shape.numel() for target in targets)
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
        _check_some_fit(targets, sparsity, [prod(whole_but(t, (t.output_axis,))[1]) for t in targets], self)

    def __call__(self, targets: Sequence[Target], sparsity: float, progress: float) -> Masks:
        """Return the masks."""
        return blocked(targets, sparsity, self.scope, [whole_but(t, (t.output_axis,)) for t in targets])


@dataclass(frozen=True)
class Columns:
    """Columns of a Linear, input channels of a Conv.

    He et al. 2017, "Channel Pruning for Accelerating Very Deep Neural Networks".
    """

    scope: Callable[..., Any] = globally

    def check(self, targets: Sequence[Target], sparsity: float) -> None:
        """Raise if no unit is small enough for the sparsity. Runs at `setup`."""
        _check_some_fit(targets, sparsity, [prod(whole_but(t, (t.input_axis,))[1]) for t in targets], self)

    def __call__(self, targets: Sequence[Target], sparsity: float, progress: float) -> Masks:
        """Return the masks."""
        return blocked(targets, sparsity, self.scope, [whole_but(t, (t.input_axis,)) for t in targets])


@dataclass(frozen=True)
class Kernels:
    """The kernel between one input and one output channel; in a Linear a single weight.

    Mao et al. 2017, "Exploring the Granularity of Sparsity in Convolutional Neural Networks".
    """

    scope: Callable[..., Any] = globally

    def __call__(self, targets: Sequence[Target], sparsity: float, progress: float) -> Masks:
        """Return the masks."""
        return blocked(targets, sparsity, self.scope, [whole_but(t, (0, 1)) for t in targets])


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
            outputs = target.shape[target.output_axis]
            if self.count < 1 or outputs % self.count:
                raise ValueError(
                    f"Heads({self.count}) does not divide the {outputs} outputs of '{target.name}'; name the "
                    f"attention projections with include=[...]"
                )
        _check_some_fit(targets, sparsity, [t.shape.numel() // self.count for t in targets], self)

    def __call__(self, targets: Sequence[Target], sparsity: float, progress: float) -> Masks:
        """Return the masks."""
        shapes = []
        for target in targets:
            shape = tuple(target.shape)
            extents = (size // self.count if a == target.output_axis else size for a, size in enumerate(shape))
            shapes.append((shape, tuple(extents)))
        return blocked(targets, sparsity, self.scope, shapes)


@dataclass(frozen=True)
class Layers:
    """Whole weights: layer drop, in residual networks whose branches may be empty.

    Fan et al. 2020, "Reducing Transformer Depth on Demand with Structured Dropout", section 3.
    """

    def check(self, targets: Sequence[Target], sparsity: float) -> None:
        """Raise if no unit is small enough for the sparsity. Runs at `setup`."""
        _check_some_fit(targets, sparsity, [prod(whole_but(t, ())[1]) for t in targets], self)

    def __call__(self, targets: Sequence[Target], sparsity: float, progress: float) -> Masks:
        """Return the masks."""
        return blocked(targets, sparsity, globally, [whole_but(t, ()) for t in targets])

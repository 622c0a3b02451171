"""Random layers as hypothesis draws them, and patterns applied to them, for the tests of scopes and patterns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress.pruning.targets import Target

SPARSITIES = st.one_of(st.floats(0.0, 0.99), st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9]))


@st.composite
def layers(draw, most: int = 3, multiple: int = 1) -> list[nn.Module]:
    """Linear, Conv2d and ConvTranspose2d layers, grouped or not, with inputs a multiple of a number."""
    made: list[nn.Module] = []
    for _ in range(draw(st.integers(1, most))):
        kind = draw(st.sampled_from([nn.Linear, nn.Conv2d, nn.ConvTranspose2d]))
        inputs, outputs = draw(st.integers(1, 4)) * multiple, draw(st.integers(1, 6))
        if kind is nn.Linear:
            made.append(nn.Linear(inputs, outputs))
            continue
        groups, kernel = draw(st.sampled_from([1, 2])), draw(st.integers(1, 3))
        made.append(kind(inputs * groups, outputs * groups, kernel, groups=groups))
    seed, ties = draw(st.integers(0, 2**16)), draw(st.booleans())
    random = torch.Generator().manual_seed(seed)
    for layer in made:
        drawn = torch.randn(layer.weight.shape, generator=random)
        layer.weight.data = drawn.mul(2).round() / 2 if ties else drawn
    return made


def targets(made: Sequence[nn.Module], masks: Sequence[Tensor] | None = None, **options) -> list[Target]:
    """What a callback would ask a pattern about."""
    kept = masks or [None] * len(made)
    return [
        Target(f"{index}.weight", layer.weight.detach(), layer, mask, **options)
        for index, (layer, mask) in enumerate(zip(made, kept, strict=True))
    ]


def masks_of(pattern, made: Sequence[nn.Module], sparsity: float, progress: float = 1.0, **options) -> list[Tensor]:
    """Whole masks, checked to be masks."""
    given = targets(made, **options)
    masks = list(pattern(given, sparsity, progress)[0])
    assert all(mask.dtype == torch.bool for mask in masks)
    assert [mask.shape for mask in masks] == [target.weight.shape for target in given]
    return masks


def magnitudes(made: Sequence[nn.Module]) -> list[np.ndarray]:
    return [np.abs(layer.weight.detach().numpy()) for layer in made]


def lowest_go(scores: np.ndarray, count: int) -> np.ndarray:
    """A mask without the `count` lowest of one flat array; of equal ones the first go."""
    mask = np.ones(len(scores), dtype=bool)
    mask[sorted(range(len(scores)), key=lambda place: (scores[place], place))[:count]] = False
    return mask


def split(flat: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), shapes, strict=True)]


def zeros(masks: Sequence[Tensor]) -> int:
    return sum(int((~mask).sum()) for mask in masks)


def size(made: Sequence[nn.Module]) -> int:
    return sum(layer.weight.numel() for layer in made)

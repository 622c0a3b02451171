"""Which weights a pattern takes together, place by place: the reference that patterns are tested against."""

from __future__ import annotations

from itertools import product

import numpy as np
from torch import nn

from lightning_compress.pruning.patterns import Blocks, Columns, Heads, Kernels, Rows


def groups_of(layer, array, of):
    """Every `of` consecutive inputs of one output at one kernel position, as index tuples, by loops."""
    axis = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
    others = [range(extent) if a != axis else [0] for a, extent in enumerate(array.shape)]
    for place in product(*others):
        for start in range(0, array.shape[axis], of):
            yield [(*place[:axis], start + offset, *place[axis + 1 :]) for offset in range(of)]


def units_of(pattern, layer, shape):
    """The groups of a pattern, as an integer for each weight, by a formula for each place."""
    outputs = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    number = np.empty(shape, dtype=int)
    for place in np.ndindex(*shape):
        if isinstance(pattern, Blocks):
            column = int(np.ravel_multi_index(place[1:], shape[1:]))
            key = (place[0] // pattern.rows) * 10_000 + column // pattern.columns
        elif isinstance(pattern, Rows):
            key = place[outputs]
        elif isinstance(pattern, Columns):
            key = place[1 - outputs]
        elif isinstance(pattern, Kernels):
            key = place[0] * 10_000 + place[1]
        elif isinstance(pattern, Heads):
            key = place[outputs] // (shape[outputs] // pattern.count)
        else:
            key = 0
        number[place] = key
    return number

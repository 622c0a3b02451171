"""RigL and SET, against the algorithms written out over lists."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress import Cubic, GradualPruning
from lightning_compress.pruning.criteria import random
from lightning_compress.pruning.regrowth import SET, RigL, fresh_random, regrow
from lightning_compress.pruning.scopes import erk, globally
from lightning_compress.pruning.targets import Target
from tests.pruning.drawn_targets import layers, magnitudes, size, targets, zeros

quick = settings(max_examples=60, deadline=None)


def regrown(scores, growth, mask, count):
    """Algorithm 1 over flat lists; ties by position."""
    kept = sorted((place for place, is_kept in enumerate(mask) if is_kept), key=lambda p: (scores[p], p))
    survivors = set(kept[count:])
    free = sorted((p for p in range(len(mask)) if p not in survivors), key=lambda p: (-growth[p], p))
    return [place in survivors or place in free[:count] for place in range(len(mask))]


@quick
@given(st.data(), st.integers(1, 40), st.booleans())
def test_regrow_is_the_papers_algorithm(data, number, ties):
    random = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    scores, growth = random.integers(0, 3, (2, number)) if ties else random.normal(size=(2, number))
    mask = random.random(number) < 0.5
    count = data.draw(st.integers(0, int(mask.sum())))
    given = [torch.from_numpy(array.copy()) for array in (scores.astype("float32"), growth.astype("float32"), mask)]
    new = regrow(*given, count)
    assert new.tolist() == regrown(scores, growth, mask, count)
    assert int(new.sum()) == int(mask.sum())
    assert torch.equal(given[2], torch.from_numpy(mask)), "the old mask is left as it was"


def with_gradients(made, masks=None, seed=0, step=3):
    random = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(layer.weight.shape, generator=random) for layer in made]
    kept = masks or [None] * len(made)
    return gradients, [
        Target(
            f"{i}.weight",
            layer.weight.detach(),
            layer,
            mask,
            values={"gradient": lambda g=gradient: g, "step": lambda: step},
            comes_back=True,
        )
        for i, (layer, mask, gradient) in enumerate(zip(made, kept, gradients, strict=True))
    ]


@quick
@given(layers(), st.floats(0.1, 0.95), st.floats(0.0, 1.0), st.floats(0.05, 1.0))
def test_rigl_drops_the_smallest_and_grows_the_largest_gradients(made, sparsity, progress, fraction):
    pattern = RigL(fraction)
    masks = list(pattern(with_gradients(made)[1], sparsity, 0.0)[0])
    expected = list(erk_masks(made, sparsity))
    assert all(torch.equal(mask, other) for mask, other in zip(masks, expected, strict=True))
    for layer, mask in zip(made, masks, strict=True):
        layer.weight.data *= mask
    gradients, given = with_gradients(made, masks)
    new = list(pattern(given, sparsity, progress)[0])
    assert zeros(new) == round(sparsity * size(made))
    now = fraction / 2 * (1 + math.cos(math.pi * progress))
    for before, after, scores, gradient in zip(masks, new, magnitudes(made), gradients, strict=True):
        count = int(now * int(before.sum()))
        growth = gradient.abs().flatten().tolist()
        assert after.flatten().tolist() == regrown(scores.ravel(), growth, before.flatten().tolist(), count)


def erk_masks(made, sparsity):
    from lightning_compress.pruning.patterns import Unstructured

    return Unstructured(erk)(targets(made), sparsity, 0.0)[0]


def test_set_grows_at_random_and_anew_at_each_step():
    made = [nn.Linear(20, 20)]
    pattern = SET(0.5, scope=globally)
    masks = list(pattern(with_gradients(made)[1], 0.8, 0.0)[0])
    one, same, other = (next(iter(pattern(with_gradients(made, masks, step=s)[1], 0.8, 0.2)[0])) for s in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert zeros([one]) == zeros([other]) == 320
    scores = magnitudes(made)[0]
    count = int(0.25 * (1 + math.cos(math.pi * 0.2)) * 80)
    growth = fresh_random(made[0].weight, "0.weight", 5).flatten().tolist()
    assert one.flatten().tolist() == regrown(scores.ravel(), growth, masks[0].flatten().tolist(), count)


def test_nothing_moves_at_the_windows_end():
    made = [nn.Linear(9, 9)]
    masks = list(RigL()(with_gradients(made)[1], 0.5, 0.0)[0])
    assert torch.equal(next(iter(RigL()(with_gradients(made, masks)[1], 0.5, 1.0)[0])), masks[0])


def test_fresh_random_is_of_name_step_and_position_alone():
    weight = torch.zeros(4, 5)
    assert torch.equal(fresh_random(weight, "a", 1), fresh_random(weight + 1, "a", 1))
    assert not torch.equal(fresh_random(weight, "a", 1), fresh_random(weight, "b", 1))
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    fresh_random(weight, "a", 1)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("kind", [RigL, SET])
@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(kind, fraction):
    with pytest.raises(ValueError, match=r"fraction is the share of kept weights that an update replaces, in \(0, 1\]"):
        kind(fraction)


@pytest.mark.parametrize("kind", [RigL, SET])
def test_a_schedule_that_moves_is_refused(kind):
    with pytest.raises(ValueError, match=r"holds one sparsity, got Cubic.* from 0 to 0.9; give a number or Constant"):
        GradualPruning(Cubic(0.9), pattern=kind())


@pytest.mark.parametrize("pattern", [RigL(), SET()], ids=["RigL", "SET"])
def test_the_criterion_makes_only_the_first_masks(pattern):
    """With random first masks the drops are by magnitude all the same."""
    weight = torch.arange(1.0, 101.0).view(10, 10)
    values = {"gradient": lambda: torch.zeros(10, 10), "step": lambda: 1}
    start = torch.zeros(100, dtype=torch.bool)
    start[50:] = True
    target = Target("a.weight", weight, nn.Linear(10, 10), start.view(10, 10), random, values, comes_back=True)
    (mask,) = pattern([target], 0.5, 0.0)[0]
    assert int(mask.sum()) == 50
    assert bool(mask.view(-1)[65:].all()), "the largest of the kept weights stay"

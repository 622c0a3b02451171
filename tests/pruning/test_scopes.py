"""How layers compete, against numpy written from the papers, on random Linear, Conv2d and ConvTranspose2d layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress.pruning.criteria import fisher, magnitude
from lightning_compress.pruning.patterns import Blocks, Rows, Unstructured
from lightning_compress.pruning.scopes import by_output, erk, erk_densities, globally, lamp, uniform
from tests.pruning.drawn_targets import SPARSITIES, layers, lowest_go, magnitudes, masks_of, size, split, targets, zeros

EVERY = {scope.__name__: scope for scope in (globally, uniform, erk, lamp, by_output)}
quick = settings(max_examples=60, deadline=None)


@quick
@given(layers(), SPARSITIES, st.sampled_from(sorted(EVERY)))
def test_the_count_is_exact_to_one_weight(made, sparsity, scope):
    assert zeros(masks_of(Unstructured(EVERY[scope]), made, sparsity)) == round(sparsity * size(made))


@quick
@given(layers(), SPARSITIES)
def test_globally_the_lowest_of_all_go_and_ties_go_by_position(made, sparsity):
    scores = magnitudes(made)
    flat = lowest_go(np.concatenate([array.ravel() for array in scores]), round(sparsity * size(made)))
    for mask, expected in zip(
        masks_of(Unstructured(), made, sparsity), split(flat, [a.shape for a in scores]), strict=True
    ):
        assert np.array_equal(mask.numpy(), expected)


@quick
@given(layers(), SPARSITIES)
def test_uniform_is_each_layers_own_share_within_a_weight(made, sparsity):
    for mask, scores in zip(masks_of(Unstructured(uniform), made, sparsity), magnitudes(made), strict=True):
        dropped = int((~mask).sum())
        assert abs(dropped - sparsity * scores.size) <= 1
        assert np.array_equal(mask.numpy().ravel(), lowest_go(scores.ravel(), dropped))


def outputs_first(layer, array):
    """Rows are outputs: dimension 1 of a transposed convolution."""
    moved = np.moveaxis(array, 1, 0) if isinstance(layer, nn.ConvTranspose2d) else array
    return moved.reshape(len(moved), -1)


@quick
@given(layers(), SPARSITIES)
def test_by_output_is_each_outputs_own_share_within_a_weight(made, sparsity):
    masks = masks_of(Unstructured(by_output), made, sparsity)
    for layer, mask, scores in zip(made, masks, magnitudes(made), strict=True):
        kept_rows, score_rows = outputs_first(layer, mask.numpy()), outputs_first(layer, scores)
        for kept, row in zip(kept_rows, score_rows, strict=True):
            dropped = int((~kept).sum())
            assert abs(dropped - sparsity * row.size) <= 1
            assert np.array_equal(kept, lowest_go(row, dropped))


# ERK


def densities_by_iteration(shapes, density):
    """RigL's published procedure: raise epsilon; whoever would be over-full becomes dense, one round at a time."""
    dense = [False] * len(shapes)
    while True:
        right = left = 0.0
        raw = []
        for is_dense, shape in zip(dense, shapes, strict=True):
            number = float(np.prod(shape))
            if is_dense:
                right -= number * (1 - density)
                raw.append(0.0)
            else:
                right += number * density
                raw.append(np.sum(shape) / number)
                left += raw[-1] * number
        if left == 0.0:
            return [1.0] * len(shapes)
        epsilon = right / left
        highest = max(raw) * epsilon
        if highest <= 1.0:
            return [1.0 if d else epsilon * r for d, r in zip(dense, raw, strict=True)]
        dense = [d or r == max(raw) for d, r in zip(dense, raw, strict=True)]


SHAPES = st.lists(
    st.lists(st.integers(1, 40), min_size=2, max_size=2).flatmap(
        lambda sizes: st.sampled_from([sizes, [*sizes, 1, 1], [*sizes, 3, 3]])
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(SHAPES, st.floats(0.01, 0.999))
def test_erk_densities_are_those_of_the_papers_procedure(shapes, density):
    ours = erk_densities(shapes, density)
    assert ours == pytest.approx(densities_by_iteration(shapes, density), rel=1e-6)
    sizes = [np.prod(shape) for shape in shapes]
    assert np.dot(ours, sizes) == pytest.approx(density * sum(sizes), rel=1e-9)
    assert all(0.0 < share <= 1.0 for share in ours)


@quick
@given(layers(), SPARSITIES)
def test_erk_prunes_each_layer_to_its_density_within_a_weight(made, sparsity):
    shares = densities_by_iteration([layer.weight.shape for layer in made], 1 - sparsity)
    masks = masks_of(Unstructured(erk), made, sparsity)
    for share, mask, scores in zip(shares, masks, magnitudes(made), strict=True):
        dropped = int((~mask).sum())
        assert abs(dropped - (1 - share) * scores.size) <= 1 + 1e-6
        assert np.array_equal(mask.numpy().ravel(), lowest_go(scores.ravel(), dropped))


def test_erk_leaves_dense_layers_dense_where_units_differ_in_size():
    made = [nn.Linear(100, 100), nn.Linear(2, 10)]
    masks = masks_of(Rows(erk), made, 0.5)
    assert bool(masks[1].all())
    assert zeros(masks) == 5000 // 100 * 100


# LAMP


def lamp_by_pairs(scores):
    """Equation 4 by two loops: w^2 over the sum of all squares that are not smaller; equal ones by position."""
    flat = scores.ravel().astype("float64")
    result = np.empty_like(flat)
    for u, value in enumerate(flat):
        rest = sum(w * w for v, w in enumerate(flat) if (w, v) >= (value, u))
        result[u] = value * value / rest if value else 0.0
    return result


@quick
@given(layers(), SPARSITIES)
def test_lamp_drops_the_lowest_by_the_papers_equation(made, sparsity):
    scores = np.concatenate([lamp_by_pairs(array) for array in magnitudes(made)]).astype("float32")
    flat = np.concatenate([mask.numpy().ravel() for mask in masks_of(Unstructured(lamp), made, sparsity)])
    assert int((~flat).sum()) == round(sparsity * size(made))
    # The sums are taken in another order, so that the scores may differ in their last bit.
    if flat.any() and not flat.all():
        assert scores[~flat].max() <= scores[flat].min() * (1 + 1e-5)


def test_lamp_keeps_the_largest_of_every_layer():
    made = [nn.Linear(30, 30), nn.Linear(30, 30)]
    made[1].weight.data *= 1e-4
    assert all(bool(mask.any()) for mask in masks_of(Unstructured(lamp), made, 0.99))
    assert not bool(masks_of(Unstructured(globally), made, 0.6)[1].any())


@pytest.mark.parametrize("scope", EVERY.values(), ids=EVERY)
def test_what_is_out_stays_out_while_sparsity_grows(scope):
    """Under a criterion for which zero is not the lowest score; one weight a row may differ by rounding."""
    torch.manual_seed(0)
    made = [nn.Linear(10, 10), nn.ConvTranspose2d(10, 10, 1)]
    made[1].weight.data *= 0.1

    def higher_is_smaller(weight):
        return -weight.abs()

    masks = None
    for sparsity in (0.2, 0.4, 0.6, 0.8):
        new = list(Unstructured(scope)(targets(made, masks, criterion=higher_is_smaller), sparsity, 1.0)[0])
        assert zeros(new) == round(sparsity * size(made))
        if masks is not None:
            assert not any(bool((after & ~before).any()) for before, after in zip(masks, new, strict=True))
        masks = new


@pytest.mark.parametrize("scope", EVERY.values(), ids=EVERY)
def test_signed_scores_are_ordered_as_numbers(scope):
    made = [nn.Linear(8, 8)]

    def signed(weight):
        return weight + 0.0

    values = made[0].weight.detach().numpy()
    (mask,) = masks_of(Unstructured(scope), made, 0.5, criterion=signed)
    for kept, row in zip(mask.numpy(), values, strict=True) if scope is by_output else [(mask.numpy(), values)]:
        assert row[~kept].max() < row[kept].min()


@pytest.mark.parametrize("scope", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype(scope, dtype):
    made = [nn.Linear(12, 8).to(dtype), nn.Conv2d(4, 4, 3).to(dtype)]
    assert zeros(masks_of(Unstructured(scope), made, 0.7)) == round(0.7 * size(made))


def test_layers_of_several_dtypes_compete():
    made = [nn.Linear(12, 8).double(), nn.Linear(12, 8)]
    assert zeros(masks_of(Unstructured(), made, 0.7, widen=True)) == round(0.7 * size(made))


# Units larger than a weight


@quick
@given(layers(), SPARSITIES, st.sampled_from([globally, erk, lamp]))
def test_units_of_unequal_size_are_never_more_than_asked_and_none_fits_any_more(made, sparsity, scope):
    made = [*made, nn.Linear(7, 2), nn.Conv2d(3, 3, 2)]
    masks = masks_of(Rows(scope), made, sparsity)
    left = round(sparsity * size(made)) - zeros(masks)
    assert left >= 0
    kept = []
    for layer, mask in zip(made, masks, strict=True):
        rows = outputs_first(layer, mask.numpy())
        assert np.array_equal(rows.all(axis=1), rows.any(axis=1))
        kept += [rows.shape[1]] * int(rows.any(axis=1).sum())
    if scope is not erk:  # whose shares say where the rest may come from
        assert all(left < units for units in kept)


def test_of_unequal_units_the_lowest_that_fit_go():
    made = [nn.Linear(5, 2), nn.Linear(3, 2)]
    for layer, rows in zip(made, [(1.0, 2.0), (3.0, 4.0)], strict=True):
        layer.weight.data = torch.tensor(rows).unsqueeze(1).expand_as(layer.weight).clone()
    # 9 of 16: the row of mean 1 (5 weights) fits, that of mean 2 no more, that of mean 3 does
    masks = masks_of(Rows(), made, 9 / 16)
    assert [mask.any(dim=1).tolist() for mask in masks] == [[False, True], [False, True]]


@pytest.mark.parametrize("scope", EVERY.values(), ids=EVERY)
def test_every_scope_takes_blocks(scope):
    made = [nn.Linear(8, 8), nn.Conv2d(4, 8, 2)]
    masks = masks_of(Blocks(2, 4, scope), made, 0.5, criterion=magnitude)
    assert zeros(masks) == size(made) // 2


def test_scores_are_gathered_ones_where_the_criterion_asks():
    made = [nn.Linear(4, 3)]
    squares = torch.rand(3, 4)
    (mask,) = masks_of(Unstructured(), made, 0.5, criterion=fisher, values={"squared_gradient": lambda: squares})
    scores = made[0].weight.detach().square() * squares
    assert scores[~mask].max() < scores[mask].min()

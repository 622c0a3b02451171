"""Which weights go together, against loops over every group, on random Linear, Conv2d and ConvTranspose2d layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress.pruning.patterns import NM, Blocks, Columns, Heads, Kernels, Layers, Rows, Unstructured
from lightning_compress.pruning.scopes import by_output, uniform
from tests.pruning.drawn_targets import SPARSITIES, layers, lowest_go, magnitudes, masks_of, size, targets, zeros
from tests.pruning.groups_by_loops import groups_of, units_of

quick = settings(max_examples=50, deadline=None)


def signed(weight):
    return weight + 0.0


# Some of each group


@quick
@given(st.data(), st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (2, 3)]))
def test_nm_keeps_the_n_highest_of_every_m_inputs(data, shape):
    keep, of = shape
    made = data.draw(layers(multiple=of))
    pattern, sparsity = NM(keep, of), 1 - keep / of
    pattern.check(targets(made), sparsity)
    for layer, mask, scores in zip(made, masks_of(pattern, made, sparsity), magnitudes(made), strict=True):
        for group in groups_of(layer, scores, of):
            kept = [place for place in group if mask[place]]
            assert len(kept) == keep
            dropped = [place for place in group if not mask[place]]
            assert max(scores[place] for place in dropped) <= min(scores[place] for place in kept)


@quick
@given(st.data(), st.sampled_from([(2, 4), (1, 4), (1, 2)]), st.booleans())
def test_gradual_nm_is_exact_and_what_went_stays(data, shape, by_sign):
    keep, of = shape
    made = data.draw(layers(multiple=of))
    pattern, final, masks = NM(keep, of), 1 - keep / of, None
    for share in (0.0, 0.3, 0.31, 0.8, 1.0):
        given = targets(made, masks, **({"criterion": signed} if by_sign else {}))
        new = list(pattern(given, final * share, share)[0])
        assert zeros(new) == min(round(final * share * size(made)), round(final * size(made)))
        for layer, mask in zip(made, new, strict=True):
            assert all(sum(not mask[p] for p in group) <= of - keep for group in groups_of(layer, mask.numpy(), of))
        if masks is not None:
            assert not any(bool((after & ~before).any()) for before, after in zip(masks, new, strict=True))
        masks = new
        for layer, mask in zip(made, masks, strict=True):
            layer.weight.data *= mask


def test_of_those_that_will_go_the_lowest_go_first():
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    (mask,) = masks_of(NM(2, 4), [layer], 0.25, 0.5)
    assert mask.tolist() == [[False, False, True, True], [True, True, True, True]]
    (mask,) = masks_of(NM(2, 4), [layer], 0.375, 0.75)
    assert mask.tolist() == [[False, False, True, True], [False, True, True, True]]


@pytest.mark.parametrize("shape", [(32, 64), (64, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_of_four_is_the_layout_of_sparse_tensor_cores(shape, dtype):
    """torch packs it without loss: its own conversion, which only 2:4 matrices survive, gives the weight back."""
    from torch.sparse import _semi_structured_conversions as conversions

    layer = nn.Linear(shape[1], shape[0]).to(dtype)
    (mask,) = masks_of(NM(2, 4), [layer], 0.5)
    masked = layer.weight.detach() * mask
    packed, places = conversions.sparse_semi_structured_from_dense_cutlass(masked)
    assert packed.shape == (shape[0], shape[1] // 2)
    assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(packed, places), masked)
    dense = layer.weight.detach()
    packed, places = conversions.sparse_semi_structured_from_dense_cutlass(dense)
    assert not torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(packed, places), dense)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="sparse tensor cores need a CUDA device of compute capability 8.0",
)
def test_two_of_four_runs_on_sparse_tensor_cores():
    layer = nn.Linear(256, 128, bias=False).half().cuda()
    (mask,) = masks_of(NM(2, 4), [layer], 0.5)
    layer.weight.data *= mask
    value = torch.randn(64, 256, dtype=torch.float16, device="cuda")
    expected = layer(value)
    layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()))
    torch.testing.assert_close(layer(value), expected, rtol=1e-2, atol=1e-2)


# Groups that go as a whole


GROUPS = [Blocks(1, 1), Blocks(1, 2), Rows(), Columns(), Kernels(), Heads(1), Layers()]


@quick
@given(layers(multiple=2), SPARSITIES, st.sampled_from(GROUPS))
def test_groups_go_as_a_whole_the_lowest_means_first(made, sparsity, pattern):
    if isinstance(pattern, Blocks):  # `check` refuses the others
        assume(all(layer.weight[0].numel() % pattern.columns == 0 for layer in made))
    masks = masks_of(pattern, made, sparsity)
    kept, means, sizes = [], [], []
    for layer, mask, scores in zip(made, masks, magnitudes(made), strict=True):
        number = units_of(pattern, layer, scores.shape)
        for unit in np.unique(number):
            inside = mask.numpy()[number == unit]
            assert inside.all() or not inside.any()
            kept.append(bool(inside.any()))
            means.append(scores[number == unit].astype("float64").mean())
            sizes.append(len(inside))
    if len(set(sizes)) == 1:
        assert kept.count(False) == round(sparsity * len(kept))
    else:
        left = round(sparsity * size(made)) - zeros(masks)
        assert left >= 0
        assert all(units > left for units, stays in zip(sizes, kept, strict=True) if stays)
    if len(set(sizes)) == 1 and True in kept and False in kept:
        assert max(m for m, k in zip(means, kept, strict=True) if not k) <= (1 + 1e-5) * min(
            m for m, k in zip(means, kept, strict=True) if k
        )


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.ConvTranspose2d(4, 6, 2), nn.Conv2d(4, 6, 2)], ids=repr)
def test_heads_are_equal_runs_of_outputs(layer, count):
    (mask,) = masks_of(Heads(count), [layer], 0.5)
    number = units_of(Heads(count), layer, mask.shape)
    alive = {int(unit): bool(mask.numpy()[number == unit].all()) for unit in np.unique(number)}
    assert len(alive) == count
    scores = magnitudes([layer])[0]
    order = sorted(alive, key=lambda unit: scores[number == unit].mean())
    assert [alive[unit] for unit in order] == sorted(alive.values())
    assert list(alive.values()).count(False) == round(0.5 * count)


def test_blocks_tile_a_convolution_as_a_matrix():
    layer = nn.Conv2d(4, 6, 3)
    (mask,) = masks_of(Blocks(3, 9), [layer], 0.5)
    tiles = mask.view(2, 3, 4, 9).movedim(1, 2).flatten(2)
    assert torch.equal(tiles.all(dim=2), tiles.any(dim=2))
    assert int(tiles.any(dim=2).sum()) == 4


def test_layers_drops_the_layer_of_the_lowest_mean():
    made = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)]
    made[1].weight.data *= 0.01
    assert [bool(mask.any()) for mask in masks_of(Layers(), made, 0.34)] == [True, False, True]


@quick
@given(layers(), SPARSITIES)
def test_a_pattern_of_single_weights_is_unstructured(made, sparsity):
    for mask, other in zip(
        masks_of(Blocks(1, 1), made, sparsity), masks_of(Unstructured(), made, sparsity), strict=True
    ):
        assert torch.equal(mask, other)


@pytest.mark.parametrize(
    "pattern",
    [Rows(), Columns(), Kernels(), Heads(2), Blocks(2, 2), Layers()],
    ids=lambda pattern: type(pattern).__name__,
)
def test_what_is_out_stays_out_while_sparsity_grows(pattern):
    torch.manual_seed(0)
    made = [nn.Linear(6, 6), nn.Conv2d(6, 6, 3), nn.ConvTranspose2d(6, 6, 3)]
    masks = None
    for sparsity in (0.3, 0.5, 0.7, 0.9):
        new = list(pattern(targets(made, masks, criterion=signed), sparsity, 1.0)[0])
        if masks is not None:
            assert not any(bool((after & ~before).any()) for before, after in zip(masks, new, strict=True))
        masks = new


def test_lowest_go_is_a_reference():
    assert lowest_go(np.array([1.0, 0.0, 1.0, 2.0]), 2).tolist() == [False, False, True, True]


# What `check` refuses

LINEAR = nn.Linear(6, 4)
SPLIT = nn.ConvTranspose2d(8, 8, 2, groups=4)


@pytest.mark.parametrize(
    ("pattern", "layer", "sparsity", "message"),
    [
        (NM(4, 4), LINEAR, 0.0, r"1 <= keep < of, got NM\(4, 4\)"),
        (NM(0, 4), LINEAR, 1.0, r"1 <= keep < of, got NM\(0, 4\)"),
        (NM(2, 4), LINEAR, 0.9, r"NM\(2, 4\) ends at sparsity 0.5, got 0.9; write GradualPruning\(0.5, pattern=NM\(2"),
        (NM(2, 4), LINEAR, 0.5, r"2:4 needs the inputs .* '0.weight' to be a multiple of 4, got 6; .* exclude=\['0'\]"),
        (NM(2, 4), SPLIT, 0.5, "to be a multiple of 4, got 2"),
        (Blocks(3, 2), LINEAR, 0.5, r"Blocks\(3, 2\) does not divide '0.weight', which has 4 rows .* exclude=\['0'\]"),
        (Blocks(2, 4), LINEAR, 0.5, "which has 6 columns as a matrix"),
        (Blocks(0, 2), LINEAR, 0.5, r"Blocks\(0, 2\) does not divide"),
        (Heads(3), LINEAR, 0.5, r"Heads\(3\) does not divide the 4 outputs of '0.weight'; .* include="),
        (Heads(0), LINEAR, 0.5, r"Heads\(0\) does not divide"),
        (Heads(2), LINEAR, 0.3, "less than the smallest unit of Heads, which has 12: nothing would be pruned"),
        (Rows(), LINEAR, 0.2, "sparsity 0.2 of 24 weights is less than the smallest unit of Rows, which has 6"),
        (Columns(), LINEAR, 0.1, "smallest unit of Columns, which has 4"),
        (Layers(), LINEAR, 0.9, "smallest unit of Layers, which has 24"),
        (Rows(by_output), LINEAR, 0.5, "Rows are whole outputs, .* take scope=uniform"),
        (Heads(2, by_output), LINEAR, 0.5, "Heads are whole outputs, .* take scope=uniform"),
    ],
)
def test_what_cannot_work_is_refused_with_the_cure(pattern, layer, sparsity, message):
    with pytest.raises(ValueError, match=message):
        pattern.check(targets([layer]), sparsity)


@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [(NM(1, 2), 0.5), (NM(1, 3), 2 / 3), (Blocks(2, 3), 0.5), (Rows(uniform), 0.5), (Columns(), 0.5), (Heads(2), 0.5)],
)
def test_what_can_work_is_not(pattern, sparsity):
    pattern.check(targets([LINEAR]), sparsity)

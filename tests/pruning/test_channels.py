"""Which units go, and where they are afterwards: the vectorised answers against loops over drawn groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress.pruning.channels import (
    Removal,
    choose,
    group_scores,
    kept_share,
    masks_of,
    remaining,
    unit_scores,
)
from lightning_compress.pruning.dependency import Group, Slot

QUICK = settings(max_examples=60, deadline=None)
Drawn = tuple[list[Group], dict[str, torch.Size]]


@st.composite
def networks(draw: Any) -> Drawn:
    """A chain of matrices: units of group g are rows of one and columns of the next, at shuffled positions."""
    units = draw(st.lists(st.integers(2, 7), min_size=1, max_size=3))
    widths = [draw(st.integers(1, 3)) for _ in units]
    source = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    sizes = [3, *(unit * width for unit, width in zip(units, widths, strict=True)), 2]
    shapes = {f"{at}.weight": torch.Size(pair) for at, pair in enumerate(zip(sizes[1:], sizes[:-1], strict=True))}
    groups = []
    for at, (unit, width) in enumerate(zip(units, widths, strict=True)):
        made, taken = (torch.randperm(unit * width, generator=source).view(unit, width) for _ in range(2))
        shapes[f"{at}.bias"] = torch.Size([unit * width])
        slots = (Slot(f"{at}.weight", 0, made), Slot(f"{at}.bias", 0, made), Slot(f"{at + 1}.weight", 1, taken))
        groups.append(Group(str(at), slots, unit))
    return groups, shapes


def some_of(draw: Any, units: int, out_of: Tensor | None = None) -> Tensor:
    """A mask that leaves at least one, and nothing that is out already."""
    allowed = torch.ones(units, dtype=torch.bool) if out_of is None else out_of
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=units, max_size=units))) & allowed
    if not mask.any():
        mask[int(allowed.nonzero()[0])] = True
    return mask


def without(tensor: Tensor, groups: list[Group], kept: dict[str, Tensor], name: str) -> Tensor:
    """The tensor without the rows and columns of units that are not kept, one by one."""
    for dim in range(tensor.dim()):
        gone = {
            position
            for group in groups
            for slot in group.slots
            if (slot.tensor, slot.dim) == (name, dim)
            for unit, positions in enumerate(slot.index.tolist())
            if not kept[group.name][unit]
            for position in positions
        }
        tensor = tensor.index_select(dim, torch.tensor([at for at in range(tensor.shape[dim]) if at not in gone]))
    return tensor


@QUICK
@given(networks(), st.data())
def test_remaining_positions_hold_what_they_held_before(drawn: Drawn, data: st.DataObject) -> None:
    groups, shapes = drawn
    present = {group.name: some_of(data.draw, group.units) for group in groups}
    numbered = {name: torch.arange(shape.numel()).view(shape) for name, shape in shapes.items()}
    smaller = {name: without(tensor, groups, present, name) for name, tensor in numbered.items()}
    for before, after in zip(groups, remaining(groups, present), strict=True):
        assert after.units == int(present[before.name].sum())
        for slot, old in zip(after.slots, before.slots, strict=True):
            places = [p for unit, p in enumerate(old.index) if present[before.name][unit]]
            for now, was in zip(slot.index, places, strict=True):
                found = smaller[slot.tensor].index_select(slot.dim, now)
                whole = numbered[slot.tensor].index_select(slot.dim, was)
                assert torch.equal(found, without(whole, without_dim(groups, slot), present, slot.tensor))


def without_dim(groups: list[Group], slot: Slot) -> list[Group]:
    """The groups without their slots along this dimension of this tensor, which has been cut already."""
    here = (slot.tensor, slot.dim)
    return [Group(g.name, tuple(s for s in g.slots if (s.tensor, s.dim) != here), g.units) for g in groups]


@QUICK
@given(networks(), st.data())
def test_removing_twice_is_removing_both_at_once(drawn: Drawn, data: st.DataObject) -> None:
    groups, _ = drawn
    first = {group.name: some_of(data.draw, group.units) for group in groups}
    second = {group.name: some_of(data.draw, group.units, first[group.name]) for group in groups}
    between = {name: units[first[name]] for name, units in second.items()}
    for once, twice in zip(remaining(groups, second), remaining(remaining(groups, first), between), strict=True):
        assert once.units == twice.units
        for one, other in zip(once.slots, twice.slots, strict=True):
            assert torch.equal(one.index, other.index)


@QUICK
@given(networks(), st.data())
def test_masks_and_shares_are_those_of_loops(drawn: Drawn, data: st.DataObject) -> None:
    groups, shapes = drawn
    kept = {group.name: some_of(data.draw, group.units) for group in groups}
    masks = masks_of(groups, kept, shapes)
    assert masks.keys() == shapes.keys()
    for name, mask in masks.items():
        numbered = torch.arange(mask.numel()).view(mask.shape)
        assert mask.sum() == len(left := without(numbered, groups, kept, name).flatten())
        assert bool(mask.flatten()[left].all())
    costs = {name: float(3 + place) * shape.numel() for place, (name, shape) in enumerate(shapes.items())}
    by_masks = sum(costs[name] * float(mask.double().mean()) for name, mask in masks.items()) / sum(costs.values())
    assert kept_share(groups, kept, costs, shapes) == pytest.approx(by_masks, abs=1e-12)


@QUICK
@given(networks(), st.data(), st.booleans())
def test_scores_are_means_over_a_units_weights(drawn: Drawn, data: st.DataObject, relative: bool) -> None:
    groups, shapes = drawn
    source = torch.Generator().manual_seed(0)
    scores = {n: torch.rand(shape, generator=source) for n, shape in shapes.items() if n.endswith("weight")}
    for group in groups:
        expected = torch.zeros(group.units, dtype=torch.float64)
        for slot in (slot for slot in group.slots if slot.tensor in scores):
            table = scores[slot.tensor].double().movedim(slot.dim, 0)
            means = torch.stack([table[positions].mean() for positions in slot.index])
            expected += (means / means.mean() if relative else means) / 2
        torch.testing.assert_close(group_scores(group, scores, relative), expected)
    present = {group.name: some_of(data.draw, group.units) for group in groups}
    kept = {group.name: some_of(data.draw, group.units, present[group.name]) for group in groups}
    now = {name: without(tensor, groups, present, name) for name, tensor in scores.items()}
    for name, found in unit_scores(groups, present, kept, now, relative).items():
        assert torch.equal(found.isneginf(), ~kept[name])


LIMITS = st.builds(
    Removal,
    multiple_of=st.integers(1, 4),
    most=st.sampled_from([0.3, 0.5, 0.9, 1.0]),
    least=st.integers(1, 3),
)


def share_of(kept: Any) -> float:
    return sum(int(units.sum()) for units in kept.values()) / sum(len(units) for units in kept.values())


def random_scores(data: st.DataObject) -> dict[str, Tensor]:
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    source = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    # Few values, so that ties happen.
    return {str(at): torch.randint(0, 6, (size,), generator=source).double() for at, size in enumerate(sizes)}


def least_allowed(units: int, limits: Removal) -> int:
    """The smallest number that stays, by trying."""
    for kept in range(1, units + 1):
        rounded = kept % limits.multiple_of == 0 or kept == units
        if kept >= limits.least and rounded and units - kept <= limits.most * units:
            return kept
    return units


def loop_choice(scores: dict[str, Tensor], amount: float, limits: Removal) -> dict[str, Tensor] | None:
    """Drop one unit after the other, the lowest first; after each, round by hand and see whether it is enough."""
    every = [
        (float(value), place, name, at) for place, (name, v) in enumerate(scores.items()) for at, value in enumerate(v)
    ]
    every.sort(key=lambda item: (item[0], item[1], item[3]))
    for count in range(len(every) + 1):
        kept = {}
        for name, values in scores.items():
            gone = [at for *_, group, at in every[:count] if group == name]
            stay = max(len(values) - len(gone), least_allowed(len(values), limits))
            while stay % limits.multiple_of and stay < len(values):
                stay += 1
            keep = torch.ones(len(values), dtype=torch.bool)
            # The best of the dropped come back; among equals the first.
            worst_first = sorted(gone, key=lambda at: (float(values[at]), -at))
            keep[worst_first[: len(values) - stay]] = False
            kept[name] = keep
        if 1.0 - share_of(kept) >= amount - 1e-9:
            return kept
    return None


@settings(max_examples=150, deadline=None)
@given(st.data(), LIMITS, st.floats(0.0, 0.99))
def test_the_lowest_go_until_it_is_enough(data: st.DataObject, limits: Removal, amount: float) -> None:
    scores = random_scores(data)
    expected = loop_choice(scores, amount, limits)
    if expected is None:
        with pytest.raises(ValueError, match=r"of the budget cannot go: with every group at its limit"):
            choose(scores, share_of, amount, limits)
        return
    found = choose(scores, share_of, amount, limits)
    assert {name: units.tolist() for name, units in found.items()} == {n: u.tolist() for n, u in expected.items()}


@settings(max_examples=150, deadline=None)
@given(st.data(), LIMITS, st.lists(st.floats(0.0, 0.99), min_size=2, max_size=4))
def test_what_is_out_stays_out_while_the_amount_grows(
    data: st.DataObject, limits: Removal, amounts: list[float]
) -> None:
    scores = random_scores(data)
    most = 1.0 - share_of({n: torch.arange(len(v)) < least_allowed(len(v), limits) for n, v in scores.items()})
    kept = {name: torch.ones(len(values), dtype=torch.bool) for name, values in scores.items()}
    for turn, amount in enumerate(sorted(amounts)):
        source = torch.Generator().manual_seed(turn)  # what is left is scored anew, the way training would
        anew = {
            n: torch.rand(len(v), generator=source).double().masked_fill(~kept[n], float("-inf"))
            for n, v in scores.items()
        }
        after = choose(anew, share_of, amount * most, limits)
        assert all(not bool((after[name] & ~kept[name]).any()) for name in kept)
        assert 1.0 - share_of(after) >= amount * most - 1e-9
        for units in after.values():
            stay = int(units.sum())
            assert stay == len(units) or stay % limits.multiple_of == 0
            assert stay >= least_allowed(len(units), limits)
        kept = after


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "flops"}, "'macs', 'parameters', 'channels' or 'latency', got 'flops'"),
        ({"multiple_of": 0}, "multiple_of >= 1"),
        ({"most": 0.0}, r"most in \(0, 1\]"),
        ({"most": 1.5}, r"most in \(0, 1\]"),
        ({"least": 0}, "least >= 1"),
        ({"times": -1}, "times >= 0"),
    ],
)
def test_wrong_limits_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Removal(**options)


@pytest.mark.parametrize(
    "options", [{"multiple_of": 8.0}, {"least": 1.5}, {"times": True}, {"most": "half"}, {"times": None}]
)
def test_limits_of_the_wrong_kind_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="expected whole numbers and a share for most"):
        Removal(**options)

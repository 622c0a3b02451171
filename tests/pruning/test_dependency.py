"""Which channels go together, against what is plain by hand; and what cannot be traced or removed, by name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from lightning_compress.errors import CompressError
from lightning_compress.pruning.dependency import check_groups, find_groups


def reasons(net, *args, checked=False):
    groups = find_groups(net, args)
    return {group.name: group.reason for group in (check_groups(net, groups, args) if checked else groups)}


def places(group):
    return {(slot.tensor, slot.dim): slot.index.tolist() for slot in group.slots}


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(2, 6), min_size=2, max_size=4), st.integers(1, 3))
def test_a_chain_has_a_group_for_each_layer(widths, pixels):
    layers = []
    for ins, outs in zip([3, *widths], widths, strict=False):
        layers += [nn.Conv2d(ins, outs, 1), nn.BatchNorm2d(outs), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * pixels**2, 2)).eval()
    groups = find_groups(net, (torch.zeros(2, 3, pixels, pixels),))
    assert [group.units for group in groups] == [*widths, 2]
    last = places(groups[-2])[f"{len(net) - 1}.weight", 1]
    assert last == torch.arange(widths[-1] * pixels**2).view(widths[-1], -1).tolist()
    assert [bool(group.reason) for group in groups] == [False] * len(widths) + [True]


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(3, 4), nn.Linear(3, 4)
        self.d = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.a(x).relu() + torch.cat([self.b(x), self.c(x)], -1).tanh())


def test_a_sum_with_a_concatenation_ties_each_half_to_its_branch():
    groups = {group.name: group for group in find_groups(Skips(), (torch.zeros(1, 3),))}
    assert places(groups["a"])["b.weight", 0] == [[0], [1], [2], [3]]
    assert places(groups["a"])["a.weight", 0] == [[0], [1], [2], [3]]
    assert places(groups["a:2"])["c.weight", 0] == [[0], [1], [2], [3]]
    assert places(groups["a:2"])["d.weight", 1] == [[4], [5], [6], [7]]


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([8, 16]), st.sampled_from([8, 16]), st.booleans())
def test_units_of_a_grouped_convolution_are_what_does_not_mix(groups, ins, outs, norm):
    """Whole groups, or the same of each group, whichever are more; `check_groups` removes one and compares."""
    middle = nn.Conv2d(ins, outs, 1, groups=groups)
    layers = [nn.Conv2d(3, ins, 1), middle, *([nn.GroupNorm(4, outs)] if norm else []), nn.Conv2d(outs, 2, 1)]
    net = nn.Sequential(*layers).double().eval()
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    found = check_groups(net, find_groups(net, (x,)), (x,))
    assert [group.reason for group in found[:-1]] == [""] * (len(found) - 1)  # each was removed and compared
    width = {slot.index.shape[1] for group in found for slot in group.slots if slot.tensor == "0.weight"}
    assert norm or width == ({ins // groups} if groups > 1 and groups >= ins // groups else {groups})


class OneByNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.last = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.other(x).relu() * self.first(x)[:, :1])


def test_a_channel_picked_by_number_stays():
    found = reasons(OneByNumber(), torch.zeros(2, 3))
    assert "picked by number in slice" in found["first"]
    assert found["other"] == ""


class FixedView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.free = nn.Linear(3, 128), nn.Linear(128, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.first(x).view(x.shape[0], 8, 16).softmax(-1).flatten(1)
        return self.out(self.free(self.last(heads).relu()).relu())


def test_sizes_that_a_forward_knows_by_heart_are_found_by_trying():
    assert reasons(FixedView(), torch.zeros(2, 3))["first"] == ""  # the graph does not show it
    found = reasons(FixedView(), torch.zeros(2, 3), checked=True)
    assert "the forward has sizes of its own (RuntimeError: shape '[2, 8, 16]' is invalid" in found["first"]
    assert found["last"] == found["free"] == ""


class ByValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


def test_a_branch_on_values_is_named_with_its_cure():
    with pytest.raises(CompressError, match="forward of ByValue cannot be traced") as caught:
        find_groups(ByValue(), (torch.zeros(2, 3),))
    assert "branches and loops that depend on tensors' values, or use GradualPruning" in str(caught.value)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.linalg.inv(self.first(x)))


class Normed(nn.Module):
    def __init__(self, norm) -> None:
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(3, 8), nn.Linear(8, 2), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


@pytest.mark.parametrize(
    ("net", "x", "reason"),
    [
        (Unknown(), torch.zeros(4, 4), "passes through linalg_inv, for which there is no rule"),
        (Normed(nn.LayerNorm(8)), torch.zeros(2, 3), "normalised over by layer_norm"),
        (Normed(nn.RMSNorm(8)), torch.zeros(2, 3), "normalised over by rms_norm"),
        (Normed(nn.GroupNorm(1, 8)), torch.zeros(2, 3), "normalised over by group_norm"),
        (Normed(nn.GroupNorm(2, 8, affine=False)), torch.zeros(2, 3), "normalised over by group_norm"),
        (Normed(nn.Softmax(-1)), torch.zeros(2, 3), "normalised or ordered over by softmax"),
        (Normed(lambda x: x - x.mean(-1, keepdim=True)), torch.zeros(2, 3), "compared over by mean"),
        (Normed(lambda x: x.sort(-1).values), torch.zeros(2, 3), "ordered over by sort"),
        (Normed(lambda x: x + torch.arange(8.0)), torch.zeros(2, 3), "meets a tensor of fixed size in add"),
        (Normed(lambda x: x.split([3, 5], -1)[1].repeat(1, 2)[:, :8]), torch.zeros(2, 3), "number in split_with_sizes"),
    ],
    ids=["inverse", "layer_norm", "rms_norm", "one_group", "no_weights", "softmax", "mean", "sort", "table", "split"],
)
def test_a_layer_that_stays_says_why(net, x, reason):
    assert reason in reasons(net, x)["first"]


def test_heads_go_whole_with_shared_keys():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8)
            self.o = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            mixed = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return self.o(mixed.transpose(1, 2).flatten(2))

    groups = check_groups(net := Attention(), find_groups(net, (torch.randn(2, 5, 8),)), (torch.randn(2, 5, 8),))
    assert (groups[0].units, groups[0].reason) == (2, "")
    assert places(groups[0])["q.weight", 0] == [list(range(8)), list(range(8, 16))]
    assert places(groups[0])["k.weight", 0] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_finding_leaves_the_module_as_it_was():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.BatchNorm1d(4), nn.GRU(4, 2))
    net[1].eval()
    before, state = [layer.training for layer in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}
    identities = [id(parameter) for parameter in net.parameters()]
    check_groups(net, find_groups(net, (torch.randn(2, 3),)), (torch.randn(2, 3),))
    assert [layer.training for layer in net.modules()] == before
    assert [id(parameter) for parameter in net.parameters()] == identities
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    net(torch.randn(2, 3))[0].sum().backward()

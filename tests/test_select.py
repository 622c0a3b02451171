"""Selection by names, globs, classes and containers; the head and tied weights stay; typos are named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.errors import NothingToCompress
from lightning_compress.select import patterns_or_none, select_layers, select_weights
from lightning_compress.sharding import all_reduce_max, clean_name, world_size

KINDS = (nn.Linear, nn.Conv2d)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.gate = nn.Linear(3, 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(3, 2)


EVERYTHING = ["stem", "blocks.0.conv", "blocks.0.gate", "blocks.1.conv", "blocks.1.gate", "head"]


def chosen(include=None, exclude=None, module=None):
    return list(select_layers(Net() if module is None else module, KINDS, include, exclude).layers)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, EVERYTHING[:-1]),
        (["*"], None, EVERYTHING),
        (["head"], None, ["head"]),
        ("blocks.1.gate", None, ["blocks.1.gate"]),
        (["blocks.1.gate.weight"], None, ["blocks.1.gate"]),
        (["blocks.*.conv"], None, ["blocks.0.conv", "blocks.1.conv"]),
        (["blocks.0"], None, ["blocks.0.conv", "blocks.0.gate"]),
        (["Block"], None, EVERYTHING[1:-1]),
        ([Block], None, EVERYTHING[1:-1]),
        ([nn.Conv2d], None, ["stem", "blocks.0.conv", "blocks.1.conv"]),
        (nn.Linear, None, ["blocks.0.gate", "blocks.1.gate", "head"]),
        (["Linear"], ["head"], ["blocks.0.gate", "blocks.1.gate"]),
        ([Net], ["Block"], ["stem", "head"]),
        (["Net"], None, EVERYTHING),
        (None, ["blocks"], ["stem"]),
        (None, [nn.Linear], ["stem", "blocks.0.conv", "blocks.1.conv"]),
        (["stem", "head"], ["stem"], ["head"]),
    ],
)
def test_what_a_pattern_selects(include, exclude, expected):
    assert chosen(include, exclude) == expected


def test_skipped_layers_say_why():
    selection = select_layers(Net(), KINDS, exclude=["stem"])
    assert dict(selection.skipped) == {"stem": "excluded", "head": "output head"}
    selection = select_layers(Net(), KINDS, include=["stem"])
    assert set(selection.skipped.values()) == {"not included"}


def test_the_head_is_the_last_linear_or_convolution_of_any_kind():
    fully_convolutional = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1), nn.ReLU())
    assert list(select_layers(fully_convolutional, (nn.Linear,)).layers) == ["0"]
    assert list(select_layers(fully_convolutional, (nn.Linear, nn.Conv1d)).skipped) == ["1"]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_typo_is_named_with_near_names(option):
    with pytest.raises(
        ValueError, match=f"{option} pattern 'blocks.0.gaet' matches no module; near names: .*blocks.0.gate"
    ):
        select_layers(Net(), KINDS, **{option: ["blocks.0.gaet"]})
    with pytest.raises(ValueError, match=r"LSTM.* matches no module"):
        select_layers(Net(), KINDS, **{option: [nn.LSTM]})


def test_an_empty_selection_lists_every_layer_and_its_reason():
    with pytest.raises(NothingToCompress, match=r"'0': output head\. Name what to compress with include"):
        chosen(module=nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(NothingToCompress, match=r"'stem': excluded; .*'head': output head"):
        chosen(exclude=["stem", "blocks"])
    with pytest.raises(NothingToCompress, match=r"expected layers of kind Linear, Conv2d in ReLU, found none"):
        chosen(module=nn.ReLU())
    with pytest.raises(NothingToCompress, match=r"not included"):
        chosen(include=[])


def test_a_lone_layer_can_be_named():
    assert list(select_weights(nn.Linear(2, 2), KINDS, include=["Linear"])) == ["weight"]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_layer_is_refused_until_it_has_a_weight_or_is_left_out():
    net = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3), nn.Linear(3, 2))
    with pytest.raises(NothingToCompress, match=r"'1' is lazy .* run one forward before fit, or exclude it"):
        chosen(module=net)
    assert chosen(module=net, exclude=["1"]) == ["0"]
    net(torch.ones(1, 2))
    assert chosen(module=net) == ["0", "1"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.decoder = nn.Linear(3, 5)
        self.decoder.weight = self.embedding.weight


def test_a_weight_tied_to_an_embedding_is_left_out_and_a_shared_one_comes_once():
    net = Tied()
    assert list(select_weights(net, KINDS, include=["*"])) == ["first.weight"]
    with pytest.raises(NothingToCompress, match=r"tied to an embedding .*decoder"):
        select_weights(net, KINDS, include=["decoder"])


def test_a_module_registered_twice_comes_once():
    layer = nn.Linear(2, 2)
    assert chosen(module=nn.Sequential(layer, layer, nn.Linear(2, 2))) == ["0"]


def test_a_reparametrized_weight_is_no_parameter():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.utils.parametrizations.weight_norm(net[0])
    with pytest.raises(NothingToCompress, match=r"reparametrized: 0; include other layers"):
        select_weights(net, KINDS)


@pytest.mark.parametrize("part", ["layer", "container", "whole"])
def test_a_compiled_module_keeps_the_names_the_user_wrote(part):
    net = Net()
    if part == "layer":
        net.stem = torch.compile(net.stem)
    elif part == "container":
        net.blocks = torch.compile(net.blocks)
    else:
        net = torch.compile(net)
    assert chosen(module=net) == EVERYTHING[:-1]
    assert chosen(["stem"], module=net) == ["stem"]
    assert list(select_weights(net, KINDS)) == [f"{name}.weight" for name in EVERYTHING[:-1]]
    assert all(isinstance(layer, KINDS) for layer in select_layers(net, KINDS).layers.values())


@pytest.mark.parametrize(
    ("wrapped", "clean"),
    [
        ("_orig_mod.0.weight", "0.weight"),
        ("model._orig_mod", "model"),
        ("_forward_module._fsdp_wrapped_module.net.0._checkpoint_wrapped_module.weight", "net.0.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("the_forward_module.fc", "the_forward_module.fc"),
        ("", ""),
    ],
)
def test_clean_names_lose_whole_prefixes_only(wrapped, clean):
    assert clean_name(wrapped) == clean


def test_reductions_without_other_processes_change_nothing():
    value = torch.tensor([1.0, -2.0])
    assert world_size() == 1
    assert all_reduce_max(value) is value
    assert value.tolist() == [1.0, -2.0]


@pytest.mark.parametrize(
    ("given", "kept"),
    [(None, None), ("a", ("a",)), (nn.Linear, (nn.Linear,)), (["a", nn.Linear], ("a", nn.Linear)), ([], ())],
)
def test_patterns_are_frozen(given, kept):
    assert patterns_or_none(given) == kept


def test_a_pattern_that_stands_for_no_layer_of_these_kinds_is_named():
    """Beside others that do: GradualPruning(include=["encoder", "embeddings"]) would leave embeddings in silence."""
    net = nn.ModuleDict({"words": nn.Embedding(4, 2), "body": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
    with pytest.raises(ValueError, match=r"'words' selects nothing here.*an? Embedding, and only Linear can"):
        select_layers(net, (nn.Linear,), ["body", "words"])
    with pytest.raises(ValueError, match=r"'body\.0' selects nothing here"):
        select_layers(net, (nn.Embedding,), ["words", "body.0"])
    assert list(select_layers(net, (nn.Linear,), ["body.0", nn.Linear], ["body.0"]).layers) == ["body.1"]

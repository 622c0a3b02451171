"""Layers are paired by depth or spatial size, and the models are left as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from lightning_compress.distillation.pairing import blocks_of, output_shapes, pair_by_depth, pair_layers


@pytest.mark.parametrize(
    ("student", "teacher", "places"),
    [
        (3, 6, [2, 4, 6]),
        (6, 12, [2, 4, 6, 8, 10, 12]),
        (4, 6, [2, 3, 5, 6]),
        (1, 5, [5]),
        (3, 3, [1, 2, 3]),
        (4, 2, [1, 1, 2, 2]),
        (5, 1, [1, 1, 1, 1, 1]),
        (2, 0, []),
    ],
)
def test_depths_go_by_their_ratio_and_the_last_by_the_last(student, teacher, places):
    pairs = pair_by_depth([f"s{i}" for i in range(1, student + 1)], [f"t{i}" for i in range(1, teacher + 1)])
    assert pairs == [(f"s{i}", f"t{place}") for i, place in enumerate(places, 1)]


def bert(layers, width=8):
    config = BertConfig(
        vocab_size=9, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=8,
    )  # fmt: skip
    return BertModel(config)


def test_transformers_pair_their_blocks():
    student, teacher = bert(2), bert(4, width=12)
    pairs = pair_layers(student, teacher, {"input_ids": torch.arange(4)[None]})
    assert pairs == [("encoder.layer.0", "encoder.layer.1"), ("encoder.layer.1", "encoder.layer.3")]


class Cnn(nn.Module):
    """Stages of 8 x 8, 4 x 4 and 2 x 2 positions, then one; a stage is a few convolutions."""

    def __init__(self, convolutions, width) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.stages = nn.Sequential(*(self.stage(convolutions, width) for _ in range(2)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, 3)

    def stage(self, convolutions, width):
        return nn.Sequential(
            nn.MaxPool2d(2),
            *(nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU()) for _ in range(convolutions)),
        )

    def forward(self, x):
        return self.head(self.pool(self.stages(self.stem(x))).flatten(1))


def test_cnns_pair_the_ends_of_their_stages():
    pairs = pair_layers(Cnn(1, 2), Cnn(3, 5), torch.zeros(1, 1, 8, 8))
    assert pairs == [("stem", "stem"), ("stages.0", "stages.0"), ("stages", "stages")]


def test_another_input_of_the_teacher_and_sizes_that_only_one_has():
    pairs = pair_layers(Cnn(1, 2), Cnn(1, 2), torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 16, 16))
    assert pairs == [("stem", "stages.0"), ("stages.0", "stages")]


def test_models_are_left_as_they_were():
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.BatchNorm1d(3))
    net[1].eval()
    shapes = output_shapes(net, torch.ones(4, 3))
    assert shapes == {"0": (4, 3), "1": (4, 3), "2": (4, 3)}
    assert [layer.training for layer in net] == [True, False, True]
    assert net[2].num_batches_tracked == 0
    assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        output_shapes(net, torch.ones(4, 2))
    assert not any(module._forward_hooks for module in net.modules())


def test_a_layer_that_is_called_twice_stands_where_its_last_call_ends():
    twice = nn.Conv2d(1, 1, 3, padding=1)
    shapes = output_shapes(nn.Sequential(twice, nn.MaxPool2d(2), twice), torch.zeros(1, 1, 8, 8))
    assert list(shapes.items()) == [("1", (1, 1, 4, 4)), ("0", (1, 1, 4, 4))]


def test_compiled_and_wrapped_models_pair_by_the_users_names():
    student, teacher = torch.compile(bert(1), backend="eager"), nn.DataParallel(bert(2))
    pairs = pair_layers(student, teacher, {"input_ids": torch.arange(4)[None]})
    assert pairs == [("encoder.layer.0", "encoder.layer.1")]


def test_blocks_are_the_list_with_most_parameters():
    model = bert(2)
    model.adapters = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
    assert blocks_of(model) == ["encoder.layer.0", "encoder.layer.1"]
    assert blocks_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == []


def test_models_with_nothing_in_common_are_named():
    with pytest.raises(ValueError, match=r"expected Bilinear and Linear .*found 0 and 0 blocks .*name the pairs"):
        pair_layers(nn.Bilinear(2, 2, 2), nn.Linear(2, 2), (torch.ones(1, 2), torch.ones(1, 2)), torch.ones(1, 2))

"""Overlays with ranges in them, and files of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from lightning_compress.quantization.fake import round_weight
from lightning_compress.quantization.grid import Range as Trained
from lightning_compress.search.overlay import filled, space_of
from lightning_compress.search.space import Range
from lightning_compress.search.stored import load_weights, save_weights

CONFIG = Path(__file__).parents[2] / "configs" / "search.yaml"

TWO = """
model:
  init_args: {learning_rate: {low: 0.001, high: 0.1, log: true}}
trainer:
  max_epochs: {choices: [2, 4]}
  callbacks+:
    - class_path: lightning_compress.GradualPruning
      init_args: {include: [a], sparsity: {low: 0.5, high: 0.9}}
    - class_path: lightning_compress.GradualPruning
      init_args: {include: [b], sparsity: {low: 0.5, high: 0.9}}
    - class_path: lightning_compress.QuantizationAwareTraining
      init_args: {per_layer: {net.0: {choices: [8, 4]}}}
"""


def test_what_is_open_is_named_and_filled():
    overlay = yaml.safe_load(TWO)
    space = space_of(overlay)
    assert space == {
        "model.learning_rate": Range(0.001, 0.1, log=True),
        "trainer.max_epochs": [2, 4],
        "GradualPruning.sparsity": Range(0.5, 0.9),
        "GradualPruning#2.sparsity": Range(0.5, 0.9),
        "QuantizationAwareTraining.per_layer.net.0": [8, 4],
    }
    made = filled(overlay, dict(zip(space, [0.01, 4, 0.6, 0.7, 8], strict=True)))
    assert made["model"]["init_args"] == {"learning_rate": 0.01}
    assert [callback["init_args"] for callback in made["trainer"]["callbacks+"]] == [
        {"include": ["a"], "sparsity": 0.6},
        {"include": ["b"], "sparsity": 0.7},
        {"per_layer": {"net.0": 8}},
    ]
    assert overlay == yaml.safe_load(TWO)


def test_the_example_space_is_one_and_an_overlay_without_ranges_is_none():
    overlay = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    assert set(space_of(overlay)) == {
        "GradualPruning.sparsity",
        "GradualPruning.window",
        "QuantizationAwareTraining.weights",
    }
    with pytest.raises(ValueError, match="a space leaves options open"):
        space_of({"trainer": {"callbacks+": []}})


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_read_back_as_they_are_rounded(tmp_path: Path, bits: int):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    net[0].weight.data[torch.rand(8, 3, 3, 3) < 0.9] = 0.0
    net[1].running_mean += 1.0
    size = save_weights(net, tmp_path / "w.zip", {"0": Trained(0.0, 1.0, 8, bits)})
    assert size == (tmp_path / "w.zip").stat().st_size
    read, state = load_weights(tmp_path / "w.zip"), net.state_dict()
    assert list(read) == list(state)
    assert torch.equal(read.pop("0.weight"), round_weight(state.pop("0.weight"), bits))
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


def test_zeros_and_narrow_codes_make_the_file_smaller_and_tied_weights_are_there_once(tmp_path: Path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))

    def size(bits):
        return save_weights(net, tmp_path / "w.zip", {n: Trained(0.0, 1.0, 8, bits) for n in ("0", "1")})

    plain, eight, four = save_weights(net, tmp_path / "w.zip"), size(8), size(4)
    assert four < 0.65 * eight < 0.65 * 0.35 * plain
    net[1].weight = net[0].weight
    assert size(8) < 0.6 * eight
    read = load_weights(tmp_path / "w.zip")
    assert torch.equal(read["0.weight"], read["1.weight"])
    net[0].weight.data[torch.rand(128, 128) < 0.9] = 0.0
    assert size(8) < 0.25 * eight

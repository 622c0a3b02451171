"""A recipe that a run kept starts another one: each grid's overlay is read back by LightningCLI's own parser."""

from __future__ import annotations

import inspect

import lightning.pytorch as L
import pytest
import yaml
from jsonargparse import ArgumentParser

from lightning_compress import QuantizationAwareTraining
from lightning_compress.callbacks.overlay import overlay
from lightning_compress.quantization import dorefa, formats, inputs, learned_steps, levels, lowbit, weights

ROOMS = (dorefa, formats, inputs, learned_steps, levels, lowbit, weights)


def grids(method):
    found = {name: getattr(room, name) for room in ROOMS for name in room.__all__}
    kept = [kind for kind in found.values() if inspect.isclass(kind) and hasattr(kind, method)]
    return [kind for kind in kept if not getattr(kind, "_is_protocol", False)]


def read_back(callback):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=L.Callback)
    entry = yaml.safe_load(overlay([callback]))["trainer"]["callbacks+"][0]
    parsed = parser.parse_object({"callback": entry})
    return parser.instantiate_classes(parsed).callback


@pytest.mark.parametrize("kind", grids("codes"), ids=lambda kind: kind.__name__)
def test_a_grid_of_weights_comes_back(kind):
    callback = QuantizationAwareTraining(kind(), 8)
    assert read_back(callback).weights == callback.weights


@pytest.mark.parametrize("kind", grids("affine"), ids=lambda kind: kind.__name__)
def test_a_grid_of_inputs_comes_back(kind):
    callback = QuantizationAwareTraining(8, kind())
    assert read_back(callback).inputs == callback.inputs

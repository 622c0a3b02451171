"""Averaged copies are found by the names of the model itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_compress.callbacks.averages import averaged_models


def network():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))


@pytest.mark.parametrize("kept", [network(), AveragedModel(network()), AveragedModel(torch.compile(network()))])
def test_a_copys_parameters_have_the_models_names(kept):
    callback = StochasticWeightAveraging(swa_lrs=0.1)
    callback._average_model = kept
    trainer = SimpleNamespace(callbacks=[EarlyStopping("loss"), callback])
    (average,) = averaged_models(trainer)
    assert list(average) == [name for name, _ in network().named_parameters()]
    copies = [parameter.data_ptr() for parameter in kept.parameters()]
    assert [parameter.data_ptr() for parameter in average.values()] == copies


def test_a_callback_that_has_no_copy_yet_yields_nothing():
    trainer = SimpleNamespace(callbacks=[StochasticWeightAveraging(swa_lrs=0.1), EarlyStopping("loss")])
    assert list(averaged_models(trainer)) == []

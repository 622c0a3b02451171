"""What all callbacks check in the same words: strategies, saved recipes, and layers that come late."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import nn

from lightning_compress.callbacks.contract import (
    FORMAT,
    SHARDING,
    check_state,
    check_strategy,
    described,
    is_final_at_setup,
    saved_state,
    warn_if_unfinished,
)
from lightning_compress.errors import CheckpointMismatch, CompressError, UnsupportedStrategy
from lightning_compress.pruning.criteria import magnitude
from lightning_compress.schedule import Cubic

RECIPE = {"sparsity": 0.9, "window": [0.1, 0.7], "criterion": "magnitude"}


class Pruner(L.Callback):
    pass


class Unknown(Strategy):
    """A strategy of the user's own."""

    def __init__(self):
        pass


Unknown.__abstractmethods__ = frozenset()


class Deep(DeepSpeedStrategy):
    """One of DDP's subclasses that shards nevertheless."""

    def __init__(self):
        pass


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, Unknown, Deep])
def test_strategies_that_a_callback_does_not_know_are_refused_by_name(strategy):
    trainer = SimpleNamespace(strategy=strategy())
    known = "SingleDeviceStrategy, DDPStrategy"
    with pytest.raises(
        UnsupportedStrategy, match=f"Pruner works under {known}, not yet under {strategy.__name__}: .*'ddp'"
    ):
        check_strategy(trainer, Pruner())


@pytest.mark.parametrize("strategy", [Unknown, Deep])
def test_what_shards_in_an_unknown_way_is_refused_by_callbacks_that_know_others(strategy):
    with pytest.raises(UnsupportedStrategy, match="FSDPStrategy, ModelParallelStrategy, not yet under"):
        check_strategy(SimpleNamespace(strategy=strategy()), Pruner(), SHARDING)


@pytest.mark.parametrize("strategy", [DDPStrategy, partial(SingleDeviceStrategy, "cpu")])
def test_whole_parameters_are_fine(strategy):
    check_strategy(SimpleNamespace(strategy=strategy()), Pruner())


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_parts_are_fine_for_callbacks_that_know_them(strategy):
    check_strategy(SimpleNamespace(strategy=strategy()), Pruner(), SHARDING)


def test_layers_may_come_late():
    class Late(L.LightningModule):
        def setup(self, stage):
            self.layer = nn.Linear(2, 2)

    class Later(L.LightningModule):
        def configure_model(self):
            self.layer = nn.Linear(2, 2)

    assert is_final_at_setup(L.LightningModule())
    assert not is_final_at_setup(Late())
    assert not is_final_at_setup(Later())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, None),
        (0.9, 0.9),
        (True, True),
        ((1, 0.5), [1, 0.5]),
        ([nn.Linear, "head"], ["torch.nn.modules.linear.Linear", "head"]),
        (magnitude, "lightning_compress.pruning.criteria.magnitude"),
        (Cubic(0.9), "Cubic(final=0.9, initial=0.0)"),
    ],
)
def test_a_recipe_is_primitives(value, text):
    assert described(value) == text
    json.dumps(described(value))


class Plain:
    """Has Python's default repr, with an address."""


@pytest.mark.parametrize("make", [Plain, lambda: partial(Plain().__eq__, 1)])
def test_a_recipe_is_the_same_in_the_next_process(make):
    kept = make(), make()  # both alive: at two addresses
    assert described(kept[0]) == described(kept[1])


def test_numbers_of_numpy_load_with_weights_only(tmp_path):
    state = saved_state({"window": described((np.float64(0.1), 0.7))})
    assert type(state["recipe"]["window"][0]) is float
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == state


@pytest.mark.parametrize(("complete", "dev_run", "warnings"), [(False, 0, 1), (True, 0, 0), (False, 2, 0)])
def test_a_fit_that_ends_before_the_window_warns(complete, dev_run, warnings, recwarn):
    who = SimpleNamespace(complete=complete)
    warn_if_unfinished(who, SimpleNamespace(fast_dev_run=dev_run), L.LightningModule())
    assert len([w for w in recwarn if "did not finish" in str(w.message)]) == warnings


def test_a_saved_state_is_read_again_with_weights_only(tmp_path):
    state = saved_state(RECIPE, clock={"counts": [3]}, masks={"0.weight": torch.ones(2, dtype=torch.uint8)})
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    check_state(loaded, RECIPE, Pruner())
    assert loaded["clock"] == {"counts": [3]}


def test_a_newer_format_is_named():
    with pytest.raises(
        CheckpointMismatch, match=f"Pruner state has format {FORMAT + 1}, this version reads {FORMAT}; upd"
    ):
        check_state({**saved_state(RECIPE), "format": FORMAT + 1}, RECIPE, Pruner())
    with pytest.raises(CheckpointMismatch, match="format None"):
        check_state({}, RECIPE, Pruner())


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({**RECIPE, "sparsity": 0.5}, "by Pruner with sparsity=0.9, this run has sparsity=0.5; resume with the same"),
        ({**RECIPE, "window": [0, 1]}, r"window=\[0.1, 0.7\], this run has window=\[0, 1\]"),
        ({**RECIPE, "added": 1}, "added=None, this run has added=1"),
        ({"sparsity": 0.9}, "criterion='magnitude', this run has criterion=None"),
    ],
)
def test_the_first_option_that_differs_is_named_with_both_values(now, message):
    with pytest.raises(CheckpointMismatch, match=message):
        check_state(saved_state(RECIPE), now, Pruner())


def test_our_errors_have_one_root_and_argument_errors_are_the_usual_ones():
    assert issubclass(CheckpointMismatch, CompressError)
    assert issubclass(UnsupportedStrategy, CompressError)
    assert not issubclass(CompressError, ValueError)


def test_a_step_is_not_a_fraction_of_the_same_value():
    with pytest.raises(CheckpointMismatch, match=r"window=\[0, 1\], this run has window=\[0, 1.0\]"):
        check_state(saved_state({"window": [0, 1]}), {"window": [0, 1.0]}, Pruner())

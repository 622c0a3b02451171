"""One wrapper for one method of one instance: clients come and go in any order, copies and pickles are plain."""

from __future__ import annotations

import copy
import functools
import pickle
import types

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from lightning_compress.callbacks.step import Interception, intercept


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.steps = 0

    def training_step(self, batch, batch_idx=0):
        """The user's own words."""
        self.steps += 1
        return ["step", batch, batch_idx]


def adds(word):
    def client(original, args, kwargs):
        return [word, *original(*args, **kwargs)]

    return client


def test_clients_wrap_each_other_the_last_one_outermost():
    module = Module()
    intercept(module, "training_step", adds("inner"))
    intercept(module, "training_step", adds("outer"))
    assert module.training_step("x", batch_idx=3) == ["outer", "inner", "step", "x", 3]
    assert module.steps == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_clients_leave_in_either_order_and_nothing_stays(order):
    module = Module()
    before = dict(module.__dict__)
    removes = [intercept(module, "training_step", adds(word)) for word in ("a", "b")]
    first, second = order
    removes[first]()
    assert module.training_step(0) == ["ba"[first], "step", 0, 0]
    removes[second]()
    assert "training_step" not in module.__dict__
    assert module.__dict__.keys() == before.keys()
    assert module.training_step(0) == ["step", 0, 0]
    for remove in removes:  # once more changes nothing
        remove()
    assert module.training_step(0) == ["step", 0, 0]


def test_two_methods_and_two_instances_are_apart():
    one, other = Module(), Module()
    remove = intercept(one, "training_step", adds("one"))
    intercept(one, "manual_backward", lambda original, args, kwargs: "backward")
    assert other.training_step(0) == ["step", 0, 0]
    assert one.manual_backward(None) == "backward"
    remove()
    assert one.manual_backward(None) == "backward"
    assert one.training_step(0) == ["step", 0, 0]


def test_a_removed_client_can_come_back():
    module = Module()
    client = adds("again")
    intercept(module, "training_step", client)()
    remove = intercept(module, "training_step", client)
    assert module.training_step(0)[0] == "again"
    remove()
    assert "training_step" not in module.__dict__


def test_a_method_that_the_user_patched_on_the_instance_is_given_back():
    module = Module()

    def patched(self, batch, batch_idx=0):
        return ["patched", self.steps]

    own = types.MethodType(patched, module)
    module.__dict__["training_step"] = own
    remove = intercept(module, "training_step", adds("ours"))
    assert module.training_step(0) == ["ours", "patched", 0]
    twin = copy.deepcopy(module)
    twin.steps = 5
    assert twin.training_step(0) == ["patched", 5]
    remove()
    assert module.__dict__["training_step"] is own


def test_a_patch_on_top_of_ours_is_left_and_ours_falls_silent():
    module = Module()
    remove = intercept(module, "training_step", adds("ours"))
    beneath = module.training_step
    module.__dict__["training_step"] = on_top = lambda *args: ["on top", *beneath(*args)]
    remove()
    assert module.__dict__["training_step"] is on_top
    assert module.training_step(0) == ["on top", "step", 0, 0]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_the_plain_method_bound_to_itself(duplicate):
    module = Module()
    intercept(module, "training_step", adds("ours"))
    twin = duplicate(module)
    assert not isinstance(twin.training_step, Interception)
    assert twin.training_step(0) == ["step", 0, 0]
    assert twin.training_step.__self__ is twin
    assert (twin.steps, module.steps) == (1, 0)
    assert module.training_step(0) == ["ours", "step", 0, 0]


def test_a_compiled_method_is_called_and_a_copy_does_not_run_the_original():
    module = Module()
    module.training_step = torch.compile(module.training_step, backend="eager")
    compiled = module.__dict__["training_step"]
    remove = intercept(module, "training_step", adds("ours"))
    assert module.training_step(0) == ["ours", "step", 0, 0]
    twin = copy.deepcopy(module)
    twin.training_step(0)
    assert (module.steps, twin.steps) == (1, 2)
    remove()
    assert module.__dict__["training_step"] is compiled


def logged(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Decorated(Module):
    @logged
    def training_step(self, batch, batch_idx, dataloader_idx=0):
        return [batch, batch_idx, dataloader_idx]


@pytest.mark.parametrize("kind", [Module, Decorated])
def test_lightning_reads_the_users_signature_through_it(kind):
    module = kind()
    before = [
        is_param_in_hook_signature(module.training_step, name) for name in ("batch_idx", "dataloader_idx", "other")
    ]
    intercept(module, "training_step", adds("ours"))
    after = [
        is_param_in_hook_signature(module.training_step, name) for name in ("batch_idx", "dataloader_idx", "other")
    ]
    assert after == before == [True, kind is Decorated, False]
    assert is_overridden("training_step", module)
    assert module.training_step.__name__ == "training_step"
    assert module.training_step.__doc__ == kind.training_step.__doc__


def test_lightning_still_sees_a_method_that_was_not_overridden():
    class Bare(L.LightningModule):
        pass

    module = Bare()
    intercept(module, "training_step", adds("ours"))
    assert not is_overridden("training_step", module)


def test_an_error_in_a_step_passes_through():
    module = Module()

    def fails(original, args, kwargs):
        raise RuntimeError("ours")

    remove = intercept(module, "training_step", fails)
    with pytest.raises(RuntimeError, match="ours"):
        module.training_step(0)
    remove()
    assert module.training_step(0) == ["step", 0, 0]


def test_parameters_and_keys_are_untouched():
    module = Module()
    keys = list(module.state_dict())
    intercept(module, "training_step", adds("ours"))
    assert list(module.state_dict()) == keys
    assert [name for name, _ in module.named_modules()] == ["", "layer"]

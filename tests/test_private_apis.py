"""Everything private of torch and Lightning that the package leans on; a test that fails here names what moved."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

from tests.architecture.sources import package_sources

# File of the package -> private attributes of objects that are not its own, each proven below.
KNOWN = {
    "callbacks/averages.py": {"_average_model"},
    "callbacks/clock.py": {
        "_combined_loader",
        "_combined_loader_states_to_load",
        "_data_fetcher",
        "_load_state_dicts",
    },
    "callbacks/gathering.py": {"_step_supports_amp_scaling"},
    "distillation/taps.py": {"_global_forward_hooks_with_kwargs"},
    "quantization/attach.py": {"_version"},
    "zero.py": {"_hp_mapping"},  # of DeepSpeed; tests/distributed/test_deepspeed.py proves it
    "quantization/attention.py": {"_C", "_safe_softmax"},
}
PRIVATE_IMPORTS = {
    "export/program.py": ("torch.ao.quantization.fx._decomposed",),
    "export/xnnpack.py": ("torch.ao.quantization.fx._decomposed",),
    "sharding.py": (
        "torch.distributed.tensor._utils",
        "torch.distributed.tensor._utils.compute_local_shape_and_global_offset",
    ),
    "measure/products.py": ("torch.utils._python_dispatch", "torch.utils._python_dispatch.TorchDispatchMode"),
    "quantization/dataflow.py": ("torch.utils._python_dispatch", "torch.utils._python_dispatch.TorchDispatchMode"),
}
OURS = {
    "_data",
    "_release",
    "_restored",
    "_unlogged",
}  # our own package: a name, and what our callbacks declare in lifecycle.py
ROOTS = {"torch", "lightning", "lightning_utilities", "lightning_fabric"}


def private_attributes(source):
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if owner not in {"self", "cls"}:
                yield node.attr
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value in set().union(*KNOWN.values())
        ):
            yield node.value


def private_imports(source):
    for dotted in source.imports():
        parts = dotted.split(".")
        if parts[0] in ROOTS and any(part.startswith("_") and not part.startswith("__") for part in parts):
            yield dotted


@pytest.mark.parametrize("source", package_sources(), ids=str)
def test_no_private_thing_is_used_that_is_not_proven_here(source):
    assert set(private_attributes(source)) - OURS == KNOWN.get(source.name, set())
    assert set(private_imports(source)) <= {
        "torch.utils._pytree",
        *PRIVATE_IMPORTS.get(source.name, ()),
    }


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(*callbacks, epochs=2):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = L.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), **quiet)
    trainer.fit(Module(), DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2))
    return trainer


class Watching(L.Callback):
    """Reads, at each batch's end, what averaging callbacks keep."""

    def __init__(self, watched):
        self.watched, self.seen = watched, []

    def on_train_batch_end(self, *_):
        self.seen.append(self.watched._average_model)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1), Module),
        (WeightAveraging, torch.optim.swa_utils.AveragedModel),
        (EMAWeightAveraging, torch.optim.swa_utils.AveragedModel),
    ],
    ids=["SWA", "WeightAveraging", "EMA"],
)
def test_lightnings_averages_keep_their_copy_in_average_model(make, kind):
    watching = Watching(make())
    fit(watching.watched, watching)
    average = watching.seen[-1]
    assert isinstance(average, kind)
    inner = average.module if kind is not Module else average
    assert "layer.weight" in dict(inner.named_parameters())


def test_torchs_trees_know_tensors_in_containers():
    tree = {"a": [torch.ones(1)], "b": (torch.zeros(2), 3)}
    leaves, spec = pytree.tree_flatten(tree)
    assert [torch.is_tensor(leaf) for leaf in leaves] == [True, True, False]
    assert pytree.tree_unflatten(leaves, spec) == tree
    assert pytree.tree_leaves(tree) == leaves
    assert pytree.tree_map_only(torch.Tensor, torch.Tensor.numel, tree) == {"a": [1], "b": (2, 3)}
    assert pytree.tree_map(type, tree) == {"a": [torch.Tensor], "b": (torch.Tensor, int)}


def test_a_tensors_version_moves_with_every_change_in_place():
    weight = nn.Parameter(torch.ones(3))
    versions = [weight._version]
    with torch.no_grad():
        weight.mul_(2.0)
        versions.append(weight._version)
        weight.detach().view(torch.int32).mul_(torch.ones(3, dtype=torch.int8))
        versions.append(weight._version)
    weight.grad = torch.ones(3)
    for options in ({}, {"foreach": True}):  # a fused step doesn't move it: kept weights are dropped after each step
        torch.optim.AdamW([weight], lr=0.1, **options).step()
        versions.append(weight._version)
    assert len(set(versions)) == len(versions)


def test_a_value_in_the_instance_shadows_a_registered_parameter():
    layer = nn.Linear(2, 1, bias=False)
    registered = layer.weight
    layer.__dict__["weight"] = torch.full((1, 2), 3.0)
    assert layer(torch.ones(1, 2)).item() == 6.0
    assert layer._parameters["weight"] is registered
    assert list(layer.parameters()) == [registered]
    assert layer.state_dict()["weight"].data_ptr() == registered.data_ptr()
    del layer.__dict__["weight"]
    assert layer.weight is registered


def test_an_always_called_forward_hook_runs_after_an_error():
    layer, called = nn.Linear(2, 1), []
    layer.register_forward_hook(lambda *_: called.append(1), always_call=True)
    with pytest.raises(RuntimeError):
        layer(torch.ones(1, 3))
    assert called == [1]


def test_lightning_peels_one_wrapped_function_to_read_a_users_method():
    def step(self, batch, batch_idx):
        return None

    module = Module()
    wrapped = functools.partial(step, module)
    wrapped.__wrapped__ = step
    module.__dict__["training_step"] = wrapped
    assert is_param_in_hook_signature(wrapped, "batch_idx", explicit=True)
    assert is_overridden("training_step", module)
    wrapped.__wrapped__ = L.LightningModule.training_step
    assert not is_overridden("training_step", module)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_fused_optimizers_hook_sees_found_inf_of_the_gradient_scaler(optimizer):
    weight, seen = nn.Parameter(torch.ones(2)), []
    fused = optimizer([weight], lr=0.1, fused=True)
    fused.register_step_post_hook(lambda this, args, kwargs: seen.append(float(this.found_inf)))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor in (1.0, float("inf")):
        fused.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(fused)
        scaler.update()
    assert seen == [0.0, 1.0]
    assert not hasattr(fused, "found_inf")


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_that_undoes_the_gradient_scale_itself_says_so(fused):
    weight, seen = nn.Parameter(torch.ones(2)), []
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=fused)
    optimizer.register_step_pre_hook(lambda this, args, kwargs: seen.append(float(getattr(this, "grad_scale", 1.0))))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    assert getattr(optimizer, "_step_supports_amp_scaling", False) == fused
    assert seen == [8.0 if fused else 1.0]


def test_torch_keeps_a_global_hooks_keyword_entry_after_its_removal():
    entries = torch_module._global_forward_hooks_with_kwargs
    assert not entries
    handle = torch_module.register_module_forward_hook(lambda *_: None, with_kwargs=True)
    assert list(entries) == [handle.id]
    handle.remove()
    left = entries.pop(handle.id, None)
    assert left is True, "torch forgets the entry itself now: take the line out of Tap.attach_outermost"


def test_callbacks_are_set_up_before_the_module():
    order = []

    class Late(Module):
        def setup(self, stage):
            order.append("module")

        def configure_model(self):
            order.append("configure_model")

    class First(L.Callback):
        def setup(self, trainer, pl_module, stage):
            order.append("callback")

        def on_fit_start(self, trainer, pl_module):
            order.append("fit")
            trainer.should_stop = True

    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = L.Trainer(accelerator="cpu", max_steps=1, callbacks=[First()], **quiet)
    trainer.fit(Late(), DataLoader(TensorDataset(torch.ones(4, 2))))
    assert order == ["callback", "module", "configure_model", "fit"]


def test_where_the_fit_loop_keeps_its_loader_and_a_checkpoints_place_in_it():
    seen = []

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            loop = trainer.fit_loop
            seen.append(loop._combined_loader_states_to_load)
            assert iter(loop._data_fetcher) is loop._data_fetcher
            loop._combined_loader._load_state_dicts([])

    fit(Look(), epochs=1)
    assert seen == [[]]


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("torch.distributed.fsdp._common_utils", "FSDP_WRAPPED_MODULE", "_fsdp_wrapped_module"),
        (
            "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
            "_CHECKPOINT_WRAPPED_MODULE",
            "_checkpoint_wrapped_module",
        ),
    ],
)
def test_wrappers_name_what_they_wrap(where, name, value):
    assert getattr(importlib.import_module(where), name) == value


def test_a_compiled_and_a_fabric_wrapper_name_what_they_wrap():
    compiled = torch.compile(nn.Linear(2, 1))
    assert [name for name, _ in compiled.named_children()] == ["_orig_mod"]
    wrapped = Fabric(accelerator="cpu").setup(nn.Linear(2, 1))
    assert "_forward_module" in dict(wrapped.named_children())


def test_a_dispatch_mode_sees_each_operator_with_its_tensors():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        torch.ones(2).relu_()
    assert seen.names == ["ones", "relu_"]


def test_torch_functions_can_be_hidden_from_all_modes():
    class Seen(torch.overrides.TorchFunctionMode):
        count = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    value = torch.ones(2)
    with Seen() as outer, Seen() as inner, torch._C.DisableTorchFunction():
        value.relu()
    assert outer.count + inner.count == 0
    with Seen() as outer:
        value.relu()
    assert outer.count == 1


def test_the_softmax_of_torchs_attention_is_zero_where_all_is_masked():
    scores = torch.tensor([[-torch.inf, -torch.inf], [0.0, 0.0]], requires_grad=True)
    shares = torch.ops.aten._safe_softmax(scores, -1)
    assert shares.tolist() == [[0.0, 0.0], [0.5, 0.5]]
    shares[1, 0].backward()
    assert scores.grad[1].tolist() == [0.25, -0.25]


def test_the_reference_operators_are_registered_by_this_import():
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    ops, value = torch.ops.quantized_decomposed, torch.tensor([-1.0, 0.26, 9.0])
    codes = ops.quantize_per_tensor(value, 0.5, 1, 0, 3, torch.uint8)
    assert codes.tolist() == [0, 2, 3]
    assert ops.dequantize_per_tensor(codes, 0.5, 1, 0, 3, torch.uint8).tolist() == [-0.5, 0.5, 1.0]
    weight = ops.dequantize_per_channel(
        torch.tensor([[2], [3]], dtype=torch.int8), torch.tensor([0.5, 2.0]), torch.zeros(2, dtype=torch.int64),
        0, -128, 127, torch.int8,
    )  # fmt: skip
    assert weight.tolist() == [[1.0], [6.0]]
    rows = torch.tensor([[0.0, 51.0], [-2.55, 0.0]])
    scales, zeros = ops.choose_qparams_per_token_asymmetric(rows, torch.int8)
    codes = ops.quantize_per_token(rows, scales, zeros, -128, 127, torch.int8)
    assert codes.tolist() == [[-128, 127], [-128, 127]]
    back = ops.dequantize_per_token(codes, scales, zeros, -128, 127, torch.int8, torch.float32)
    torch.testing.assert_close(back, rows)


def test_the_place_of_a_piece_of_a_dtensor_is_what_torch_computes():
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import (
        _compute_local_shape_and_global_offset,
        compute_local_shape_and_global_offset,
    )

    assert list(inspect.signature(compute_local_shape_and_global_offset).parameters)[:3] == [
        "global_shape",
        "mesh",
        "placements",
    ]
    # What the function of three arguments asks for, at the last of four processes: 7 rows are 2, 2, 2 and 1.
    assert _compute_local_shape_and_global_offset((7, 3), (4,), [3], [Shard(0)]) == ((1, 3), (6, 0))

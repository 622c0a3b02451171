"""Layers are read by the user's names under any wrapper, and nothing is kept beyond the step."""

from __future__ import annotations

import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import BertConfig, BertModel

from lightning_compress.distillation.taps import LayerTap
from lightning_compress.errors import CompressError

X = torch.ones(5, 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(input=x)
        for block in self.blocks:
            x = block(x).tanh()
        return x


def read(model, patterns, call=None, **options):
    tap = LayerTap(**options)
    remove = tap.attach(model, patterns)
    try:
        with tap.reading() as seen:
            (call or (lambda: model(X)))()
            return {name: list(values) for name, values in seen.items()}
    finally:
        remove()
        assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("blocks.1", ["blocks.1"]),
        (["blocks.*"], ["blocks.0", "blocks.1", "blocks.2"]),
        (["blocks.2", "first"], ["first", "blocks.2"]),
        (nn.Linear, ["first", "blocks.0", "blocks.1", "blocks.2"]),
        ("", [""]),
    ],
)
def test_which_layers_a_pattern_reads(patterns, names):
    assert list(read(Net(), patterns)) == names


def test_outputs_and_inputs_are_what_the_layer_gave_and_took():
    net = Net()
    (hidden,) = read(net, "first")["first"]
    torch.testing.assert_close(hidden, net.first(X))
    assert hidden.requires_grad
    assert read(net, "first", read="input") == {"first": [X]}  # given by keyword
    (after,) = read(net, "blocks.0")["blocks.0"]
    torch.testing.assert_close(read(net, "blocks.1", read="input")["blocks.1"][0], after.tanh())


def test_each_call_of_a_layer_is_read_in_order():
    net = Net()
    first, second = read(net, "first", lambda: (net(X), net(2 * X)))["first"]
    torch.testing.assert_close(second - net.first.bias, 2 * (first - net.first.bias))


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_names_are_the_users_under_ddp_and_activation_checkpointing():
    net = Net()
    net.blocks[1] = checkpoint_wrapper(net.blocks[1])
    wrapped = nn.parallel.DistributedDataParallel(net)
    assert list(read(wrapped, ["blocks.1", "first"])) == ["first", "blocks.1"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's look
@pytest.mark.parametrize("inside", [True, False])
def test_a_compiled_model_is_read_without_a_graph_break(inside):
    net = Net()
    plain = read(net, "blocks.1")["blocks.1"][0]
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    tap = LayerTap()
    if inside:
        net.blocks[1] = torch.compile(net.blocks[1], backend=backend, fullgraph=True)
        remove, called = tap.attach(net, "blocks.1"), net
    else:
        called = torch.compile(net, backend=backend, fullgraph=True)
        remove = tap.attach(called, "blocks.1")
    for _ in range(3):
        with tap.reading() as seen:
            called(X)
            (value,) = seen["blocks.1"]
            torch.testing.assert_close(value, plain)
            assert torch.autograd.grad(value.sum(), net.first.weight)[0].abs().sum() > 0
    remove()
    assert len(graphs) == 1


def test_nothing_is_kept_after_the_step_even_if_it_fails():
    net, tap, alive = Net(), LayerTap(), []
    remove = tap.attach(net, "blocks.*")

    def step(fail):
        with tap.reading() as seen:
            net(X)
            alive.extend(weakref.ref(value) for values in seen.values() for value in values)
            if fail:
                raise RuntimeError("step failed")

    step(fail=False)
    with pytest.raises(RuntimeError, match="step failed"):
        step(fail=True)
    assert len(alive) == 6
    assert [ref for ref in alive if ref() is not None] == []
    net(X)  # outside of reading
    assert tap.seen == {}
    remove()
    assert not any(module._forward_hooks for module in net.modules())


def test_validation_is_not_read_and_a_teacher_is():
    net = Net()
    assert read(net, "first", torch.no_grad()(lambda: net(X))) == {}
    (hidden,) = read(net, "first", torch.no_grad()(lambda: net(X)), gradient=False)["first"]
    assert not hidden.requires_grad


def test_a_tapped_layer_pickles():
    net, tap = Net(), LayerTap()
    tap.attach(net, "first")
    again = pickle.loads(pickle.dumps(net))
    with tap.reading() as seen:
        again(X)
        assert seen == {}
        net(X)
        assert list(seen) == ["first"]


def bert(implementation):
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=8, attn_implementation=implementation,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


def test_attention_maps_are_those_that_the_model_gives():
    model, ids = bert("eager"), torch.arange(4)[None]
    maps = read(model, "encoder.layer.*.attention.self", lambda: model(ids), read="attention")
    wanted = model(ids, output_attentions=True).attentions
    assert list(maps) == ["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"]
    for (got,), own in zip(maps.values(), wanted, strict=True):
        torch.testing.assert_close(got, own)


def test_attention_without_maps_is_named_with_its_cure():
    model = bert("sdpa")
    with pytest.raises(
        TypeError, match=r"attention of 'encoder.layer.0.attention.self' .*attn_implementation=\"eager\""
    ):
        read(model, "*.attention.self", lambda: model(torch.arange(4)[None]), read="attention")


def test_a_name_that_matches_nothing_is_named_with_near_names():
    with pytest.raises(ValueError, match=r"layers pattern 'block.1' matches no module; near names: blocks.1"):
        LayerTap().attach(Net(), "block.1")


def test_a_layer_that_the_step_passes_by_is_named():
    net, tap = Net(), LayerTap()
    remove = tap.attach(net, ["first", "unused"])
    with tap.reading():
        net(X)
        with pytest.raises(CompressError, match=r"did not call the tapped layers 'unused' with gradients enabled"):
            tap.check_all_called()
    remove()
    remove = tap.attach(net, "first")
    with tap.reading():
        net(X)
        tap.check_all_called()
    remove()

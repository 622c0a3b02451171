"""Fake-quantization rides on hooks: right values and gradients in every kind of call, and no trace when it is gone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_compress.errors import IncompatibleCallbacks, NothingToCompress
from lightning_compress.quantization import fake
from lightning_compress.quantization.attach import STATE, Phase, attach, check_weight, detach, fake_quantized
from lightning_compress.quantization.fake import fake_quantize_input, fake_quantize_weight, round_weight
from lightning_compress.quantization.grid import Range, input_grid

LOW, HIGH = -2.0, 3.0
dynamo_warns = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # at itself


def switched_on(layer, phase=Phase.ROUND):
    state = attach(layer)
    state.extremes = torch.tensor([-LOW, HIGH])
    state.phase = phase
    return state


def expected(layer, value):
    """The layer's output by the formulas, with functional operators and without hooks."""
    value = fake_quantize_input(value, *input_grid(torch.tensor(LOW), torch.tensor(HIGH)))
    weight = fake_quantize_weight(layer.weight)
    if isinstance(layer, nn.Linear):
        return functional.linear(value, weight, layer.bias)
    return layer._conv_forward(value, weight, layer.bias)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 4, 3, groups=2, stride=2), (2, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
}


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("phase", [Phase.ROUND, Phase.FROZEN], ids=lambda phase: phase.name)
def test_output_and_gradients_are_those_of_the_formulas(make, shape, phase):
    torch.manual_seed(0)
    layer, value = make(), torch.randn(shape, requires_grad=True)
    want = expected(layer, value)
    wanted = torch.autograd.grad(want.square().sum(), [value, *layer.parameters()])
    switched_on(layer, phase)
    got = layer(value)
    assert torch.equal(got, want)
    for ours, theirs in zip(torch.autograd.grad(got.square().sum(), [value, *layer.parameters()]), wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("phase", [Phase.OFF, Phase.OBSERVE], ids=lambda phase: phase.name)
def test_before_rounding_the_layer_computes_as_without_it(phase):
    layer, value = nn.Linear(6, 4), torch.randn(5, 6)
    plain = layer(value)
    state = switched_on(layer, phase)
    assert torch.equal(layer(value), plain)
    assert (state.pending is None) == (phase == Phase.OFF)


def test_a_layer_has_the_same_keys_class_and_parameters_and_no_trace_afterwards():
    layer = nn.Linear(3, 2)
    before, kind = dict(layer.__dict__), type(layer)
    keys, parameters = list(layer.state_dict()), list(layer.parameters())
    weight = layer.weight
    switched_on(layer)
    layer(torch.randn(4, 3)).sum().backward()
    assert list(layer.state_dict()) == keys
    assert [a is b for a, b in zip(layer.parameters(), parameters, strict=True)] == [True, True]
    assert type(layer) is kind
    assert layer.weight is weight
    detach(layer)
    assert layer.__dict__ == before
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    detach(layer)  # once more changes nothing


def test_attaching_twice_keeps_the_state():
    layer = nn.Linear(3, 2)
    assert attach(layer) is attach(layer)
    assert len(layer._forward_hooks) == 1


def test_what_is_observed_and_when():
    layer = nn.Linear(3, 2)
    state = switched_on(layer, Phase.OBSERVE)
    with torch.no_grad():  # validation
        layer(torch.full((1, 3), 100.0))
    assert state.pending is None
    layer(torch.tensor([[-1.0, 0.0, 2.0]]))
    layer(torch.tensor([[-0.5, 0.0, 4.0]]))
    assert state.pending.tolist() == [1.0, 4.0]
    state.phase = Phase.FROZEN
    layer(torch.full((1, 3), 100.0))
    assert state.pending.tolist() == [1.0, 4.0]


def test_an_empty_batch_passes():
    layer = nn.Linear(3, 2)
    for phase in Phase:
        switched_on(layer, phase)
        assert layer(torch.empty(0, 3)).shape == (0, 2)


def test_input_by_keyword():
    layer, value = nn.Linear(3, 2), torch.randn(4, 3)
    switched_on(layer)
    assert torch.equal(layer(input=value), layer(value))


class Foreign(nn.Linear):
    """A user's subclass with its own forward, argument names and more inputs."""

    def forward(self, hidden, scale=1.0):
        return functional.linear(hidden, self.weight * scale, self.bias)


def test_a_foreign_subclass_keeps_its_own_forward():
    layer, value = Foreign(3, 2), torch.randn(4, 3)
    switched_on(layer)
    rounded = fake_quantize_input(value, *input_grid(torch.tensor(LOW), torch.tensor(HIGH)))
    want = functional.linear(rounded, round_weight(layer.weight) * 2.0, layer.bias)
    assert torch.equal(layer(value, 2.0), want)
    assert torch.equal(layer(hidden=value, scale=2.0), want)
    assert torch.equal(layer(scale=2.0, hidden=value), want)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'hidden'"):
        layer()


class Failing(nn.Linear):
    def forward(self, value):
        if value.sum() > 100:
            raise RuntimeError("broken")
        return super().forward(value)


def test_an_exception_inside_the_forward_gives_the_weight_back():
    layer = Failing(3, 2)
    state = switched_on(layer)
    state.extremes = torch.tensor([0.0, 1000.0])
    with pytest.raises(RuntimeError, match="broken"):
        layer(torch.full((1, 3), 90.0))
    assert isinstance(layer.weight, nn.Parameter)
    assert state.shadowed == []
    layer(torch.zeros(1, 3))
    assert isinstance(layer.weight, nn.Parameter)


def test_an_exception_in_an_earlier_hook_leaves_the_weight():
    layer = nn.Linear(3, 2)
    state = switched_on(layer)
    state.extremes = torch.tensor([0.0, 1.0])

    def refuse(module, args):
        raise RuntimeError("refused")

    layer.register_forward_pre_hook(refuse, prepend=True)
    with pytest.raises(RuntimeError, match="refused"):
        layer(torch.zeros(1, 3))
    assert isinstance(layer.weight, nn.Parameter)
    assert state.shadowed == []


class Recursive(nn.Linear):
    """Calls itself inside its own forward."""

    def forward(self, value, depth=1):
        inner = self(value, depth - 1) if depth else value
        return functional.linear(inner, self.weight, self.bias)


def test_a_module_called_inside_its_own_forward():
    layer, value = Recursive(3, 3), torch.randn(4, 3)
    state = switched_on(layer)
    got = layer(value)
    assert isinstance(layer.weight, nn.Parameter)
    assert state.shadowed == []
    detach(layer)
    once = fake_quantize_input(value, *input_grid(torch.tensor(LOW), torch.tensor(HIGH)))
    twice = fake_quantize_input(once, *input_grid(torch.tensor(LOW), torch.tensor(HIGH)))
    assert torch.equal(twice, once)
    weight = round_weight(layer.weight)
    # The inner call's weight is the rounded one, rounded again, which moves it by an ulp at most.
    want = functional.linear(functional.linear(once, weight, layer.bias), weight, layer.bias)
    torch.testing.assert_close(got, want)


def test_a_shared_module_called_twice_sees_both_inputs_and_sums_its_gradients():
    layer, (first, second) = nn.Linear(3, 3), torch.randn(2, 4, 3)
    want = torch.autograd.grad((expected(layer, first) * expected(layer, second)).sum(), layer.weight)
    state = switched_on(layer)
    got = torch.autograd.grad((layer(first) * layer(second)).sum(), layer.weight)
    assert torch.equal(got[0], want[0])
    both = torch.stack([first, second])
    assert state.pending.tolist() == [-both.min(), both.max()]


def test_hooks_of_the_user_stay_and_see_the_users_values():
    layer, value, seen = nn.Linear(3, 2), torch.randn(4, 3), []
    before = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layer.register_forward_hook(lambda module, args, output: output + 1.0)
    want = expected(layer, value) + 1.0
    switched_on(layer)
    assert torch.equal(layer(value), want)
    assert seen[0] is value
    detach(layer)
    assert len(layer._forward_hooks) == 1
    assert list(layer._forward_pre_hooks) == [before.id]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"]
)
def test_a_copy_is_independent(duplicate):
    net, value = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(4, 3)
    state = switched_on(net[0])
    net(value)
    twin = duplicate(net)
    with torch.no_grad():
        twin[0].weight.mul_(2.0)
    other = twin[0].__dict__[STATE]
    other.extremes.mul_(0.5)
    assert state.extremes.tolist() == [-LOW, HIGH]
    assert torch.equal(net(value), functional.relu(expected(net[0], value)))
    assert not torch.equal(twin(value), net(value))
    detach(twin[0])
    assert not twin[0]._forward_hooks
    assert not twin[0]._forward_pre_hooks
    assert net[0]._forward_hooks
    assert torch.equal(twin(value), functional.relu(functional.linear(value, twin[0].weight, twin[0].bias)))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("keep_weight", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients_and_ranges(use_reentrant, keep_weight):
    torch.manual_seed(0)
    net, value = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), torch.randn(8, 6, requires_grad=True)
    states = [switched_on(net[index]) for index in (0, 2)]
    for state in states:
        state.keep_weight = keep_weight

    def gradients(call):
        for state in states:
            state.pending = state.kept = None
        net.zero_grad()
        value.grad = None
        call(value).square().sum().backward()
        return [value.grad, *(p.grad for p in net.parameters())], [state.pending for state in states]

    plain, seen = gradients(net)
    recomputed, seen_again = gradients(lambda v: checkpoint(net, v, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(seen, seen_again, strict=True))


def test_keep_weight_rounds_once_for_all_micro_batches_and_sees_a_changed_weight(monkeypatch):
    layer, value, calls = nn.Linear(3, 2), torch.randn(4, 3), []
    state = switched_on(layer)
    state.keep_weight = True
    rounding = fake.round_weight
    monkeypatch.setattr(fake, "round_weight", lambda *args: calls.append(1) or rounding(*args))
    for _ in range(3):
        layer(value).sum().backward()
    assert len(calls) == 1
    once = layer.weight.grad / 3
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    optimizer.step()
    assert torch.equal(layer(value), expected(layer, value))
    layer.load_state_dict({name: tensor * 3 for name, tensor in layer.state_dict().items()})
    assert torch.equal(layer(value), expected(layer, value))
    with torch.no_grad():
        layer.weight[0, 0] = 7.0
    assert torch.equal(layer(value), expected(layer, value))
    layer.zero_grad()
    layer(value).sum().backward()
    torch.testing.assert_close(layer.weight.grad, once)


def test_values_without_gradient_are_never_kept():
    layer = nn.Linear(3, 2)
    state = switched_on(layer)
    state.keep_weight = True
    with torch.inference_mode():
        layer(torch.randn(4, 3))
    assert state.kept is None
    layer(torch.randn(4, 3)).sum().backward()  # would fail on tensors made in inference mode


def test_bf16_autocast_rounds_in_float32_first():
    layer, value = nn.Linear(8, 4), torch.randn(5, 8)
    state = switched_on(layer)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(value)
        detach(layer)
        want = expected(layer, value)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)
    assert state.extremes.dtype == torch.float32


@dynamo_warns
def test_compiled_model_gives_the_same_values():
    net, value = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), torch.randn(8, 6)
    for index in (0, 2):
        switched_on(net[index])
    want = net(value)
    torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(value), want)
    assert all(isinstance(net[index].weight, nn.Parameter) for index in (0, 2))


def test_check_weight_names_what_cannot_be_rounded():
    check_weight("fc", nn.Linear(2, 2))
    reparametrized = nn.utils.prune.identity(nn.Linear(2, 2), "weight")
    with pytest.raises(IncompatibleCallbacks, match=r"fc.weight to be a plain parameter.*exclude=\['fc'\]"):
        check_weight("fc", reparametrized)
    integers = nn.Linear(2, 2)
    integers.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"floating-point weights, got torch.int8 in 'fc'.*exclude=\['fc'\]"):
        check_weight("fc", integers)


def test_fake_quantized_computes_as_trained_and_leaves_the_module_as_it_was():
    net, value = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).eval(), torch.randn(4, 3)
    plain, before = net(value), [dict(layer.__dict__) for layer in net]
    with fake_quantized(net, {"0": Range(LOW, HIGH)}) as inside:
        assert inside is net
        want = functional.linear(functional.relu(expected(net[0], value)), net[2].weight, net[2].bias)
        assert torch.equal(net(value), want)
    assert torch.equal(net(value), plain)
    assert [dict(layer.__dict__) for layer in net] == before
    with pytest.raises(KeyError, match="leaves"), fake_quantized(net, {"0": Range(LOW, HIGH)}):
        raise KeyError("leaves")
    assert not net[0]._forward_hooks


def test_fake_quantized_uses_the_widths_of_the_range():
    layer, value = nn.Sequential(nn.Linear(3, 3, bias=False)), torch.rand(50, 3)
    with fake_quantized(layer, {"0": Range(0.0, 1.0, bits=2, weight_bits=3)}):
        got = layer(value)
    rounded = fake_quantize_input(value, *input_grid(torch.tensor(0.0), torch.tensor(1.0), 2), 2)
    assert len(rounded.unique()) <= 4
    assert torch.equal(got, functional.linear(rounded, round_weight(layer[0].weight, 3)))


@dynamo_warns
def test_fake_quantized_finds_a_compiled_layer_by_the_users_name():
    layer, value = nn.Linear(3, 2), torch.randn(4, 3)
    net = nn.Sequential(torch.compile(layer, backend="eager"))
    want = expected(layer, value)
    with fake_quantized(net, {"0": Range(LOW, HIGH)}):
        torch.testing.assert_close(net(value), want)


def test_fake_quantized_names_what_is_missing():
    with pytest.raises(NothingToCompress, match=r"ranges\(\) after fit"), fake_quantized(nn.Linear(2, 2), {}):
        pass
    with pytest.raises(AttributeError, match="fc"), fake_quantized(nn.Linear(2, 2), {"fc": Range(0.0, 1.0)}):
        pass

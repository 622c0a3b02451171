"""Hessian traces against exact Hessians, losses against weights rounded by hand, and modules left as they were."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_compress.errors import NothingToCompress
from lightning_compress.quantization.attach import attach
from lightning_compress.quantization.sensitivity import (
    Trace,
    check_widths,
    hessian_sensitivity,
    hessian_traces,
    hutchinson,
    loss_sensitivity,
)

ALL = ["*"]


def loss(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def data(seed=1, count=3):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(16, 4, generator=generator), torch.randint(0, 3, (16,), generator=generator)) for _ in range(count)
    ]


def samples_of(matrix, count, seed=0):
    weight = torch.randn(len(matrix), dtype=matrix.dtype, requires_grad=True)
    value = 0.5 * weight @ matrix @ weight
    return hutchinson(value, [weight], count, torch.Generator().manual_seed(seed))[:, 0]


def test_samples_of_a_quadratic_have_the_mean_and_variance_that_theory_says():
    matrix = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    matrix = matrix + matrix.T
    samples = samples_of(matrix, 4000)
    variance = 2 * (matrix.square().sum() - matrix.diagonal().square().sum())
    assert abs(samples.mean() - matrix.trace()) < 4 * (variance / 4000).sqrt()
    assert samples.var() == pytest.approx(float(variance), rel=0.1)


def test_a_diagonal_quadratic_has_no_error():
    samples = samples_of(torch.diag(torch.tensor([1.0, -3.0, 7.0])), 5)
    assert samples.tolist() == [5.0] * 5


def exact_trace(net, name, batches):
    """The trace of the full Hessian over one weight, by torch.autograd.functional."""
    weight = net.get_parameter(name).detach()

    def mean_loss(value):
        losses = [
            F.cross_entropy(torch.func.functional_call(net, {name: value}, (inputs,)), labels)
            for inputs, labels in batches
        ]
        return torch.stack(losses).mean()

    return float(torch.autograd.functional.hessian(mean_loss, weight).view(weight.numel(), -1).trace())


def test_traces_are_those_of_the_full_hessian():
    net, batches = network().eval(), data()
    traces = hessian_traces(net, batches, loss, samples=800, include=ALL)
    assert list(traces) == ["0", "3", "5"]
    for name, trace in traces.items():
        exact = exact_trace(net, f"{name}.weight", batches)
        assert trace.error < 0.05 * abs(exact)
        assert abs(trace.value - exact) < 4 * trace.error
        assert trace.weights == net.get_submodule(name).weight.numel()


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)

    def forward(self, value):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(value)))))


def test_layers_that_share_a_weight_have_one_trace_of_both_uses():
    torch.manual_seed(0)
    net, batches = Twice(), data()
    traces = hessian_traces(net, batches, loss, samples=200)
    assert list(traces) == ["first"]
    assert abs(traces["first"].value - exact_trace(net, "first.weight", batches)) < 4 * traces["first"].error


def test_the_seed_decides_and_the_global_generator_does_not_move():
    net, batches = network(), data()
    before = torch.get_rng_state()
    first, again = (hessian_traces(net, batches, loss, samples=4) for _ in range(2))
    assert first == again
    assert first != hessian_traces(net, batches, loss, samples=4, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_half_of_the_error_takes_four_times_the_samples():
    net, batches = network(), data(count=1)
    few, many = (hessian_traces(net, batches, loss, samples=count)["0"].error for count in (100, 1600))
    assert many == pytest.approx(few / 4, rel=0.25)


def test_attention_has_second_derivatives_here():
    torch.manual_seed(0)
    net = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Linear(4, 3))
    batches = [(torch.randn(2, 5, 4), torch.randint(0, 3, (10,)))]

    def tokens(module, batch):
        return F.cross_entropy(module(batch[0]).flatten(0, 1), batch[1])

    assert list(hessian_traces(net, batches, tokens, samples=2)) == ["0.linear1", "0.linear2"]


def test_a_layer_that_is_frozen_or_linear_in_the_loss():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    net[0].weight.requires_grad_(False)
    traces = hessian_traces(net, [torch.randn(3, 4)], lambda module, batch: module(batch).sum(), include=ALL)
    assert traces["0"].value != 0
    assert traces["2"] == Trace(0.0, 0.0, 4)


def test_hessian_sensitivity_is_mean_trace_times_squared_rounding_error():
    net = network()
    table = hessian_sensitivity(net, {"0": Trace(48.0, 1.0, 24), "3": Trace(-2.0, 1.0, 30)}, (3, 8))
    weight = net[0].weight.detach().numpy().astype(np.float64)
    for bits, harm in table["0"].items():
        step = np.abs(weight).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
        assert harm == pytest.approx(2.0 * ((np.round(weight / step) * step - weight) ** 2).sum(), rel=1e-4)
    assert table["3"] == {3: 0.0, 8: 0.0}


def rounded_by_hand(net, name, bits):
    changed = copy.deepcopy(net).eval()
    weight = changed.get_submodule(name).weight.data
    step = weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    weight.copy_((weight / step).round() * step)
    return changed


def test_measured_growth_is_that_of_a_copy_rounded_by_hand():
    net, batches = network(), data()
    table = loss_sensitivity(net, batches, loss, (2, 4, 8), include=ALL)
    plain = np.mean([loss(net.eval(), batch).item() for batch in batches])
    for name, harms in table.items():
        for bits, harm in harms.items():
            rounded = np.mean([loss(rounded_by_hand(net, name, bits), batch).item() for batch in batches])
            assert harm == pytest.approx(rounded - plain, abs=1e-6)


def test_inputs_are_rounded_too_if_asked():
    net, batches = network(), data()
    table = loss_sensitivity(net, batches, loss, (3,), inputs=True, include=["3"])
    hidden = [torch.tanh(net[0](inputs)) for inputs, _ in batches]
    low, high = min(h.min() for h in hidden), max(h.max() for h in hidden)
    step = (high - low) / 7
    zero = (-low / step).round()
    rounded = [(((h / step).round() + zero).clamp(0, 7) - zero) * step for h in hidden]
    late = rounded_by_hand(net, "3", 3)[3:]
    after = np.mean([loss(late, (h, labels)).item() for h, (_, labels) in zip(rounded, batches, strict=True)])
    plain = np.mean([loss(net.eval(), batch).item() for batch in batches])
    assert table["3"][3] == pytest.approx(after - plain, abs=1e-6)


def snapshot(net):
    tensors = {
        name: (id(t), t._version, t.clone(), t.requires_grad, t.grad)
        for name, t in net.state_dict(keep_vars=True).items()
    }
    layers = [(m.training, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    return tensors, layers


def assert_same(before, after):
    assert before[1] == after[1]
    for (*ours, value, grads, grad), (*theirs, other, grads_then, grad_then) in zip(
        before[0].values(), after[0].values(), strict=True
    ):
        assert (ours, grads, grad) == (theirs, grads_then, grad_then)
        assert torch.equal(value, other)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("how", [hessian_traces, loss_sensitivity], ids=lambda how: how.__name__)
def test_the_module_is_put_back_exactly_after_an_error_too(how, fails):
    net, calls = nn.Sequential(network().train(), nn.BatchNorm1d(3)), []
    net[0][0].eval()
    attach(net[0][3])

    def counted(module, batch):
        calls.append(batch)
        if fails and len(calls) == 5:
            raise RuntimeError("the fifth")
        return loss(module, batch)

    before = snapshot(net)
    if fails:
        with pytest.raises(RuntimeError, match="the fifth"):
            how(net, data(), counted, inputs=True) if how is loss_sensitivity else how(net, data(), counted)
    else:
        how(net, iter(data()), counted)
    assert_same(before, snapshot(net))
    assert torch.is_grad_enabled()


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, value):
        return self.head(self.used(value))


@pytest.mark.parametrize("how", [hessian_traces, loss_sensitivity], ids=lambda how: how.__name__)
@pytest.mark.parametrize(
    ("net", "batches", "bad", "error", "message"),
    [
        (network, list, loss, ValueError, "got none"),
        (Branches, data, loss, ValueError, r"'idle' did not; .*exclude=\['idle'\]"),
        (network, data, lambda net, b: net(b[0]), ValueError, r"got a tensor of shape \(16, 3\) from batch 0"),
        (network, data, lambda net, b: loss(net, b).item(), TypeError, "got float from batch 0"),
        (network, data, lambda net, b: loss(net, b) * float("nan"), ValueError, "is nan in batch 0"),
        (lambda: nn.Sequential(nn.ReLU()), data, loss, NothingToCompress, "nothing can be compressed"),
    ],
    ids=["no batches", "idle layer", "not a scalar", "a number", "nan", "no layers"],
)
def test_what_cannot_be_measured_is_refused(how, net, batches, bad, error, message):
    with pytest.raises(error, match=message):
        how(net(), batches(), bad)


def test_a_layer_that_rounding_breaks_is_named():
    def breaks(net, batch):
        rounded = isinstance(net[3].__dict__.get("weight"), torch.Tensor)
        return loss(net, batch) / (0.0 if rounded else 1.0)

    with pytest.raises(ValueError, match="is inf in batch 0 with '3' at 2 bits"):
        loss_sensitivity(network(), data(), breaks)


def test_a_loss_without_a_gradient_has_no_hessian():
    with pytest.raises(ValueError, match="without from batch 0"):
        hessian_traces(network(), data(), lambda net, batch: loss(net, batch).detach())


def test_a_hessian_that_is_not_finite_is_refused():
    def kinked(net, batch):
        return net(batch[0]).sub(net(batch[0]).detach()).abs().pow(1.5).sum()

    with pytest.raises(ValueError, match="Hessian of batch 0 is not finite in 0, 3"):
        hessian_traces(network(), data(), kinked)


def test_a_trace_that_is_clearly_negative_is_refused():
    with pytest.raises(ValueError, match=r"got a Hessian trace of -4 \+- 1 in '0'"):
        hessian_sensitivity(network(), {"0": Trace(-4.0, 1.0, 24)})
    with pytest.raises(ValueError, match="got 'nowhere'"):
        hessian_sensitivity(network(), {"nowhere": Trace(4.0, 1.0, 24)})


@pytest.mark.parametrize("widths", [(), (1,), (9,), (4, 4), (4.0,), (True, 4), ("8",)], ids=str)
def test_widths_out_of_two_to_eight_are_refused(widths):
    with pytest.raises(ValueError, match="different whole numbers from 2 to 8"):
        check_widths(widths)


@pytest.mark.parametrize("samples", [1, 0, 2.0, True])
def test_too_few_samples_have_no_error(samples):
    with pytest.raises(ValueError, match="from 2 on"):
        hessian_traces(network(), data(), loss, samples=samples)

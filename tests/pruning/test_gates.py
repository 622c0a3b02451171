from __future__ import annotations

import copy
import io
import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress import CheckpointMismatch, NothingToCompress
from lightning_compress.pruning.gates import (
    Gate,
    HardConcrete,
    SoftMovement,
    SoftThreshold,
    expected_l0,
    hard_concrete,
    soft_threshold,
    straight_through_mask,
)
from lightning_compress.pruning.gating import LearnedGates, attach_gate, called_weights, detach_gate
from lightning_compress.quantization.attach import Phase, attach, detach

GATES = (HardConcrete(), SoftThreshold(), SoftMovement())
GRID = np.linspace(-6, 6, 25)


def named(gate: Gate) -> str:
    return type(gate).__name__


def weight_of(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


# Formulas


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("u", [0.01, 0.3, 0.5, 0.99])
def test_hard_concrete_is_equations_10_and_11(u: float) -> None:
    s = sigmoid((np.log(u) - np.log(1 - u) + GRID) / 0.5)
    wanted = np.minimum(1, np.maximum(0, s * 1.5 - 0.2))
    got = hard_concrete(torch.from_numpy(GRID), torch.full((25,), u, dtype=torch.float64), 0.5, -0.2, 1.3)
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)


def test_hard_concrete_of_evaluation_is_equation_13() -> None:
    wanted = np.clip(sigmoid(GRID) * 1.2 - 0.1, 0, 1)
    np.testing.assert_allclose(hard_concrete(torch.from_numpy(GRID)), wanted, rtol=1e-9, atol=1e-12)
    assert wanted[0] == 0.0
    assert wanted[-1] == 1.0


@pytest.mark.parametrize("log_alpha", [-3.0, -1.0, 0.0, 1.5])
@pytest.mark.parametrize("gate", [HardConcrete(), HardConcrete(beta=0.4, gamma=-0.3, zeta=1.5)], ids=["paper", "other"])
def test_expected_l0_is_the_share_of_open_gates(gate: HardConcrete, log_alpha: float) -> None:
    """Monte Carlo over a million gates; the tolerance is four standard deviations."""
    parameter = torch.full((1_000_000,), log_alpha)
    gates = gate(torch.ones_like(parameter), parameter, gate.noise(parameter, "weight", 3))
    probability = float(gate.penalty(parameter[:1]))
    deviation = math.sqrt(probability * (1 - probability) / 1_000_000)
    assert float((gates != 0).float().mean()) == pytest.approx(probability, abs=4 * deviation + 1e-7)
    assert float(gate.penalty(parameter)) == pytest.approx(1_000_000 * probability, rel=1e-4)


def test_noise_depends_on_seed_name_and_step_alone() -> None:
    parameter, gate = torch.zeros(50), HardConcrete()
    drawn = gate.noise(parameter, "a", 3)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(gate.noise(parameter, "a", 3), drawn)
    assert torch.equal(torch.get_rng_state(), before)
    others = (
        gate.noise(parameter, "b", 3),
        gate.noise(parameter, "a", 4),
        HardConcrete(seed=1).noise(parameter, "a", 3),
    )
    assert all(not torch.equal(other, drawn) for other in others)
    assert 0.0 < float(drawn.min()) <= float(drawn.max()) < 1.0


@given(st.floats(-5, 5), st.floats(0.001, 3))
@settings(max_examples=50, deadline=None)
def test_soft_threshold_is_equation_1(value: float, threshold: float) -> None:
    wanted = math.copysign(max(abs(value) - threshold, 0.0), value)
    got = soft_threshold(torch.tensor(value, dtype=torch.float64), torch.tensor(threshold, dtype=torch.float64))
    assert float(got) == pytest.approx(wanted)


def test_movement_shuts_in_the_forward_and_passes_in_the_backward() -> None:
    scores = torch.tensor([-1.0, 0.0, 0.2, 3.0], requires_grad=True)
    mask = straight_through_mask(scores, 0.1)
    assert mask.tolist() == [0.0, 0.0, 1.0, 1.0]
    weight = torch.tensor([2.0, -3.0, 5.0, -7.0], requires_grad=True)
    gradient = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    SoftMovement(threshold=0.1)(weight, scores, None).backward(gradient)
    assert torch.equal(scores.grad, gradient * weight.detach())  # equation of movement: dL/dS = dL/dW' * W
    assert torch.equal(weight.grad, gradient * mask.detach())


@pytest.mark.parametrize("gate", [HardConcrete(), SoftThreshold()], ids=named)
def test_gradients_to_weight_and_parameter(gate: Gate) -> None:
    weight = weight_of(3, 4).requires_grad_()
    parameter = gate.initial(weight)
    if isinstance(gate, HardConcrete):
        parameter = parameter * 0 + weight_of(3, 4) * 0.3
    noise = gate.noise(parameter, "weight", 0)
    parameter = parameter.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda w, p: gate(w, p, noise), (weight, parameter), eps=1e-7)
    assert torch.autograd.gradcheck(gate.penalty, parameter)


def test_penalties_by_hand() -> None:
    values = torch.from_numpy(GRID)
    l0 = sigmoid(GRID - 2 / 3 * np.log(0.1 / 1.1)).sum()
    assert float(HardConcrete().penalty(values)) == pytest.approx(l0)
    assert float(expected_l0(values).sum()) == pytest.approx(l0)
    assert float(SoftThreshold().penalty(torch.tensor(-3.0))) == 4.5
    assert float(SoftMovement().penalty(values)) == pytest.approx(sigmoid(GRID).mean())


@pytest.mark.parametrize("gate", GATES, ids=named)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_new_gate_lets_nearly_everything_through(gate: Gate, dtype: torch.dtype) -> None:
    weight = weight_of(30, 40, dtype=dtype)
    parameter = gate.initial(weight)
    gated = gate(weight, parameter, None)
    assert parameter.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gated.dtype == dtype
    assert gate.scores(weight, parameter).shape == weight.shape
    assert float((gated - weight).abs().max()) < 0.02
    assert isinstance(gate, Gate)


@pytest.mark.parametrize("gate", GATES, ids=named)
def test_scores_say_what_the_gate_lets_through(gate: Gate) -> None:
    """Whatever the parameters are, what is shut out never scores above all that is let through."""
    weight = weight_of(20, 20)
    parameter = gate.initial(weight)
    parameter = parameter + (weight_of(400).view_as(parameter) * 3 if parameter.dim() else 5.0)
    gated, scores = gate(weight, parameter, None), gate.scores(weight, parameter)
    shut = gated == 0
    assert 0 < int(shut.sum()) < shut.numel()
    if isinstance(gate, HardConcrete):  # the weight counts too
        assert float(scores[shut].mean()) < float(scores[~shut].mean())
    else:
        assert float(scores[shut].max()) <= float(scores[~shut].min())


@pytest.mark.parametrize(
    "make",
    [
        lambda: HardConcrete(learning_rate=0.0),
        lambda: HardConcrete(initial_probability=1.0),
        lambda: HardConcrete(gamma=0.0),
        lambda: HardConcrete(zeta=1.0),
        lambda: HardConcrete(beta=0.0),
        lambda: SoftThreshold(initial_share=0.0),
        lambda: SoftMovement(initial_score=0.0),
        lambda: SoftMovement(learning_rate=-1.0),
    ],
)
def test_options_out_of_range(make: Any) -> None:
    with pytest.raises(ValueError, match="needs"):
        make()


# Attached


def shut_first_row(layer: nn.Linear) -> torch.Tensor:
    """Log alphas that shut the first output."""
    parameter = torch.full_like(layer.weight, 9.0)
    parameter[0] = -9.0
    return parameter


def test_the_layer_computes_with_its_gated_weight_and_keeps_its_own() -> None:
    layer, value = nn.Linear(4, 3, bias=False), torch.randn(2, 4)
    plain, kept = layer(value), layer.weight
    attach_gate(layer, HardConcrete(), shut_first_row(layer))
    output = layer(value)
    assert not output[:, 0].any()
    assert torch.equal(output[:, 1:], plain[:, 1:])
    assert layer.weight is kept
    assert list(layer.state_dict()) == ["weight"]
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 5))
    assert "weight" not in layer.__dict__
    detach_gate(layer)
    detach_gate(layer)
    assert torch.equal(layer(value), plain)
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_noise_in_training_and_none_in_evaluation() -> None:
    layer, value = nn.Linear(50, 1, bias=False), torch.ones(1, 50)
    state = attach_gate(layer, HardConcrete(), torch.zeros(1, 50))
    half = layer.eval()(value)
    torch.testing.assert_close(half, (layer.weight * 0.5).sum().view(1, 1))
    state.noise = HardConcrete().noise(state.parameter, "weight", 0)
    assert torch.equal(layer.eval()(value), half)
    assert not torch.equal(layer.train()(value), half)
    assert torch.equal(layer(value), layer(value))


@pytest.mark.parametrize("order", list(permutations(["gate", "rounding"])), ids="+".join)
def test_what_is_rounded_is_the_gated_weight_in_either_order(order: tuple[str, str]) -> None:
    layer = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.27, 0.5, 0.3, 0.004], [1.0, 1.0, 1.0, 1.0]]))
    parameter = torch.full((2, 4), 9.0)
    parameter[0, 0] = -9.0  # the largest goes, so the grid of the rest is finer: 0.5 / 127
    for what in order:
        if what == "gate":
            attach_gate(layer, HardConcrete(), parameter)
        else:
            state = attach(layer)
            state.extremes, state.phase = torch.tensor([0.0, 2.55]), Phase.FROZEN
    for _ in range(2):  # what the first forward leaves behind would show in the second
        output = layer(torch.tensor([[0.0, 0.0, 0.0, 2.0]]))
        assert output[0, 0].item() == pytest.approx(2 * 0.5 / 127, rel=1e-5)  # 0.004 is 1.016 steps
        assert "weight" not in layer.__dict__
    for remove in (detach, detach_gate) if order[0] == "gate" else (detach_gate, detach):
        remove(layer)
        layer(torch.ones(1, 4))
        assert "weight" not in layer.__dict__
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def gated_network(gate: Gate) -> tuple[nn.Module, LearnedGates]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    network[1].weight = network[0].weight
    gates = LearnedGates(gate)
    gates.attach(network, {"0.weight": network[0].weight, "2.weight": network[2].weight})
    gates.draw(0)
    return network, gates


@pytest.mark.parametrize("gate", GATES, ids=named)
def test_copies_are_their_own_and_compute_the_same(gate: Gate) -> None:
    network, gates = gated_network(gate)
    value = torch.randn(3, 4)
    expected = network(value)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    for twin in (copy.deepcopy(network), torch.load(file, weights_only=False)):
        assert torch.equal(twin(value), expected)
        twin(value).sum().backward()
        assert all(parameter.grad is None for parameter in gates.parameters.values())


@pytest.mark.parametrize("gate", GATES, ids=named)
def test_a_step_moves_each_gate_once_and_leaves_no_gradient(gate: Gate) -> None:
    network, gates = gated_network(gate)
    before = {name: value.detach().clone() for name, value in gates.parameters.items()}
    weights = {"0.weight": network[0].weight, "2.weight": network[2].weight}
    network(torch.randn(3, 4)).square().sum().backward()
    gates.step(["2.weight"])
    assert torch.equal(before["0.weight"], gates.parameters["0.weight"])
    moved = (gates.parameters["2.weight"] - before["2.weight"]).abs()
    # Adam's first step is the learning rate.
    assert float(moved.detach().max()) == pytest.approx(gate.learning_rate, rel=1e-3)
    assert gates.parameters["2.weight"].grad is None
    assert gates.parameters["0.weight"].grad is not None
    gates.forget_stale_gradients(weights)
    assert gates.parameters["0.weight"].grad is not None
    network.zero_grad()
    gates.forget_stale_gradients(weights)
    assert gates.parameters["0.weight"].grad is None


def test_a_frozen_weights_gate_learns_nothing() -> None:
    network, gates = gated_network(SoftThreshold())
    weights = {"0.weight": network[0].weight, "2.weight": network[2].weight}
    network[0].weight.requires_grad_(False)
    (network(torch.randn(3, 4)).square().sum() + sum(gates.penalties(weights))).backward()
    assert gates.parameters["0.weight"].grad is None
    assert gates.parameters["2.weight"].grad is not None


@pytest.mark.parametrize("gate", GATES, ids=named)
def test_folded_weights_compute_the_same(gate: Gate) -> None:
    network, gates = gated_network(gate)
    for name, parameter in gates.parameters.items():
        parameter.data += 3 * weight_of(*parameter.shape, dtype=parameter.dtype) if parameter.dim() else 2.0
        assert name in ("0.weight", "2.weight")
    value = torch.randn(3, 4)
    expected = network.eval()(value)
    gates.fold(dict(network.named_parameters()))
    gates.clear()
    torch.testing.assert_close(network(value), expected)


@pytest.mark.parametrize("gate", GATES, ids=named)
def test_saved_gates_go_on_as_they_were(gate: Gate) -> None:
    network, gates = gated_network(gate)
    weights = {"0.weight": network[0].weight, "2.weight": network[2].weight}

    def learn(learned: LearnedGates, step: int) -> None:
        learned.draw(step)
        learned.forget_stale_gradients(weights)
        network.zero_grad()
        (network(torch.ones(3, 4)).square().sum() + sum(learned.penalties(weights))).backward()
        learned.step(weights)

    learn(gates, 1)
    file = io.BytesIO()
    torch.save(gates.state_dict(), file)
    learn(gates, 2)
    expected = {name: value.detach().clone() for name, value in gates.parameters.items()}
    gates.clear()
    file.seek(0)
    again = LearnedGates(gate)
    again.load_state_dict(torch.load(file, weights_only=True), weights)
    again.attach(network, weights)
    learn(again, 2)
    assert all(torch.equal(again.parameters[name], value) for name, value in expected.items())


def test_gates_of_other_weights_are_named() -> None:
    network, gates = gated_network(SoftThreshold())
    with pytest.raises(CheckpointMismatch, match=r"first difference: '2\.weight'"):
        LearnedGates(SoftThreshold()).load_state_dict(gates.state_dict(), {"0.weight": network[0].weight})


def test_only_uncalled_weights_are_named() -> None:
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(NothingToCompress, match=r"of out_proj\.weight none is"):
        called_weights(attention, {"out_proj.weight": attention.out_proj.weight})


def test_a_learning_rate_computed_with_numpy_is_saved_as_a_plain_number() -> None:
    gates = LearnedGates(HardConcrete(learning_rate=np.float64(0.1)))
    layer = nn.Linear(2, 2)
    gates.attach(layer, {"weight": layer.weight})
    assert type(gates.state_dict()["optimizers"]["weight"]["param_groups"][0]["lr"]) is float

"""Learned values: their own Adam, relative learning rates, exact saving, and no share in the user's optimizers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.quantization.attach import Phase, attach, detach, fake_quantized
from lightning_compress.quantization.learning import LearnedValues
from tests.learned_grids import Bounds, Step


def values(rate: float = 0.01) -> LearnedValues:
    learned = LearnedValues(rate)
    learned.add("fc", "weight", {"step": torch.tensor([0.5, 1.5]), "offset": torch.zeros(())})
    learned.add("fc", "input", {"step": torch.tensor(20.0)})
    return learned


def give(learned: LearnedValues, seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    for value in learned.parameters["fc"].values():
        value.grad = torch.randn(value.shape, generator=noise)


def test_a_step_is_adams_and_relative_to_the_start() -> None:
    learned = values()
    give(learned, 0)
    gradients = {key: value.grad.clone() for key, value in learned.parameters["fc"].items()}
    learned.step(["fc", "another"])
    # The first step of Adam is lr * sign(gradient).
    rates = {"weight.step": 0.01, "weight.offset": 0.01, "input.step": 0.2}
    starts = {
        "weight.step": torch.tensor([0.5, 1.5]),
        "weight.offset": torch.zeros(()),
        "input.step": torch.tensor(20.0),
    }
    for key, value in learned.parameters["fc"].items():
        torch.testing.assert_close(value.detach(), starts[key] - rates[key] * gradients[key].sign(), atol=1e-6, rtol=0)
        assert value.grad is None


def test_many_steps_are_torchs_adam_of_each_value_alone() -> None:
    """Late values, values without a gradient, and layers of two optimizers that take turns."""
    learned, noise = LearnedValues(0.03), torch.Generator().manual_seed(1)
    twins: dict[tuple[str, str], tuple[Tensor, torch.optim.Adam]] = {}

    def add(layer: str, kind: str, start: Tensor) -> None:
        learned.add(layer, kind, {"step": start})
        twin = start.clone().requires_grad_()
        twins[layer, f"{kind}.step"] = twin, torch.optim.Adam([twin], lr=0.03 * float(start.abs().mean()))

    add("one", "weight", torch.tensor([0.5, 1e-3, 7.0]))
    add("two", "weight", torch.tensor(2e-4))
    add("one", "input", torch.tensor(300.0))
    for step in range(40):
        if step == 10:
            add("two", "input", torch.tensor([[1.0], [2.0]]))
        layers = (["one", "two"], ["two"], ["one"], ["two", "one", "absent"])[step % 4]
        for (layer, key), (twin, optimizer) in twins.items():
            gradient = torch.randn(twin.shape, generator=noise) * 10.0 ** (step % 5 - 3)
            absent = step % 3 == 0 and key == "weight.step"
            learned.parameters[layer][key].grad = None if absent else gradient.clone()
            twin.grad = None if absent else gradient.clone()
            if layer in layers:
                optimizer.step()
        learned.step(layers)
    for (layer, key), (twin, _) in twins.items():
        torch.testing.assert_close(learned.parameters[layer][key], twin, rtol=2e-6, atol=0.0)


def test_a_layer_moves_with_what_it_needs_to_go_on() -> None:
    learned, there = values(), torch.device("meta")
    give(learned, 0)
    learned.step(["fc"])
    before = dict(learned.parameters["fc"])
    learned.move("fc", torch.device("cpu"))
    assert all(learned.parameters["fc"][key] is value for key, value in before.items())
    learned.move("fc", there)
    for value in learned.parameters["fc"].values():
        assert (value.device, value.is_leaf, value.requires_grad) == (there, True, True)
        value.grad = torch.ones_like(value)
    learned.step(["fc"])  # would raise if the moments had stayed behind
    assert all(value.grad is None for value in learned.parameters["fc"].values())


def test_only_the_named_layers_step() -> None:
    learned = values()
    learned.add("other", "weight", {"step": torch.tensor(1.0)})
    learned.parameters["other"]["weight.step"].grad = torch.tensor(1.0)
    give(learned, 0)
    learned.step(["fc"])
    assert learned.parameters["other"]["weight.step"] == 1.0
    assert learned.parameters["other"]["weight.step"].grad == 1.0
    learned.forget_stale_gradients(["other", "absent"])
    assert learned.parameters["other"]["weight.step"].grad is None


def test_saved_and_loaded_it_goes_on_to_the_bit() -> None:
    learned, again = values(), LearnedValues(0.5)
    for step in range(3):
        give(learned, step)
        learned.step(["fc"])
    again.load_state_dict(learned.state_dict())
    for step in range(3, 6):
        for each in (learned, again):
            give(each, step)
            each.step(["fc"])
    for key, value in learned.parameters["fc"].items():
        assert torch.equal(value, again.parameters["fc"][key])
    assert again.parameters["fc"]["weight.step"] is not learned.parameters["fc"]["weight.step"]


def test_frozen_values_stay_and_their_optimizers_are_not_saved() -> None:
    learned, again = values(), LearnedValues(0.1)
    give(learned, 0)
    learned.freeze()
    learned.step(["fc"])
    assert learned.of("fc", "weight")["step"].tolist() == [0.5, 1.5]
    assert learned.state_dict()["moments"] == {}
    again.load_state_dict(learned.state_dict())
    again.step(["fc"])
    assert again.of("fc", "input")["step"] == 20.0
    assert again.of("fc", "nothing") == again.of("absent", "weight") == {}


def learning_layer() -> tuple[nn.Linear, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    state = attach(layer, Step(4), Bounds(4))
    state.extremes, state.phase = torch.tensor([2.0, 3.0]), Phase.ROUND
    weight = {key: value.requires_grad_() for key, value in Step(4).learned(layer.weight.detach()).items()}
    ends = Bounds(4).learned(torch.tensor(-2.0), torch.tensor(3.0))
    ends = {key: value.requires_grad_() for key, value in ends.items()}
    state.learn("weight", weight)
    state.learn("input", ends)
    return layer, weight, ends


def test_the_layers_output_and_gradients_are_those_of_the_grids() -> None:
    layer, weight, ends = learning_layer()
    value = torch.randn(5, 6)
    got = layer(value)
    leaves = [layer.weight, layer.bias, *weight.values(), *ends.values()]
    ours = torch.autograd.grad(got.square().sum(), leaves)
    low, high = torch.tensor(-2.0), torch.tensor(3.0)
    rows = Step(4).rounded(layer.get_parameter("weight"), weight)
    want = nn.functional.linear(Bounds(4).rounded(value, low, high, ends), rows, layer.bias)
    assert torch.equal(got, want)
    for one, other in zip(ours, torch.autograd.grad(want.square().sum(), leaves), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("change", ["frozen", "weight frozen", "no gradient"])
def test_values_get_no_gradient_where_the_weight_gets_none(change: str) -> None:
    layer, weight, ends = learning_layer()
    state = attach(layer)
    if change == "frozen":
        state.phase = Phase.FROZEN
    layer.weight.requires_grad_(change != "weight frozen")
    with torch.set_grad_enabled(change != "no gradient"):
        output = layer(torch.randn(5, 6, requires_grad=True))
    if change != "no gradient":
        output.sum().backward()
    assert all(value.grad is None for value in (*weight.values(), *ends.values()))


def test_a_range_that_was_learned_from_is_observed_no_more() -> None:
    layer, _, _ = learning_layer()
    layer(torch.full((1, 6), 100.0))
    assert attach(layer).pending is None


def test_fake_quantized_computes_with_what_was_learned_to_the_bit() -> None:
    layer, weight, ends = learning_layer()
    value = torch.randn(50, 6)
    with torch.no_grad():
        weight["step"].mul_(1.3)
        ends["high"].mul_(0.7)
        attach(layer).phase = Phase.FROZEN
        want, trained = layer(value), attach(layer).range
    detach(layer)
    assert trained.weight_grid == Step(4)
    assert (trained.bits, trained.weight_bits) == (4, 4)
    assert trained.weights_learned["step"] == weight["step"]
    codes, scale = trained.codes(layer.weight)
    with torch.no_grad(), fake_quantized(nn.Sequential(layer), {"0": trained}):
        assert torch.equal(layer(value), want)
    torch.testing.assert_close(codes * scale.unsqueeze(1), Step(4).rounded(layer.weight, weight).detach())
    with pytest.raises(ValueError, match="affine grid, got Bounds"):
        trained.scale  # noqa: B018

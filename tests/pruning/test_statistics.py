"""What is gathered for criteria, against sums written out in numpy over what a layer was given and gave."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_compress.errors import CompressError
from lightning_compress.pruning.statistics import ACTIVATIONS, STATE, Statistics
from tests.conformance.running import traces

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "linear over tokens": (lambda: nn.Linear(6, 4), (5, 3, 6)),
    "linear of one row": (lambda: nn.Linear(6, 4), (6,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (5, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (5, 4, 7, 7)),
    "conv2d unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (5, 4, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (5, 4, 7, 7)),
    "dilated, strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2), (5, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, groups=2), (3, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (5, 4, 5, 5)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (5, 4, 5, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 2, 2, groups=2), (5, 4, 5)),
}


def statistics(layer, *asked):
    made = Statistics(asked)
    made.attach({"weight": layer})
    return made


def ask(made, kind, name="weight"):
    return made.values(name)[kind]()


def channels_last(layer, value):
    """All values of each channel: positions x channels."""
    spatial = 0 if isinstance(layer, nn.Linear) else value.dim() - len(layer.kernel_size) - 1
    moved = value.numpy() if isinstance(layer, nn.Linear) else np.moveaxis(value.numpy(), spatial, -1)
    return moved.reshape(-1, moved.shape[-1]).astype("float64")


def inputs_of(layer, weight_shape):
    """Which input channel each entry of the weight multiplies, counted out."""
    index = np.empty(weight_shape, dtype=int)
    groups = getattr(layer, "groups", 1)
    for place in np.ndindex(*weight_shape):
        if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
            index[place] = place[0]
        else:
            group = place[0] // (weight_shape[0] // groups)
            index[place] = group * weight_shape[1] + place[1]
    return index


def outputs_of(layer, weight_shape):
    """Which output channel each entry of the weight adds to, counted out."""
    index = np.empty(weight_shape, dtype=int)
    for place in np.ndindex(*weight_shape):
        if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
            group = place[0] // (weight_shape[0] // layer.groups)
            index[place] = group * weight_shape[1] + place[1]
        else:
            index[place] = place[0]
    return index


@pytest.mark.parametrize("name", LAYERS)
def test_activations_are_means_over_batches_and_positions(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make()
    made = statistics(layer, *ACTIVATIONS)
    seen, given = [], []
    for factor in (1.0, 2.0, 0.5):
        value = torch.randn(shape) * factor
        given.append(channels_last(layer, layer(value).detach()))
        seen.append(channels_last(layer, value))
    seen, given = np.concatenate(seen), np.concatenate(given)
    weight = layer.weight.shape
    expected = {
        "input_norm": np.sqrt((seen**2).mean(axis=0))[inputs_of(layer, weight)],
        "activation": np.abs(given).mean(axis=0)[outputs_of(layer, weight)],
        "positive_share": (given > 0).mean(axis=0)[outputs_of(layer, weight)],
    }
    for kind, values in expected.items():
        np.testing.assert_allclose(ask(made, kind).expand(weight).numpy(), values, rtol=1e-5, err_msg=kind)


@pytest.mark.parametrize("name", ["grouped", "transposed, grouped", "transposed"])
def test_a_weight_moves_the_outputs_that_the_counting_says(name):
    """The reference above counts channels out; here the layer itself says which entry touches which channel."""
    make, shape = LAYERS[name]
    layer = make()
    weight = layer.weight.shape
    inputs, outputs = inputs_of(layer, weight), outputs_of(layer, weight)
    value = torch.ones(shape)
    for place in np.ndindex(*weight):
        with torch.no_grad():
            layer.weight.zero_()
            layer.bias.zero_()
            layer.weight[place] = 1.0
            moved = layer(value).abs().sum(dim=(0, 2, 3)).nonzero().flatten().tolist()
            silent = value.clone()
            silent[:, inputs[place]] = 0.0
            assert moved == [outputs[place]]
            assert not layer(silent).any()


def test_inputs_given_by_keyword_count():
    layer, other = nn.Linear(3, 2), nn.Linear(3, 2)
    one, two = statistics(layer, "input_norm"), statistics(other, "input_norm")
    value = torch.randn(4, 3)
    layer(value)
    other(input=value)
    assert torch.equal(ask(one, "input_norm"), ask(two, "input_norm"))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_mean(reentrant):
    torch.manual_seed(0)
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.load_state_dict(first.state_dict())
    plain, recomputed = statistics(first, *ACTIVATIONS), statistics(second, *ACTIVATIONS)
    for _ in range(3):
        value = torch.randn(4, 3, requires_grad=True)
        first(value).sum().backward()
        checkpoint(second, value, use_reentrant=reentrant).sum().backward()
    for kind in ACTIVATIONS:
        torch.testing.assert_close(ask(recomputed, kind), ask(plain, kind))


def test_evaluation_is_not_gathered_and_eval_mode_in_training_is():
    layer = nn.Linear(3, 2)
    made = statistics(layer, "input_norm")
    for block in (torch.no_grad, torch.inference_mode):
        with block():
            layer(torch.full((4, 3), 1e6))
    layer.eval()  # as Hugging Face's `from_pretrained` gives it, and Lightning leaves it
    layer(torch.full((4, 3), 2.0))
    torch.testing.assert_close(ask(made, "input_norm"), torch.full((1, 3), 2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_wide(dtype):
    layer = nn.Linear(2, 2).to(dtype)
    made = statistics(layer, *ACTIVATIONS)
    for _ in range(300):  # in bfloat16 a sum of ones stops at 256
        layer(torch.ones(1, 2, dtype=dtype))
    torch.testing.assert_close(ask(made, "input_norm"), torch.ones(1, 2))


def test_means_are_since_the_last_reset():
    layer = nn.Linear(3, 2)
    made = statistics(layer, "input_norm")
    layer(torch.full((4, 3), 5.0))
    made.reset()
    with pytest.raises(CompressError, match="input_norm of 'weight', which has not run in training since the last"):
        ask(made, "input_norm")
    layer(torch.full((2, 3), 3.0))
    torch.testing.assert_close(ask(made, "input_norm"), torch.full((1, 3), 3.0))


# Gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_means_and_movement_is_a_sum_over_all_steps(dtype):
    random = np.random.default_rng(0)
    made = Statistics(["gradient", "squared_gradient", "movement"])
    weights, gradients = random.normal(size=(2, 6, 4, 3))
    rounded = [torch.tensor(array).to(dtype) for array in (weights, gradients)]
    weights, gradients = (array.double().numpy() for array in rounded)
    for step in range(4):
        made.add_gradient("a", rounded[0][step], rounded[1][step])
    exact = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(ask(made, "gradient", "a"), gradients[:4].mean(axis=0), **exact)
    np.testing.assert_allclose(ask(made, "squared_gradient", "a"), (gradients[:4] ** 2).mean(axis=0), **exact)
    np.testing.assert_allclose(ask(made, "movement", "a"), -(weights * gradients)[:4].sum(axis=0), **exact)
    made.reset()
    for step in (4, 5):
        made.add_gradient("a", rounded[0][step], rounded[1][step])
    np.testing.assert_allclose(ask(made, "gradient", "a"), gradients[4:].mean(axis=0), **exact)
    np.testing.assert_allclose(ask(made, "squared_gradient", "a"), (gradients[4:] ** 2).mean(axis=0), **exact)
    np.testing.assert_allclose(ask(made, "movement", "a"), -(weights * gradients).sum(axis=0), **exact)


def test_a_weight_without_a_gradient_is_named():
    made = Statistics(["gradient"])
    with pytest.raises(CompressError, match=r"the gradient of 'a', which has had none .* begin the window later"):
        ask(made, "gradient", "a")


def test_only_what_is_asked_for_is_gathered():
    layer = nn.Linear(3, 2)
    before = traces(layer)
    made = statistics(layer, "weight", "name", "gradient")
    assert traces(layer) == before
    made.add_gradient("weight", layer.weight, torch.ones(2, 3))
    assert list(made.sums) == ["gradient"]
    assert list(made.values("weight")) == ["gradient"]


# Traces


@pytest.mark.parametrize("kind", sorted(ACTIVATIONS))
def test_hooks_leave_no_trace(kind):
    net = nn.Sequential(nn.Linear(3, 3), nn.Conv1d(3, 3, 1))
    before = traces(net)
    made = Statistics([kind])
    for _ in range(2):  # attaching again replaces
        made.attach({"0.weight": net[0], "1.weight": net[1]})
    net[0](torch.ones(2, 3))
    assert traces(net) != before
    made.detach()
    assert traces(net) == before


def test_a_layer_of_two_names_is_counted_once():
    layer = nn.Linear(3, 2)
    made = Statistics(["input_norm"])
    made.attach({"a": layer, "b": layer})
    layer(torch.full((4, 3), 2.0))
    made.reduce()
    torch.testing.assert_close(ask(made, "input_norm", "a"), torch.full((1, 3), 2.0))
    made.detach()
    assert STATE not in vars(layer)


def through_a_file(module, folder):
    torch.save(module, folder / "module.pt")
    return torch.load(folder / "module.pt", weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [lambda m, f: copy.deepcopy(m), lambda m, f: pickle.loads(pickle.dumps(m)), through_a_file],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_between_steps_work_and_gather_for_themselves(copied, tmp_path: Path):
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    made = Statistics(ACTIVATIONS)
    made.attach({"0.weight": net[0]})
    net(torch.full((4, 3), 2.0))
    other = copied(net, tmp_path)
    assert torch.equal(other(torch.ones(1, 3)), net(torch.full((1, 3), 1.0)))
    other(torch.full((100, 3), 1e6))  # leaves the original's sums alone
    expected = (4 * 4.0 + 1.0) / 5
    torch.testing.assert_close(ask(made, "input_norm", "0.weight"), torch.full((1, 3), expected**0.5))
    made.detach()
    other(torch.ones(1, 3))


def test_exporting_between_steps_leaves_real_sums():
    """A tracer runs the forward with tensors that hold no numbers."""
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    made = Statistics(ACTIVATIONS)
    made.attach({"0.weight": net[0]})
    net(torch.full((4, 3), 2.0))
    torch.export.export(net, (torch.ones(2, 3),))
    net(torch.full((4, 3), 2.0))
    torch.testing.assert_close(ask(made, "input_norm", "0.weight"), torch.full((1, 3), 2.0))


# Checkpoints


def test_saved_sums_go_on_as_if_never_interrupted():
    torch.manual_seed(0)
    values, gradients = torch.randn(6, 4, 3), torch.randn(6, 2, 3)
    asked = [*ACTIVATIONS, "gradient", "squared_gradient", "movement"]

    def step(made, layer, index):
        layer(values[index])
        made.add_gradient("weight", layer.weight, gradients[index])

    layer = nn.Linear(3, 2)
    whole = statistics(layer, *asked)
    for index in range(3):
        step(whole, layer, index)
    state = copy.deepcopy(whole.state_dict())
    for index in range(3, 6):
        step(whole, layer, index)
    other = nn.Linear(3, 2)
    other.load_state_dict(layer.state_dict())
    resumed = statistics(other, *asked)
    resumed.load_state_dict(state, {"weight": other.weight})
    for index in range(3, 6):
        step(resumed, other, index)
    for kind in asked:
        assert torch.equal(ask(resumed, kind), ask(whole, kind)), kind


def test_a_saved_state_is_no_view_of_the_living_one():
    layer = nn.Linear(3, 2)
    made = statistics(layer, "gradient", "input_norm")
    layer(torch.ones(1, 3))
    made.add_gradient("weight", layer.weight, torch.ones(2, 3))
    state = made.state_dict()
    before = copy.deepcopy(state)
    made.add_gradient("weight", layer.weight, torch.ones(2, 3))
    layer(torch.ones(1, 3))
    assert torch.equal(state["gradients"]["gradient"]["weight"], before["gradients"]["gradient"]["weight"])
    assert torch.equal(state["activity"]["weight"]["input"], before["activity"]["weight"]["input"])
    assert state["steps"] == before["steps"]

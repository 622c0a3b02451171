"""Post-training quantization of real networks: the order of the methods, and what may change in a module."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress import CompressError, IncompatibleCallbacks, NothingToCompress, fake_quantized
from lightning_compress.demo_data import load_fashion_mnist
from lightning_compress.export.onnx import export_onnx, run_onnx
from lightning_compress.quantization.bias_correction import channel_means, correct_bias
from lightning_compress.quantization.calibration import calibrate
from lightning_compress.quantization.clipping import nearest
from lightning_compress.quantization.equalization import equalize
from lightning_compress.quantization.error_feedback import error_feedback
from lightning_compress.quantization.fake import round_weight
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.posttraining import Recipe, quantize_post_training, round_weights
from lightning_compress.quantization.ranges import mean_square_error, percentile
from lightning_compress.quantization.rounding import adaptive_rounding


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class SmallCnn(nn.Module):
    """Convolutions with and without bias and norm, a depthwise one, and two Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 5, 2, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.hidden, self.head = nn.Linear(32 * 7 * 7, 64), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.hidden(self.body(images)).relu())


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[Tensor], Tensor, Tensor]:
    """A CNN after three epochs of the embedded Fashion-MNIST, calibration batches, test images and labels."""
    torch.manual_seed(0)
    (images, labels), test = (data.tensors for data in load_fashion_mnist())
    net = SmallCnn()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(3):
        for batch in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    return net.eval(), list(images[:256].split(64)), *test


@pytest.fixture
def net(trained) -> nn.Module:
    return copy.deepcopy(trained[0])


def error(net: nn.Module, ranges: dict[str, Range], images: Tensor, wanted: Tensor) -> float:
    with torch.no_grad(), fake_quantized(net, ranges):
        return float((net(images) - wanted).square().sum() / wanted.square().sum())


def logits(net: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return net(images)


def test_at_four_bits_feedback_and_learned_rounding_are_below_nearest(trained) -> None:
    dense, batches, images, _ = trained
    wanted, errors = logits(dense, images), {}
    for method in (None, nearest, error_feedback, adaptive_rounding):
        net = copy.deepcopy(dense)
        ranges = quantize_post_training(net, batches, weight_bits=4, method=method)
        errors[method] = error(net, ranges, images, wanted)
    least = min(errors[None], errors[nearest])  # by abs-max, and by the scale of least error
    assert errors[error_feedback] < 0.75 * least
    assert errors[adaptive_rounding] < 0.75 * least


def test_eight_bits_keep_the_accuracy(trained, net) -> None:
    dense, batches, images, labels = trained
    ranges = quantize_post_training(net, batches)
    with torch.no_grad(), fake_quantized(net, ranges):
        rounded = net(images).argmax(1)
    float_choice = logits(dense, images).argmax(1)
    assert (float_choice == labels).float().mean() > 0.7  # 0.748 on one processor
    assert (rounded == float_choice).float().mean() > 0.97


def test_by_default_only_ranges_are_made(trained, net) -> None:
    dense, batches, _, _ = trained
    ranges = quantize_post_training(net.train(), batches, weight_bits=4, input_bits=6)
    assert net.training
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in dense.state_dict().items())
    assert set(ranges) == {"body.0", "body.3", "body.6", "hidden"}
    assert {(r.bits, r.weight_bits) for r in ranges.values()} == {(6, 4)}
    assert ranges["body.6"].low == 0.0, "behind a ReLU"
    assert ranges == calibrate(net, batches, 6, 4)


@pytest.mark.parametrize("method", [nearest, error_feedback, adaptive_rounding])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_lie_on_the_grid_that_the_ranges_consumers_use(trained, net, method, bits: int) -> None:
    _, batches, images, _ = trained
    before = copy.deepcopy(net.state_dict())
    if method is adaptive_rounding:
        method = functools.partial(adaptive_rounding, steps=20)
    ranges = quantize_post_training(net, batches[:1], bits, method=method)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.weight" for name in ranges}
    for name in ranges:
        weight = net.get_submodule(name).weight.detach()
        assert torch.equal(round_weight(weight, bits), weight)
        assert torch.isfinite(weight).all()
        assert weight.unique().numel() > 1
    with torch.no_grad():
        inside = {name: Range(r.low, r.high, 8, bits) for name, r in ranges.items()}
        with fake_quantized(net, inside):
            rounded = net(images[:4])
        codes_again = copy.deepcopy(net)
        for name in ranges:
            layer = codes_again.get_submodule(name)
            layer.weight.copy_(round_weight(layer.weight, bits))
        with fake_quantized(codes_again, inside):
            assert torch.equal(codes_again(images[:4]), rounded)


def test_the_onnx_file_holds_what_was_rounded(trained, net, tmp_path) -> None:
    _, batches, images, _ = trained
    recipe = Recipe(equalized=True, rounding=error_feedback, rule=percentile, bias_corrected=True)
    ranges = quantize_post_training(net, batches, weight_bits=4, method=recipe)
    path = export_onnx(net, tmp_path / "int8.onnx", (images[:32],), ranges=ranges)
    with torch.no_grad(), fake_quantized(net, ranges):
        expected = net(images[:32]).argmax(1).numpy()
    assert (run_onnx(path, images[:32].numpy())[0].argmax(1) == expected).mean() >= 0.96


def test_equalization_keeps_the_trained_function(trained, net) -> None:
    dense, batches, images, _ = trained
    assert [chain.second for chain in equalize(net, batches[0])] == ["body.3", "body.6", "hidden", "head"]
    wanted = logits(dense, images)
    assert (logits(net, images) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


# Bias correction


def test_correction_makes_the_means_equal(trained, net) -> None:
    dense, batches, images, _ = trained
    ranges = quantize_post_training(net, batches, weight_bits=3)
    wanted_error = error(net, ranges, images, logits(dense, images))
    names = list(ranges)
    float_outputs = channel_means(dense, batches, {name: dense.get_submodule(name) for name in names})
    taken = correct_bias(net, batches, ranges)
    assert set(taken) == set(names)
    with fake_quantized(net, ranges):
        means = channel_means(net, batches, {name: net.get_submodule(name) for name in names})
    for name in ("body.6", "hidden"):  # with a bias: the output itself
        np.testing.assert_allclose(means[name], float_outputs[name], atol=1e-4)
    for name, norm in (("body.0", "body.1"), ("body.3", "body.4")):  # with a norm: what it subtracts
        moved = net.get_submodule(norm).running_mean - dense.get_submodule(norm).running_mean
        np.testing.assert_allclose(moved, taken[name], atol=1e-5)
        np.testing.assert_allclose(means[name] - moved, float_outputs[name], atol=1e-4)
    assert error(net, ranges, images, logits(dense, images)) < wanted_error


@pytest.mark.parametrize("rounding", [None, nearest, error_feedback])
def test_the_means_are_those_of_the_float_network_also_after_rounding_in_place(trained, net, rounding) -> None:
    dense, batches, _, _ = trained
    ranges = quantize_post_training(net, batches, 3, method=Recipe(rounding=rounding, bias_corrected=True))
    wanted = channel_means(dense, batches, {"hidden": dense.hidden})["hidden"]
    with fake_quantized(net, ranges):
        means = channel_means(net, batches, {"hidden": net.hidden})["hidden"]
    np.testing.assert_allclose(means, wanted, atol=1e-4)


def test_correction_of_one_layer_by_hand() -> None:
    inputs = np.random.default_rng(0).uniform(0, 3, (50, 4)).astype(np.float32)
    layer = nn.Linear(4, 3)
    weight, bias = layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()
    net, batches = nn.Sequential(layer), [torch.from_numpy(part) for part in np.split(inputs, [20])]
    ranges = calibrate(net, batches, 3, 3, include="0")
    taken = correct_bias(net, batches, ranges)["0"].numpy()
    scale = np.abs(weight).max(1, keepdims=True) / 3
    step = inputs.max() / 7
    change = np.round(inputs / step) * step @ (np.round(weight / scale) * scale).T - inputs @ weight.T
    np.testing.assert_allclose(taken, change.mean(0), atol=1e-5)
    np.testing.assert_allclose(layer.bias.detach().numpy(), bias - taken, atol=1e-6)


def test_a_layer_with_neither_bias_nor_norm_is_left_and_missing_in_the_answer() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    batches = [torch.randn(8, 4)]
    keys = list(net.state_dict())
    assert list(correct_bias(net, batches, calibrate(net, batches, weight_bits=2))) == ["2"]
    assert list(net.state_dict()) == keys


def test_correction_names_bad_input() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="at least one batch"):
        correct_bias(net, [], {"0": Range(0.0, 1.0)})
    with pytest.raises(CompressError, match="mean output of '0'"):
        correct_bias(net, [torch.full((1, 2), float("nan"))], {"0": Range(0.0, 1.0)})
    idle = nn.Sequential(nn.Identity())
    idle[0].unused = nn.Linear(2, 2)
    with pytest.raises(NothingToCompress, match="none of the layers"):
        correct_bias(idle, [torch.ones(1, 2)], {"0.unused": Range(0.0, 1.0)})


# Rounding a module


def test_later_layers_are_calibrated_on_rounded_ones_and_one_hessian_lives_at_a_time() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 2))
    inputs, seen = torch.randn(64, 6), []

    def method(weight: Tensor, hessian: Tensor, bits: int) -> Tensor:
        seen.append(hessian.clone())
        return nearest(weight, hessian, bits)

    assert list(round_weights(net, [inputs], method, 3)) == ["0", "2"]
    hidden = net[0](inputs).relu().detach()
    torch.testing.assert_close(seen[0][0], 2 * inputs.T @ inputs / 64)
    torch.testing.assert_close(seen[1][0], 2 * hidden.T @ hidden / 64)
    assert not any("_input_hessian" in layer.__dict__ for layer in net.modules())


def test_a_weight_tied_to_an_embedding_stays_and_a_shared_one_is_rounded_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(10, 2)
            self.out.weight, self.two.weight = self.table.weight, self.one.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.out(self.two(self.one(self.table(tokens)).relu())))

    net = Tied()
    table = net.table.weight.detach().clone()
    errors = round_weights(net, [torch.randint(10, (4, 5))], error_feedback)
    assert list(errors) == ["one"]
    assert torch.equal(net.table.weight, table)
    assert net.two.weight is net.one.weight


def test_bad_input_is_named_before_anything_changes(trained, net) -> None:
    _, batches, images, _ = trained
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="at least one batch"):
        quantize_post_training(net, [])
    for widths in ({"weight_bits": 9}, {"input_bits": 1}, {"weight_bits": 4.0}):
        with pytest.raises(ValueError, match="2 to 8, got"):
            quantize_post_training(net, batches, **widths)
    recipe = Recipe(equalized=True, rounding=error_feedback, bias_corrected=True)
    with pytest.raises(CompressError, match=r"NaN or infinity into 'body\.0' in its call 1"):
        quantize_post_training(net, [images[:4], images[:4] / 0], method=recipe)
    with pytest.raises(ValueError, match=r"exclude pattern 'bodi' matches no module; near names: .*body"):
        quantize_post_training(net, batches, exclude="bodi")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.spare = nn.Linear(2, 2)
    net.last = nn.Linear(2, 2)
    with pytest.raises(CompressError, match=r"no input of \['spare'\]"):
        quantize_post_training(net, batches, method=recipe)
    with pytest.raises(CompressError, match=r"\['spare'\] never run"):
        round_weights(net, batches, nearest)
    torch.nn.utils.parametrize.register_parametrization(net.hidden, "weight", nn.Identity())
    with pytest.raises(IncompatibleCallbacks, match=r"hidden\.weight"):
        quantize_post_training(net, batches)


def test_rounding_errors_name_their_layer(net, trained) -> None:
    grouped = functools.partial(error_feedback, group=5)
    with pytest.raises(ValueError, match="'hidden' cannot be rounded: group=5 does not divide"):
        round_weights(net, trained[1], grouped, include="hidden")


@pytest.mark.parametrize("rule", [percentile, mean_square_error])
def test_rules_narrow_the_ranges_at_few_bits(trained, net, rule) -> None:
    _, batches, images, _ = trained
    wanted = logits(net, images)
    wide = quantize_post_training(net, batches, input_bits=3)
    narrow = quantize_post_training(net, batches, input_bits=3, method=Recipe(rule=rule))
    assert all(narrow[name].high <= wide[name].high for name in wide)
    assert error(net, narrow, images, wanted) < error(net, wide, images, wanted)

"""One and two bits and DoReFa, against their papers' formulas by hand: loops in double precision, weight by weight."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.quantization.dorefa import DoReFaInputs, DoReFaWeights, unit_steps
from lightning_compress.quantization.fake import fake_quantize_input
from lightning_compress.quantization.lowbit import Binary, Ternary, TrainedTernary, mean_size

quick = settings(max_examples=40, deadline=None)
INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
dynamo_warns = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # at itself
GRIDS = [
    Binary(),
    Binary(per_channel=False, paper_gradient=True),
    Binary(paper_gradient=True),
    Ternary(),
    Ternary(per_channel=True),
    TrainedTernary(),
    TrainedTernary(0.3),
    DoReFaWeights(2),
    DoReFaWeights(4),
    DoReFaWeights(7),
    DoReFaWeights(8),
]


@st.composite
def weights(draw):
    """(out, in) float32 with zeros, equal sizes, and a channel of its own size each; a gradient from above."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 12)))
    weight = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.05, 1.0, 30.0]))
    weight = weight * torch.logspace(-1, 1, shape[0])[:, None]
    if draw(st.booleans()):
        weight[torch.rand(shape, generator=generator) < 0.4] = 0.0
    return weight, torch.randn(shape, generator=generator)


def ours(grid, weight, upstream):
    leaf = weight.clone().requires_grad_()
    learned = {name: tensor.clone().requires_grad_() for name, tensor in grid.learned(weight).items()}
    rounded = grid.rounded(leaf, learned)
    rounded.backward(upstream)
    return rounded.detach().numpy(), leaf.grad.numpy(), {name: tensor.grad.item() for name, tensor in learned.items()}


def rows(weight, per_channel):
    """The sets of positions that share a scale."""
    out, inputs = weight.shape
    everything = [(i, j) for i in range(out) for j in range(inputs)]
    return [[place for place in everything if place[0] == i] for i in range(out)] if per_channel else [everything]


@quick
@given(weights(), st.booleans(), st.booleans())
def test_binary_weights_and_gradients_are_the_papers(case, per_channel, paper_gradient):
    weight, upstream = case
    got, gradient, _ = ours(Binary(per_channel, paper_gradient), weight, upstream)
    w, g = weight.double().numpy(), upstream.double().numpy()
    for places in rows(w, per_channel):
        scale = sum(abs(w[p]) for p in places) / len(places)  # XNOR-Net, equation 6
        for p in places:
            assert got[p] == pytest.approx(scale if w[p] >= 0 else -scale, rel=1e-5)
            inside = 1.0 if abs(w[p]) <= 1.0 else 0.0
            want = g[p] * (1.0 / len(places) + scale * inside) if paper_gradient else g[p] * inside
            assert gradient[p] == pytest.approx(want, rel=1e-4)


@quick
@given(weights(), st.booleans())
def test_ternary_weights_are_the_papers_and_the_gradient_is_the_identitys(case, per_channel):
    weight, upstream = case
    got, gradient, _ = ours(Ternary(per_channel), weight, upstream)
    w = weight.double().numpy()
    for places in rows(w, per_channel):
        threshold = 0.7 * sum(abs(w[p]) for p in places) / len(places)
        if min(abs(abs(w[p]) - threshold) for p in places) < 1e-5 * threshold:
            continue
        beyond = [abs(w[p]) for p in places if abs(w[p]) > threshold]
        scale = sum(beyond) / len(beyond) if beyond else 0.0
        for p in places:
            assert got[p] == pytest.approx(math.copysign(scale, w[p]) if abs(w[p]) > threshold else 0.0, rel=1e-5)
    assert np.array_equal(gradient, upstream.numpy())


def test_the_ternary_scale_fits_best_of_all_for_its_threshold():
    torch.manual_seed(0)
    weight = torch.randn(1, 500)
    rounded = Ternary().rounded(weight, {})
    error = (weight - rounded).square().sum()
    for factor in (0.98, 1.02):
        assert (weight - rounded * factor).square().sum() > error


@quick
@given(weights(), st.sampled_from([0.05, 0.3]))
def test_trained_ternary_weights_and_all_gradients_are_the_papers(case, share):
    weight, upstream = case
    grid = TrainedTernary(share)
    got, gradient, learned = ours(grid, weight, upstream)
    w, g = weight.double().numpy(), upstream.double().numpy()
    threshold = share * np.abs(w).max()
    positive, negative = w > threshold * (1 + 1e-7), w < -threshold * (1 + 1e-7)
    start = grid.learned(weight)
    p, n = float(start["positive"]), float(start["negative"])
    assert p == pytest.approx(np.abs(w[positive]).mean() if positive.any() else 0.0, rel=1e-5)
    assert n == pytest.approx(np.abs(w[negative]).mean() if negative.any() else 0.0, rel=1e-5)
    np.testing.assert_allclose(got, np.where(positive, p, np.where(negative, -n, 0.0)), rtol=1e-6)
    np.testing.assert_allclose(gradient, g * np.where(positive, p, np.where(negative, n, 1.0)), rtol=1e-5)
    assert learned["positive"] == pytest.approx(g[positive].sum(), rel=1e-4, abs=1e-5)
    assert learned["negative"] == pytest.approx(-g[negative].sum(), rel=1e-4, abs=1e-5)


@quick
@given(weights(), st.integers(2, 8))
def test_dorefa_weights_and_gradients_are_the_papers(case, bits):
    weight, upstream = case
    got, gradient, _ = ours(DoReFaWeights(bits), weight, upstream)
    w, g, top = weight.double().numpy(), upstream.double().numpy(), 2**bits - 1
    t = np.tanh(w)
    largest = np.abs(t).max()
    if largest == 0.0:
        assert (got == 0).all()
        return
    position = (t / (2 * largest) + 0.5) * top
    clear = np.abs(position % 1 - 0.5) > 1e-3
    want = np.where(w == 0.0, 0.0, 2 * np.round(position) / top - 1)  # section 2.3
    np.testing.assert_allclose(got[clear], want[clear], rtol=1e-5, atol=1e-6)
    ties = np.abs(np.abs(torch.tanh(weight).numpy()) - np.abs(torch.tanh(weight).numpy()).max()) == 0
    through_maximum = np.where(ties, np.sign(t) * (g * t).sum() / largest**2 / ties.sum(), 0.0)
    slope = (g / largest - through_maximum) * (1 - t * t)
    np.testing.assert_allclose(gradient, slope, rtol=2e-3, atol=2e-3 * float(np.abs(g).sum()))


@quick
@given(st.integers(2, 8), st.integers(0, 10**6))
def test_dorefa_inputs_are_the_papers(bits, seed):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([0.0, -0.0, 1.0, 1e-40, INF, -INF])
    value = torch.cat([torch.rand(300, generator=generator) * 2 - 0.5, ends]).requires_grad_()
    upstream, top = torch.randn(value.shape, generator=generator), 2**bits - 1
    grid, (low, high) = DoReFaInputs(bits), torch.tensor([-9.0, 9.0])
    got = grid.rounded(value, low, high, grid.learned(low, high))
    got.backward(upstream)
    clipped = value.detach().double().clamp(0, 1)
    clear = ((clipped * top) % 1 - 0.5).abs() > 1e-4
    want = (clipped * top).round() / top  # section 2.2
    torch.testing.assert_close(got.detach().double()[clear], want[clear], rtol=1e-6, atol=1e-7)
    value_in = (value >= 0) & (value <= 1)
    assert torch.equal(value.grad, torch.where(value_in, upstream, 0.0))
    assert torch.equal(got.detach(), fake_quantize_input(value.detach(), *grid.affine(low, high, {}), bits))


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_times_scale_is_the_rounded_weight_and_zeros_stay(grid, dtype):
    torch.manual_seed(0)
    weight = (torch.randn(4, 6, 3) * torch.tensor([0.0, 0.1, 1.0, 3.0]).view(-1, 1, 1)).to(dtype)
    weight[:, ::2] = 0.0
    learned = grid.learned(weight)
    rounded = grid.rounded(weight, learned)
    assert (rounded.shape, rounded.dtype) == (weight.shape, dtype)
    assert len(rounded.unique()) > 1
    if not isinstance(grid, Binary):
        assert (rounded[weight == 0] == 0).all()
    found = grid.codes(weight, learned)
    assert (found is None) == (isinstance(grid, TrainedTernary) or grid == DoReFaWeights(8))
    if found is not None:
        codes, scale = found
        assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (4,))
        assert (scale > 0).all()
        assert torch.equal((codes * scale.view(-1, 1, 1)).to(dtype), rounded)


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 3), (2, 2, 1, 1)], ids=str)
def test_empty_and_all_zero_weights(grid, shape):
    weight = torch.zeros(shape, requires_grad=True)
    learned = {name: tensor.requires_grad_() for name, tensor in grid.learned(weight).items()}
    rounded = grid.rounded(weight, learned)
    rounded.sum().backward()
    assert torch.equal(rounded, weight)
    assert torch.isfinite(weight.grad).all()
    found = grid.codes(weight, learned)
    if found is not None:
        assert found[0].shape == shape
        assert (found[0] == 0).all() or isinstance(grid, DoReFaWeights)
        assert (found[1] > 0).all()


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_denormal_weights_stay_finite_and_nan_stays_visible(grid):
    denormal = torch.tensor([[1e-40, -1e-42], [1e-38, 1e-45]])
    assert torch.isfinite(grid.rounded(denormal, grid.learned(denormal))).all()
    broken = torch.tensor([[NAN, 1.0]])
    assert torch.isnan(grid.rounded(broken, grid.learned(broken))).any()


@pytest.mark.parametrize("grid", [*GRIDS, DoReFaInputs(3)], ids=repr)
@dynamo_warns
def test_compiled_and_exported_values_are_equal_and_gradients_close(grid):
    torch.manual_seed(0)
    weight, upstream = torch.randn(5, 7), torch.randn(5, 7)
    weight[0] = 0.0
    if isinstance(grid, DoReFaInputs):
        low, high = torch.tensor(0.0), torch.tensor(1.0)
        learned, form = {}, lambda value, _: grid.rounded(value, low, high, {})
    else:
        learned, form = grid.learned(weight), grid.rounded

    def run(function):
        leaf = weight.clone().requires_grad_()
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in learned.items()}
        result = function(leaf, leaves)
        result.backward(upstream)
        return result.detach(), [leaf.grad, *(tensor.grad for tensor in leaves.values())]

    torch.compiler.reset()  # each grid is another function with the same code, and Dynamo counts those
    eager, gradients = run(form)
    compiled, compiled_gradients = run(torch.compile(form, backend="aot_eager", fullgraph=True))
    assert torch.equal(eager, compiled)
    for one, other in zip(gradients, compiled_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(form(weight, learned), eager)

    class Rounding(torch.nn.Module):
        def forward(self, value, tensors):
            return form(value, tensors)

    program = torch.export.export(Rounding(), (weight, learned))
    assert torch.equal(program.module()(weight, learned), eager)


def test_shapes_and_dtypes_of_inputs():
    for dtype in DTYPES:
        for shape in ((), (0,), (2, 0), (2, 3)):
            value = torch.rand(shape).to(dtype)
            rounded = unit_steps(value, 4)
            assert (rounded.shape, rounded.dtype) == (value.shape, dtype)
    assert torch.isnan(unit_steps(torch.tensor(NAN), 4))


def test_options_out_of_range_are_named():
    for grid in (DoReFaWeights, DoReFaInputs):
        with pytest.raises(ValueError, match="whole number from 2 to 8"):
            grid(1)
    for share in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=r"part of the largest weight, in \(0, 1\)"):
            TrainedTernary(share)
    assert [grid.bits for grid in (Binary(), Ternary(), TrainedTernary(), DoReFaWeights(3))] == [1, 2, 2, 3]


def test_mean_size_of_a_layer_counts_all_its_weights():
    assert mean_size(torch.tensor([[1.0, -3.0], [0.0, 0.0]]), per_channel=False) == 1.0

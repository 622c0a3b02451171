"""LSQ, LSQ+ and PACT against their papers' equations in double precision by hand, and against ATen's learnable op."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.quantization.fake import fake_quantize_input
from lightning_compress.quantization.grid import SMALLEST_SCALE
from lightning_compress.quantization.learned_steps import (
    LSQ,
    PACT,
    LSQPlus,
    learned_affine,
    learned_step,
    pact,
)

quick = settings(max_examples=60, deadline=None)
INF, NAN = float("inf"), float("nan")
ATEN = torch._fake_quantize_learnable_per_tensor_affine
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
dynamo_warns = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # at itself


@st.composite
def signed_cases(draw):
    """Values inside, outside, between and exactly on the points and ends of a signed grid; a gradient from above."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    bits = draw(st.integers(2, 8))
    step = torch.tensor(draw(st.floats(0.0009765625, 8.0, width=32)))
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    spread = torch.randn(300, generator=generator) * step * highest
    halves = torch.arange(2 * lowest - 3, 2 * highest + 4) / 2 * step
    value = torch.cat([spread, halves, torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e30, INF, -INF])])
    return value, step, lowest, highest, torch.randn(value.shape, generator=generator)


def positions(value, step, shift=0.0):
    """(value - shift) / step in float32, which decides on which side of a tie a value is; the rest in double."""
    return ((value - shift) / step).double()


def lsq_by_the_paper(value, step, lowest, highest, upstream):
    """Esser et al. 2020, equations 1, 2 (values), 5 (gradient of the value) and 3 (of the step)."""
    v = positions(value, step)
    rounded = v.clamp(lowest, highest).round() * step.double()
    inside = (v > lowest) & (v < highest)
    slope = torch.where(inside, -v + v.round(), torch.where(v <= lowest, float(lowest), float(highest)))
    return rounded, torch.where(inside, upstream.double(), 0.0), (upstream.double() * slope).sum()


def differentiated(function, value, parameters, upstream, *rest, **options):
    leaves = [tensor.clone().requires_grad_() for tensor in (value, *parameters)]
    result = function(*leaves, *rest, **options)
    result.backward(upstream)
    return result.detach(), *(leaf.grad for leaf in leaves)


@quick
@given(signed_cases(), st.floats(0.001, 1.0))
def test_lsq_is_the_papers_equations(case, factor):
    value, step, lowest, highest, upstream = case
    want, value_gradient, step_gradient = lsq_by_the_paper(*case)
    got, got_value, got_step = differentiated(learned_step, value, [step], upstream, lowest, highest, factor)
    assert torch.equal(got.double(), want.float().double())
    assert torch.equal(got_value.double(), value_gradient)
    bound = 1e-5 * float(upstream.abs().sum()) * 2**7
    assert got_step.item() == pytest.approx(step_gradient.item() * factor, rel=1e-4, abs=bound)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("index", range(40))
def test_one_weight_equals_atens_learnable_operator_to_the_bit(bits, index):
    """Steps are powers of two, since ATen multiplies by the reciprocal. It gates the gradient half a step later."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(1000 * bits + index)
    step = torch.tensor([2.0 ** float(torch.randint(-6, 3, (1,), generator=generator))])
    value = torch.randn(1, generator=generator) * step * highest
    position = float(value / step)
    if lowest - 0.5 <= position <= lowest or highest <= position <= highest + 0.5:
        value = value * 3
    upstream = torch.randn(1, generator=generator)
    got = differentiated(learned_step, value, [step], upstream, lowest, highest)
    want = differentiated(ATEN, value, [step, torch.zeros(1)], upstream, lowest, highest, 1.0)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[2], want[2])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_many_weights_equal_atens_learnable_operator(bits):
    torch.manual_seed(bits)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    step = torch.tensor([0.125])
    value = torch.randn(4000) * step * highest
    position = value / step
    kept = ~(
        ((position >= lowest - 0.5) & (position <= lowest)) | ((position >= highest) & (position <= highest + 0.5))
    )
    value, upstream = value[kept], torch.randn(int(kept.sum()))
    got = differentiated(learned_step, value, [step], upstream, lowest, highest)
    want = differentiated(ATEN, value, [step, torch.zeros(1)], upstream, lowest, highest, 1.0)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[2], want[2], rtol=1e-4, atol=1e-3)  # sums in another order


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(8, 30), (6, 3, 3, 3)], ids=str)
def test_the_first_step_and_the_gradient_scale_are_the_papers(bits, shape):
    torch.manual_seed(0)
    weight, upstream, top = torch.randn(shape), torch.randn(shape), 2 ** (bits - 1) - 1
    array = weight.double().numpy()
    step = LSQ(bits).learned(weight)["step"]
    assert step.shape == ()
    assert step.item() == pytest.approx(2 * np.abs(array).mean() / math.sqrt(top), rel=1e-6)
    channels = LSQ(bits, per_channel=True).learned(weight)["step"]
    by_hand = 2 * np.abs(array.reshape(shape[0], -1)).mean(axis=1) / math.sqrt(top)
    np.testing.assert_allclose(channels.numpy(), by_hand, rtol=1e-6)

    leaf = step.clone().requires_grad_()
    LSQ(bits).rounded(weight, {"step": leaf}).backward(upstream)
    _, _, plain = lsq_by_the_paper(weight, step, -top - 1, top, upstream)
    assert leaf.grad.item() == pytest.approx(plain.item() / math.sqrt(weight.numel() * top), rel=1e-4, abs=1e-5)

    leaf = channels.clone().requires_grad_()
    LSQ(bits, per_channel=True).rounded(weight, {"step": leaf}).backward(upstream)
    for row in range(shape[0]):  # each channel is a layer of its own
        _, _, plain = lsq_by_the_paper(weight[row], channels[row], -top - 1, top, upstream[row])
        assert leaf.grad[row].item() == pytest.approx(
            plain.item() / math.sqrt(weight[0].numel() * top), rel=1e-4, abs=1e-5
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", [LSQ(4), LSQ(2, per_channel=True), LSQ(8)], ids=repr)
def test_codes_times_scale_is_the_rounded_weight_and_zeros_stay(grid, dtype):
    torch.manual_seed(0)
    weight = (torch.randn(5, 4, 3) * torch.tensor([0.0, 1e-20, 0.1, 1.0, 100.0]).view(-1, 1, 1)).to(dtype)
    weight[:, ::2] = 0.0
    learned = grid.learned(weight)
    rounded = grid.rounded(weight, learned)
    codes, scale = grid.codes(weight, learned)
    assert (rounded.shape, rounded.dtype) == (weight.shape, dtype)
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (5,))
    assert torch.equal((codes * scale.view(-1, 1, 1)).to(dtype), rounded)
    assert (rounded[weight == 0] == 0).all()
    assert codes.min() >= -(2 ** (grid.bits - 1))
    assert codes.max() <= 2 ** (grid.bits - 1) - 1
    assert len(codes.unique()) > 2


def test_empty_and_all_zero_weights():
    for grid in (LSQ(4), LSQ(4, per_channel=True)):
        for shape in ((0, 3), (3, 0), (2, 3)):
            weight = torch.zeros(shape, requires_grad=True)
            learned = {name: tensor.requires_grad_() for name, tensor in grid.learned(weight).items()}
            assert (learned["step"] == 1.0).all()
            rounded = grid.rounded(weight, learned)
            rounded.sum().backward()
            assert torch.equal(rounded, weight)
            assert torch.isfinite(learned["step"].grad).all()
            assert grid.codes(weight, learned)[1].shape == (shape[0],)


def test_a_step_that_was_pushed_below_zero_comes_back():
    step = torch.tensor(-0.01, requires_grad=True)
    rounded = learned_step(torch.tensor([1.0, 2.0]), step, -8, 7)
    assert rounded.tolist() == pytest.approx([7 * SMALLEST_SCALE] * 2)
    (rounded - 1.0).square().sum().backward()
    assert step.grad < 0  # a descent makes it larger


@st.composite
def affine_cases(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    bits = draw(st.integers(2, 8))
    step = torch.tensor(draw(st.floats(0.0009765625, 8.0, width=32)))
    offset = torch.tensor(draw(st.floats(-1.25, 0.25, width=32))) * step * (2**bits - 1)
    spread = torch.randn(300, generator=generator) * step * 2**bits
    halves = torch.arange(-(2 ** (bits + 2)), 2 ** (bits + 2)) / 2 * step
    value = torch.cat([spread, halves, halves + offset, torch.tensor([0.0, -0.0, 1e-40, INF, -INF])])
    return value, step, offset, bits, torch.randn(value.shape, generator=generator)


def lsq_plus_by_the_paper(value, step, shift, lowest, top, upstream):
    """Bhalgat et al. 2020, for codes from `lowest`, counted from the offset."""
    v = positions(value, step, shift)
    inside = (v > lowest) & (v < lowest + top)
    code = v.clamp(lowest, lowest + top).round()
    step_slope = torch.where(inside, code - v, torch.where(v <= lowest, 0.0, float(top)))
    up = upstream.double()
    return (
        code * step.double() + float(shift),
        torch.where(inside, up, 0.0),
        (up * step_slope).sum(),
        up[~inside].sum(),
    )


@quick
@given(affine_cases(), st.booleans())
def test_lsq_plus_is_the_papers_equations(case, whole_zero):
    value, step, offset, bits, upstream = case
    top = 2**bits - 1
    lowest = max(min(float((offset / step).round()), 0.0), -top) if whole_zero else 0.0
    shift = 0.0 if whole_zero else offset
    want = lsq_plus_by_the_paper(value, step, shift, lowest, top, upstream)
    got = differentiated(learned_affine, value, [step, offset], upstream, bits, 0.5, whole_zero=whole_zero)
    rounding = 2.0**-23 * (top * float(step) + abs(float(offset)))  # of a float32 sum whose terms nearly cancel
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=rounding)
    assert torch.equal(got[1].double(), want[1])
    bound = 1e-5 * float(upstream.abs().sum()) * 2**8
    assert got[2].item() == pytest.approx(want[2].item() / 2, rel=1e-4, abs=bound)
    assert got[3].item() == pytest.approx(want[3].item() / 2, rel=1e-4, abs=1e-4)
    if whole_zero:  # what is exported is what was trained
        zero_point = torch.tensor(-lowest)
        assert torch.equal(got[0], fake_quantize_input(value, step, zero_point, bits))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_plus_with_a_whole_zero_equals_atens_learnable_operator(bits):
    """ATen learns the zero point z; with offset -z step its gradient is -step times ours, and a part of the step's."""
    torch.manual_seed(bits)
    step, zero_point, top = torch.tensor([0.125]), torch.tensor([float(2**bits // 3)]), 2**bits - 1
    value = torch.randn(4000) * step * top
    position = value / step + zero_point
    kept = ~(((position >= -0.5) & (position <= 0)) | ((position >= top) & (position <= top + 0.5)))
    value, upstream = value[kept], torch.randn(int(kept.sum()))
    got = differentiated(learned_affine, value, [step, -zero_point * step], upstream, bits)
    want = differentiated(ATEN, value, [step, zero_point], upstream, 0, top, 1.0)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(-step * got[3], want[3], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(got[2] - zero_point * got[3], want[2], rtol=1e-3, atol=1e-2)


def test_lsq_plus_begins_with_the_observed_range():
    low, high = torch.tensor(-1.0), torch.tensor(2.0)
    grid = LSQPlus(2)
    assert grid.learned(low, high) == {"step": torch.tensor(1.0), "offset": torch.tensor(-1.0)}
    assert LSQPlus(2).learned(torch.tensor(0.5), high)["offset"] == 0.0  # a range holds zero
    assert list(LSQPlus(2, learn_offset=False).learned(low, high)) == ["step"]
    scale, zero_point = grid.affine(low, high, grid.learned(low, high))
    assert (scale.item(), zero_point.item()) == (1.0, 1.0)
    assert LSQPlus(2, whole_zero=False).affine(low, high, grid.learned(low, high)) is None
    empty = grid.learned(torch.tensor(0.0), torch.tensor(0.0))
    assert grid.rounded(torch.zeros(3), low, high, empty).tolist() == [0.0] * 3


def test_the_gradient_scale_of_inputs_counts_one_examples_values():
    low, high, value = torch.tensor(0.0), torch.tensor(1.0), torch.rand(7, 3, 5) * 2
    for grid in (LSQPlus(3), LSQPlus(3, learn_offset=False)):
        learned = {name: tensor.requires_grad_() for name, tensor in grid.learned(low, high).items()}
        rounded = grid.rounded(value, low, high, learned)
        rounded.sum().backward()
        _, _, step, offset = lsq_plus_by_the_paper(value, learned["step"].detach(), 0.0, 0, 7, torch.ones(value.shape))
        assert learned["step"].grad.item() == pytest.approx(step.item() / math.sqrt(15 * 7), rel=1e-4)
        if grid.learn_offset:
            assert learned["offset"].grad.item() == pytest.approx(offset.item() / math.sqrt(15 * 7), rel=1e-4)
        assert torch.equal(rounded, fake_quantize_input(value, *grid.affine(low, high, learned), 3))


@quick
@given(st.integers(2, 8), st.floats(0.015625, 20.0, width=32), st.integers(0, 10**6))
def test_pact_is_the_papers_equations(bits, clip, seed):
    clip, top = torch.tensor(clip), 2**bits - 1
    generator = torch.Generator().manual_seed(seed)
    value = torch.cat([torch.randn(200, generator=generator) * clip, torch.tensor([0.0, -0.0, 1e-40, INF, -INF, clip])])
    upstream = torch.randn(value.shape, generator=generator)
    got = differentiated(pact, value, [clip], upstream, bits)
    finite = value.double().clamp(-1e30, 1e30)
    clipped = 0.5 * (finite.abs() - (finite - clip.double()).abs() + clip.double())  # equation 1
    want = (clipped * top / clip.double()).round() * clip.double() / top  # equation 2
    clear = ((clipped * top / clip.double()) % 1 - 0.5).abs() > 1e-4
    clear &= finite.abs() < 1e6  # the paper's difference of absolute values cancels beyond
    torch.testing.assert_close(got[0].double()[clear], want[clear], rtol=1e-5, atol=1e-6)
    assert got[0].min() >= 0.0
    assert got[0].max() <= clip * 1.000001
    assert torch.equal(got[1], torch.where((value >= 0) & (value < clip), upstream, 0.0))
    assert got[2].item() == pytest.approx(upstream[value >= clip].sum().item(), rel=1e-4, abs=1e-5)
    affine = PACT(bits).affine(torch.tensor(0.0), clip, {"clip": clip})
    assert torch.equal(got[0], fake_quantize_input(value, *affine, bits))


def test_pact_refuses_inputs_below_zero():
    assert PACT(4).learned(torch.tensor(0.0), torch.tensor(3.0)) == {"clip": torch.tensor(3.0)}
    with pytest.raises(ValueError, match=r"never negative, as after a ReLU, got values down to -0.5; use LSQPlus\(4\)"):
        PACT(4).learned(torch.tensor(-0.5), torch.tensor(3.0))


@pytest.mark.parametrize("grid", [LSQ, LSQPlus, PACT])
@pytest.mark.parametrize("bits", [1, 9, 4.0, True])
def test_bits_out_of_range_are_named(grid, bits):
    with pytest.raises(ValueError, match="whole number from 2 to 8"):
        grid(bits)


FORMS = {
    "lsq": (lambda v, s, o: learned_step(v, s, -8, 7, 0.3)),
    "lsq+": (lambda v, s, o: learned_affine(v, s, o, 4, 0.3)),
    "lsq+ by the letter": (lambda v, s, o: learned_affine(v, s, o, 4, 0.3, whole_zero=False)),
    "pact": (lambda v, s, o: pact(v, s, 4)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_dtypes_shapes_empties_and_nan(form, dtype):
    step, offset = torch.tensor(0.3, requires_grad=True), torch.tensor(-0.8, requires_grad=True)
    for shape in ((), (0,), (3, 0), (2, 3, 4)):
        value = torch.randn(shape).to(dtype).requires_grad_()
        result = form(value, step, offset)
        result.sum().backward()
        assert (result.shape, result.dtype) == (value.shape, dtype)
        assert value.grad.dtype == dtype
        assert step.grad.dtype == torch.float32
    assert torch.isnan(form(torch.tensor([NAN]), step, offset)).all()


@dynamo_warns
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_compiled_values_are_equal_and_gradients_close(form):
    torch.manual_seed(0)
    value = torch.cat([torch.randn(500) * 2, torch.tensor([INF, -INF, 0.0])])
    upstream, parameters = torch.randn(value.shape), [torch.tensor(0.3), torch.tensor(-0.8)]

    def run(function):
        leaves = [tensor.clone().requires_grad_() for tensor in (value, *parameters)]
        result = function(*leaves)
        result.backward(upstream)
        return result.detach(), [leaf.grad for leaf in leaves]

    eager, gradients = run(form)
    compiled, compiled_gradients = run(torch.compile(form, backend="aot_eager", fullgraph=True))
    assert torch.equal(eager, compiled)
    for one, other in zip(gradients, compiled_gradients, strict=True):
        if one is not None or other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert torch.equal(form(value, *parameters), eager)
    with torch.no_grad():
        assert torch.equal(form(value, *parameters), eager)


class Rounding(torch.nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, value, step, offset):
        return self.form(value, step, offset)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_exported_values_are_equal(form):
    arguments = (torch.randn(50), torch.tensor(0.3), torch.tensor(-0.8))
    program = torch.export.export(Rounding(form), arguments)
    assert torch.equal(program.module()(*arguments), form(*arguments))

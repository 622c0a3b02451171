"""GPTQ against a plain loop that inverts the rest of the Hessian anew for each column; grids that are found again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_compress import CompressError
from lightning_compress.pruning.reconstruction import output_error
from lightning_compress.quantization.clipping import exact_scale, nearest, row_scale
from lightning_compress.quantization.error_feedback import check_group, error_feedback
from lightning_compress.quantization.fake import round_weight
from lightning_compress.quantization.grid import integer_weight, weight_scale
from lightning_compress.quantization.rounding import adaptive_rounding, annealed_beta

METHODS = {"nearest": nearest, "error_feedback": error_feedback, "adaptive_rounding": adaptive_rounding}


def correlated(seed: int, samples: int, inputs: int) -> Tensor:
    rng = np.random.default_rng(seed)
    causes = rng.standard_normal((samples, max(2, inputs // 3))) @ rng.standard_normal((max(2, inputs // 3), inputs))
    return torch.from_numpy((causes + 0.3 * rng.standard_normal((samples, inputs))) * rng.uniform(0.3, 3.0, inputs))


def problem(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    inputs = correlated(seed, 4 * columns + 16, columns)
    weight = torch.from_numpy(np.random.default_rng(seed + 1).standard_normal((rows, columns)))
    return weight, 2 * inputs.T @ inputs / len(inputs)


def by_loops(weight: np.ndarray, hessian: np.ndarray, bits: int, group: int | None, damping: float) -> np.ndarray:
    """Optimal Brain Quantization in a fixed order, abs-max scales, the largest weight at the largest code."""
    rows, columns = weight.shape
    largest = 2 ** (bits - 1) - 1
    damped = hessian + damping * hessian.diagonal().mean() * np.eye(columns)
    order = np.argsort(-hessian.diagonal(), kind="stable") if group is None else np.arange(columns)
    out = weight.copy()
    for row in range(rows):
        w, zero = out[row].copy(), weight[row] == 0
        scale, pin = 0.0, -1
        for at, column in enumerate(order):
            if at % (group or columns) == 0:
                own = np.arange(columns) if group is None else np.arange(at, at + group)
                part = np.where(zero[own], 0.0, w[own])
                pin = own[np.abs(part).argmax()]
                # Ours is abs-max, rounded up to 16 bits (`exact_scale`): at 8 bits that alone moves codes near a tie.
                scale = float(row_scale(torch.from_numpy(part), bits, clipped=False)) if part.any() else 1.0
                sign = np.sign(w[pin])
            code = np.clip(np.round(w[column] / scale), -largest, largest)
            code = sign * largest if column == pin else code
            rounded = 0.0 if zero[column] else code * scale
            rest = order[at:]
            inverse = np.linalg.inv(damped[np.ix_(rest, rest)])
            w[rest] -= (w[column] - rounded) / inverse[0, 0] * inverse[:, 0]
            w[column] = out[row, column] = rounded
    return out


@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from([4, 8, 12]), st.integers(3, 8), st.booleans())
@settings(max_examples=30, deadline=None)
def test_it_is_the_plain_loop(seed: int, rows: int, columns: int, bits: int, grouped: bool) -> None:
    weight, hessian = problem(seed, rows, columns)
    weight[0, 1] = 0.0
    group = 4 if grouped else None
    for block in (1, 5, 128):
        new = error_feedback(weight, hessian, bits, group, clipped=False, block=block)
        expected = by_loops(weight.numpy(), hessian.numpy(), bits, group, 0.01)
        step = np.abs(weight.numpy()).max() / (2 ** (bits - 1) - 1)
        np.testing.assert_allclose(new.numpy(), expected, atol=1e-4 * step)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_error_feedback_and_adaptive_rounding_are_below_nearest(bits: int, seed: int) -> None:
    weight, hessian = problem(seed, 16, 48)
    at_most = output_error(weight, nearest(weight, hessian, bits), hessian)
    assert at_most <= output_error(weight, nearest(weight, hessian, bits, clipped=False), hessian)
    for method in (error_feedback, adaptive_rounding):
        assert output_error(weight, method(weight, hessian, bits), hessian) < 0.75 * at_most


def test_adaptive_rounding_is_near_the_best_of_all_ways_to_round() -> None:
    weight, hessian = problem(5, 6, 9)
    new = adaptive_rounding(weight, hessian, 4, clipped=False)
    for row in range(6):
        scale = float(row_scale(weight[row], 4, clipped=False))
        floor = np.floor(weight[row].numpy() / scale)
        ups = np.array(np.meshgrid(*[[0, 1]] * 9)).reshape(9, -1).T
        changes = np.clip(floor + ups, -7, 7) * scale - weight[row].numpy()
        errors = np.sort(np.einsum("ni,ij,nj->n", changes, hessian.numpy(), changes))
        change = (new[row] - weight[row]).numpy()
        ours = change @ hessian.numpy() @ change
        assert ours <= errors[len(errors) // 7], "among the best seventh of 512"


def test_adaptive_rounding_goes_to_a_neighbour_only() -> None:
    weight, hessian = problem(6, 8, 20)
    new = adaptive_rounding(weight, hessian, 4, clipped=False)
    assert bool(((new - weight).abs() <= row_scale(weight, 4, clipped=False) * (1 + 1e-6)).all())
    assert [annealed_beta(at) for at in (0.0, 0.2, 1.0)] == [20.0, 20.0, 2.0]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("clipped", [False, True])
def test_rounding_by_abs_max_gives_back_what_lies_on_a_grid(method, bits: int, clipped: bool) -> None:
    weight, hessian = (tensor.float() for tensor in problem(bits, 24, 32))
    weight[3] = 0.0
    weight[4, ::2] = 0.0
    new = method(weight, hessian, bits, clipped=clipped)
    assert torch.equal(round_weight(new, bits), new)
    codes, scale = integer_weight(new, bits)
    assert torch.equal(codes.float() * scale.unsqueeze(1), new)
    assert int(codes.abs().amax(1)[new.any(1)].min()) == 2 ** (bits - 1) - 1
    assert not bool(new[weight == 0].any()), "zeros of pruning stay zero"


@pytest.mark.parametrize("group", [1, 4, 8, 32])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_each_group_keeps_its_grid(group: int, bits: int) -> None:
    weight, hessian = (tensor.float() for tensor in problem(7, 8, 32))
    weight[2, :8] = 0.0
    new = error_feedback(weight, hessian, bits, group)
    rows = new.view(-1, group)
    assert torch.equal(round_weight(rows, bits), rows)
    assert not bool(new[2, :8].any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_in_half_precision_the_codes_are_found_again(dtype: torch.dtype, bits: int) -> None:
    weight, hessian = (tensor.float() for tensor in problem(8, 64, 32))
    exact = error_feedback(weight.to(dtype).float(), hessian, bits)
    new = error_feedback(weight.to(dtype), hessian, bits)
    assert new.dtype == dtype
    assert torch.equal(integer_weight(new, bits)[0], integer_weight(exact, bits)[0])


@given(st.floats(2.0**-20, 2.0**20, width=32), st.integers(2, 8))
def test_codes_times_an_exact_scale_are_exact(value: float, bits: int) -> None:
    scale = exact_scale(torch.tensor(value))
    assert value <= float(scale) <= value * (1 + 2.0**-15)
    codes = torch.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1))
    products = codes.float() * scale
    assert torch.equal(products.double(), codes.double() * scale.double())
    assert torch.equal(weight_scale(products.unsqueeze(0), bits), scale.unsqueeze(0))


def test_groups_of_a_convolution_are_rounded_each_by_its_own_hessian() -> None:
    weights, hessians = zip(*(problem(seed, 4, 12) for seed in (1, 2)), strict=True)
    for method in METHODS.values():
        both = method(torch.stack(weights), torch.stack(hessians), 4)
        if method is adaptive_rounding:  # one Adam for both: its errors are divided by their joint mean
            continue
        for group in range(2):
            apart = method(weights[group][None], hessians[group][None], 4)[0]
            if method is nearest:
                assert torch.equal(both[group], apart)
            else:  # damped by the mean curvature of all groups
                assert torch.isclose(both[group], apart).float().mean() > 0.8


def test_bad_input_is_named() -> None:
    weight, hessian = problem(1, 4, 12)
    for method in (error_feedback, adaptive_rounding):
        with pytest.raises(ValueError, match="2 to 8, got 1"):
            method(weight, hessian, 1)
        with pytest.raises(ValueError, match="needs a Hessian"):
            method(weight, hessian[:4, :4])
        with pytest.raises(CompressError, match="weights hold NaN"):
            method(weight / 0, hessian)
        with pytest.raises(CompressError, match="Hessian of the inputs hold NaN"):
            method(weight, hessian * float("nan"))
    with pytest.raises(ValueError, match=r"group=5 does not divide the 12 inputs of 'body.0'.*exclude=\['body.0'\]"):
        check_group(5, 12, "body.0")
    with pytest.raises(ValueError, match="group=5 does not divide"):
        error_feedback(weight, hessian, group=5)
    for group in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match="number of inputs >= 1"):
            error_feedback(weight, hessian, group=group)
    with pytest.raises(ValueError, match="steps is a whole number >= 1"):
        adaptive_rounding(weight, hessian, steps=0)

"""Soft targets against the formula written out in NumPy, and the properties that make it usable."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.distillation.losses import soft_targets

quick = settings(max_examples=50, deadline=None)
temperatures = st.floats(0.25, 20.0)


def logits(seed, shape=(6, 5), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(shape, generator=generator) * 3).to(dtype) for _ in range(2))


def softmax(values):
    exponents = np.exp(values - values.max(axis=-1, keepdims=True))
    return exponents / exponents.sum(axis=-1, keepdims=True)


def by_hand(student, teacher, temperature):
    p, q = softmax(teacher.double().numpy() / temperature), softmax(student.double().numpy() / temperature)
    return temperature**2 * (p * np.log(p / q)).sum(axis=-1).mean()


@quick
@given(st.integers(0, 10**6), temperatures, st.sampled_from([(4, 3), (2, 5, 7), (9,)]))
def test_value_by_hand(seed, temperature, shape):
    student, teacher = logits(seed, shape)
    loss = soft_targets(student, teacher, temperature)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(by_hand(student, teacher, temperature), rel=1e-4, abs=1e-5)


def test_equal_logits_cost_nothing_and_have_no_gradient():
    student, _ = logits(0)
    student.requires_grad_()
    loss = soft_targets(student, student.detach() + 2.0)  # a softmax doesn't see a constant
    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    loss.backward()
    assert student.grad.abs().max() < 1e-5


@quick
@given(st.integers(0, 10**6), temperatures, st.integers(1, 5))
def test_copies_of_the_batch_and_its_halves_give_the_same_loss(seed, temperature, copies):
    student, teacher = logits(seed)
    whole = soft_targets(student, teacher, temperature)
    repeated = soft_targets(student.repeat(copies, 1), teacher.repeat(copies, 1), temperature)
    halves = [soft_targets(student[rows], teacher[rows], temperature) for rows in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(repeated, whole)
    torch.testing.assert_close(torch.stack(halves).mean(), whole)


@pytest.mark.parametrize("masked", [-1e9, float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("width", [1, 4])
def test_classes_masked_out_change_neither_loss_nor_gradient(masked, width):
    student, teacher = logits(1)
    student.requires_grad_()
    padding = torch.full((6, width), masked)
    plain = soft_targets(student, teacher, 3.0)
    padded = soft_targets(torch.cat([student, padding], dim=1), torch.cat([teacher, padding], dim=1), 3.0)
    torch.testing.assert_close(padded, plain)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (padded, plain)))


def test_a_class_the_teacher_rules_out_gives_a_finite_loss_and_gradient():
    student, teacher = logits(2)
    teacher[:, 0] = float("-inf")
    student.requires_grad_()
    loss = soft_targets(student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert (student.grad[:, 0] > 0).all()  # the student learns to rule it out as well


@quick
@given(st.integers(0, 10**6), temperatures)
def test_the_gradient_is_temperature_times_the_difference_of_probabilities(seed, temperature):
    student, teacher = logits(seed)
    student.requires_grad_()
    soft_targets(student, teacher, temperature).backward()
    p, q = softmax(teacher.double().numpy() / temperature), softmax(student.detach().double().numpy() / temperature)
    np.testing.assert_allclose(student.grad.numpy(), temperature * (q - p) / 6, rtol=1e-3, atol=1e-5)


def test_at_high_temperature_it_is_matching_of_centred_logits():
    """Hinton et al. 2015, section 2.1: the gradient tends to (student - teacher) / classes for centred logits."""
    student, teacher = (value - value.mean(dim=1, keepdim=True) for value in logits(3))
    student.requires_grad_()
    soft_targets(student, teacher, 1e3).backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 5 / 6, rtol=2e-2, atol=1e-3)


def test_the_sum_over_classes_is_whole():
    student, teacher = logits(4, (3, 10))
    wide = [torch.stack([value, value], dim=0) for value in (student, teacher)]
    torch.testing.assert_close(soft_targets(*wide), soft_targets(student, teacher))  # more dimensions are a batch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = logits(5, dtype=dtype)
    loss = soft_targets(student, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, soft_targets(student.float(), teacher.float()))

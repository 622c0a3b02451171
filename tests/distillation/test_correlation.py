"""DIST and standardized logits: what they do not see, and what they do where nothing varies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.distillation.correlation import Standardized, dist, standardize
from lightning_compress.distillation.losses import decoupled, logit_mse, soft_targets
from tests.distillation import losses_by_hand

quick = settings(max_examples=20, deadline=None)


def logits(seed, shape=(6, 5)):
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


def test_a_linear_map_of_the_probabilities_is_not_seen_between_classes():
    """Huang et al. 2022, section 4.1: a relaxed match, invariant to scale and shift."""
    teacher = logits(0)[0].softmax(dim=1)
    student = 0.3 * teacher + 0.7 / 5  # as sure of itself as a third of the teacher
    assert dist(student.log(), teacher.log(), intra=0.0) < 1e-12
    assert soft_targets(student.log(), teacher.log()) > 0.1


def test_examples_that_are_all_alike_have_no_relation_within_a_class():
    """Rounding varies, at 1e-8: taken for a relation it would be noise, with gradients of 1e8."""
    row = torch.tensor([[0.3, -0.1, 0.7]])
    student, teacher = row.repeat(7, 1).requires_grad_(), (-row).repeat(7, 1)
    loss = dist(student, teacher, inter=0.0)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.abs().max() == 0.0


def test_one_example_has_only_the_relation_between_classes():
    student, teacher = logits(1, (1, 5))
    assert dist(student, teacher) == dist(student, teacher, intra=0.0) > 0


@pytest.mark.parametrize("silent", [0, 1])
def test_a_side_that_does_not_vary_counts_half(silent):
    pair = list(logits(1))
    pair[silent] = torch.zeros_like(pair[silent])
    assert float(dist(*pair)) == pytest.approx(1.0)  # 1/2 between classes, 1/2 within


@quick
@given(st.integers(0, 10**6), st.floats(0.1, 50.0), st.floats(-20.0, 20.0))
def test_standardized_logits_have_mean_0_and_deviation_1_whatever_they_were(seed, scale, shift):
    values = scale * logits(seed)[0] + shift
    standard = standardize(values)
    np.testing.assert_allclose(standard, losses_by_hand.standardize(values.numpy()), rtol=1e-6, atol=1e-9)
    assert float(Standardized()(values, logits(seed)[0])) == pytest.approx(0.0, abs=1e-12)


def test_standardize_leaves_out_classes_that_are_ruled_out():
    values = logits(2)[0].float()
    padded = torch.cat([values, torch.full((6, 3), -math.inf)], dim=1)
    standard = standardize(padded)
    torch.testing.assert_close(standard[:, :5], standardize(values))
    assert (standard[:, 5:] == -math.inf).all()


def test_logits_that_are_all_alike_become_zeros_without_gradient():
    values = torch.full((3, 7), 0.1, requires_grad=True)
    standard = standardize(values)
    standard.sum().backward()
    assert standard.abs().max() == 0.0
    assert values.grad.abs().max() == 0.0


def test_any_logit_loss_can_be_standardized_and_gets_its_options():
    student, teacher = logits(3)
    standard = [standardize(value) for value in (student, teacher)]
    labels, mask = torch.arange(6) % 5, torch.arange(6) < 4
    assert Standardized(logit_mse)(student, teacher) == logit_mse(*standard)
    got = Standardized(decoupled)(student, teacher, 2.0, labels=labels, beta=0.5, mask=mask)
    assert got == decoupled(*standard, 2.0, labels=labels, beta=0.5, mask=mask)

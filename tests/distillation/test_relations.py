"""Relations between examples: what they do not see, and batches too small or too alike to have any."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lightning_compress.distillation.relations import (
    contrastive,
    relational_angle,
    relational_distance,
    similarity_preserving,
)

quick = settings(max_examples=20, deadline=None)


def examples(seed, shape=(6, 4)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rotation(seed, width):
    return torch.linalg.qr(examples(seed, (width, width)))[0]


@quick
@given(st.integers(0, 10**6), st.floats(0.1, 10.0))
def test_a_turned_moved_and_scaled_copy_has_the_same_relations(seed, scale):
    student = examples(seed)
    teacher = scale * student @ rotation(seed + 1, 4)
    for loss in (similarity_preserving, relational_distance, relational_angle):
        assert float(loss(student, teacher)) < 1e-20
    for loss in (relational_distance, relational_angle):
        assert float(loss(student, teacher + 5.0)) < 1e-20


@pytest.mark.parametrize("loss", [similarity_preserving, relational_distance, relational_angle, contrastive])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_too_small_for_relations_costs_nothing_or_is_defined(loss, batch):
    student = examples(0, (batch, 4)).requires_grad_()
    value = loss(student, examples(1, (batch, 4)))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    if batch == 1 or loss in (relational_distance, relational_angle):
        assert value.item() == pytest.approx(0.0, abs=1e-15)


def test_two_equal_examples_leave_the_others_their_gradients():
    student = examples(0)
    student[1] = student[0]
    student.requires_grad_()
    for loss in (relational_distance, relational_angle):
        (gradient,) = torch.autograd.grad(loss(student, examples(1)), student)
        assert gradient.isfinite().all()
        assert (gradient[2:].abs().amax(dim=1) > 0).all()


def test_an_angle_needs_three_different_examples():
    """Two equal ones have no direction between them; [j, i, i] is no angle, though its cosine is 1 elsewhere."""
    student, teacher = (
        torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]),
        torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]]),
    )
    # At the three corners, each seen from two sides; the student's cosines are 0 (no direction), 0 and 1.
    corners = [(0.0, 0.0), (0.0, 0.5**0.5), (1.0, 0.5**0.5)]
    wanted = sum((own - other) ** 2 / 2 for own, other in corners) / 3
    assert float(relational_angle(student, teacher)) == pytest.approx(wanted)


def test_small_differences_of_large_features_are_kept():
    """|a|^2 + |b|^2 - 2ab would lose them: 1e4 +- 1 in float32."""
    offsets = examples(0).float()
    assert relational_distance(1e4 + offsets, offsets) < 1e-5
    assert relational_angle(1e4 + offsets, offsets) < 1e-4


def test_contrastive_is_the_cross_entropy_of_finding_the_own_example():
    student, teacher = examples(0), examples(1)
    scores = functional.normalize(student) @ functional.normalize(teacher).T / 0.1
    own = torch.arange(6)
    wanted = (functional.cross_entropy(scores, own) + functional.cross_entropy(scores.T, own)) / 2
    torch.testing.assert_close(contrastive(student, teacher, 0.1), wanted)


def test_contrastive_falls_as_examples_are_told_apart():
    student = examples(0)
    assert contrastive(student, student) < 0.1 < contrastive(student, student.roll(1, 0))
    alike = torch.ones(6, 4)
    assert float(contrastive(alike, alike)) == pytest.approx(1.791759)  # log 6: nothing is told apart

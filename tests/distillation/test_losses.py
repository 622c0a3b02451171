"""What is special to each loss of logits; what all promise, and their values, is in `test_loss_promises.py`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss

from lightning_compress.distillation.comparing import kept_tokens
from lightning_compress.distillation.losses import (
    decoupled,
    hard_labels,
    jensen_shannon,
    logit_mse,
    reverse_kl,
    soft_targets,
)

quick = settings(max_examples=50, deadline=None)
temperatures = st.floats(0.25, 20.0)


def logits(seed, shape=(6, 5), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(shape, generator=generator) * 3).to(dtype) for _ in range(2))


def softmax(values):
    exponents = np.exp(values - values.max(axis=-1, keepdims=True))
    return exponents / exponents.sum(axis=-1, keepdims=True)


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


@quick
@given(st.integers(0, 10**6), temperatures)
def test_torchs_own_divergence(seed, temperature):
    student, teacher = (value / temperature for value in logits(seed))
    own = functional.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    torch.testing.assert_close(soft_targets(student, teacher, 1.0), own)


def test_hard_labels_of_a_language_model_are_transformers_own_loss():
    """Next tokens, padding at -100: the mask does what the models' own shift does."""
    student, teacher = logits(3, (2, 6, 7))
    labels = teacher.argmax(dim=-1).roll(1, dims=1)  # the teacher's best at t is the label at t + 1
    labels[0, 4:] = -100
    own = ForCausalLMLoss(student, labels, vocab_size=7)
    torch.testing.assert_close(hard_labels(student, teacher, mask=kept_tokens(labels=labels, next_token=True)), own)


def test_logit_mse_is_torchs_times_the_classes():
    student, teacher = logits(3, (4, 10))
    torch.testing.assert_close(logit_mse(student, teacher), 10 * functional.mse_loss(student, teacher))


@quick
@given(st.integers(0, 10**6), temperatures)
def test_reverse_kl_is_soft_targets_the_other_way_round(seed, temperature):
    student, teacher = logits(seed)
    torch.testing.assert_close(reverse_kl(student, teacher, temperature), soft_targets(teacher, student, temperature))


def test_a_class_that_the_student_rules_out_leaves_reverse_kl_finite():
    student, teacher = logits(2)
    student[:, 0] = -math.inf
    student.requires_grad_()
    loss = reverse_kl(student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@quick
@given(st.integers(0, 10**6), temperatures, st.floats(0.05, 0.95))
def test_jensen_shannon_is_bounded_and_turns_over_with_beta(seed, temperature, beta):
    student, teacher = logits(seed)
    loss = jensen_shannon(student, teacher, temperature, beta=beta)
    entropy = -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta))
    assert float(loss) <= temperature**2 * entropy * 1.0001
    turned = jensen_shannon(teacher, student, temperature, beta=1 - beta)
    torch.testing.assert_close(turned, loss, rtol=1e-4, atol=1e-5 * temperature**2)


@pytest.mark.parametrize(("loss", "beta", "share"), [(soft_targets, 1e-4, 1e-4), (reverse_kl, 1 - 1e-4, 1e-4)])
def test_jensen_shannon_tends_to_the_two_divergences(loss, beta, share):
    student, teacher = (value.double() / 3 for value in logits(1))
    limit = jensen_shannon(student, teacher, beta=beta) / share
    torch.testing.assert_close(limit, loss(student, teacher, 1.0), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("side", [0, 1])
def test_jensen_shannon_is_finite_where_one_rules_out_a_class(side):
    student, teacher = pair = logits(2)
    pair[side][:, 0] = -math.inf
    student.requires_grad_()
    loss = jensen_shannon(student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("beta", [0.0, 1.0, -1.0, math.nan])
def test_a_beta_out_of_range_names_the_losses_at_its_ends(beta):
    with pytest.raises(ValueError, match=r"expected beta in \(0, 1\), got .*soft_targets \(0\) and reverse_kl \(1\)"):
        jensen_shannon(*logits(0), beta=beta)


@quick
@given(st.integers(0, 10**6), temperatures)
def test_decoupling_puts_together_what_soft_targets_is(seed, temperature):
    """Zhao et al. 2022, equation 6: NCKD is weighed by the teacher's probability of all classes but the label's."""
    student, teacher = (value.double() for value in logits(seed, (1, 5)))
    label = torch.tensor([seed % 5])
    others = 1 - (teacher / temperature).softmax(dim=1)[0, label].item()
    together = decoupled(student, teacher, temperature, labels=label, alpha=1.0, beta=others)
    torch.testing.assert_close(together, soft_targets(student, teacher, temperature))


def test_examples_without_a_label_do_not_count():
    student, teacher = logits(1)
    labels = torch.tensor([0, -100, 2, -100, 4, 1])
    kept = labels >= 0
    wanted = decoupled(student[kept], teacher[kept], labels=labels[kept])
    torch.testing.assert_close(decoupled(student, teacher, labels=labels), wanted)
    first = decoupled(student[:1], teacher[:1], labels=labels[:1])
    torch.testing.assert_close(decoupled(student, teacher, labels=labels, mask=torch.arange(6) < 2), first)


def test_labels_of_another_shape_are_named():
    with pytest.raises(ValueError, match=r"expected labels of shape \(6,\) .*\(6, 5\), got \(6, 5\); give one class"):
        decoupled(*logits(0), labels=torch.zeros(6, 5, dtype=torch.long))

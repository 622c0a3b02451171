"""What every distillation loss promises, whatever its formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.distillation.loss_cases import CASES, MASKED, SOFTENED

quick = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 10**6)
each = pytest.mark.parametrize("case", CASES, ids=str)
each_masked = pytest.mark.parametrize("case", MASKED, ids=str)
each_softened = pytest.mark.parametrize("case", SOFTENED, ids=str)


def chosen(*, negative=(), **wanted):
    cases = [case for case in CASES if all(getattr(case, name) == value for name, value in wanted.items())]
    assert len(cases) >= 5
    return pytest.mark.parametrize("case", cases, ids=str)


def some_mask(case, seed):
    generator = torch.Generator().manual_seed(seed + 2)
    mask = torch.rand(case.mask_shape(), generator=generator) < 0.6
    mask.view(-1)[:2] = torch.tensor([True, False])
    return mask


def gradient(loss, value):
    (result,) = torch.autograd.grad(loss, value, allow_unused=True)
    return result


# The value


@each
@quick
@given(seed=seeds)
def test_the_value_is_the_papers(case, seed):
    student, teacher = case.pair(seed)
    extra = {name: v.numpy() if name == "labels" else v for name, v in case.extra(seed).items()}
    wanted = case.by_hand(student.double().numpy(), teacher.double().numpy(), **extra)
    loss = case.value(student, teacher, seed)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert float(loss) == pytest.approx(float(wanted), rel=2e-4, abs=1e-5)


@each_softened
@pytest.mark.parametrize("temperature", [0.25, 1.0, 5.0])
def test_the_value_at_other_temperatures(case, temperature):
    student, teacher = case.pair(0)
    extra = {name: v.numpy() if name == "labels" else v for name, v in case.extra(0).items()}
    wanted = case.by_hand(student.double().numpy(), teacher.double().numpy(), temperature=temperature, **extra)
    loss = case.value(student.double(), teacher.double(), temperature=temperature)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-8)


@each
@quick
@given(seed=seeds)
def test_it_is_at_least_zero(case, seed):
    assert float(case.value(*case.pair(seed), seed)) >= 0.0


@chosen(symmetric=True)
@quick
@given(seed=seeds)
def test_it_is_symmetric(case, seed):
    student, teacher = case.pair(seed)
    torch.testing.assert_close(case.value(student, teacher), case.value(teacher, student))


@chosen(zero=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_at_equality_it_is_exactly_zero_and_pulls_nowhere(case, dtype):
    student, _ = case.pair(3, dtype)
    student.requires_grad_()
    loss = case.value(student, student.detach().clone())
    assert loss.item() == 0.0
    assert gradient(loss, student).abs().max() < 1e-5


# Its gradient


@each
def test_gradcheck_of_student_and_teacher(case):
    pair = [value.requires_grad_() for value in case.pair(1, torch.float64)]
    assert torch.autograd.gradcheck(case.value, pair)


@each
@pytest.mark.parametrize("place", ["zeros", "ones", "one example", "far away"])
def test_the_gradient_is_finite_where_roots_and_logarithms_have_none(case, place):
    student, teacher = case.pair(2)
    student = {
        "zeros": torch.zeros_like(student),
        "ones": torch.ones_like(student),
        "one example": student[:1].expand_as(student).clone(),
        "far away": 1e4 * student,
    }[place].requires_grad_()
    for other in (teacher, student.detach() if case.wide is None else teacher):
        loss = case.value(student, other)
        assert loss.isfinite()
        assert gradient(loss, student).isfinite().all()


@each
def test_a_nan_is_not_hidden(case):
    for side in range(2):
        pair = case.pair(2)
        pair[side].view(-1)[1] = math.nan
        if side == 0 or case.zero:  # the teacher's most likely class is chosen, not computed
            assert case.value(*pair).isnan()


# Where and how it is computed


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(case, dtype):
    student, teacher = case.pair(5, dtype)
    wanted = case.value(student.float(), teacher.float())
    assert wanted.dtype == torch.float32
    assert torch.equal(case.value(student, teacher), wanted)
    assert torch.equal(case.value(student, teacher.float()), wanted)


@each
def test_autocast_changes_nothing(case):
    student, teacher = case.pair(5)
    student.requires_grad_()
    outside = case.value(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        inside = case.value(student, teacher)
    assert torch.equal(inside, outside)
    assert torch.equal(gradient(inside, student), gradient(outside, student))


@each
def test_float64_stays(case):
    loss = case.value(*case.pair(5, torch.float64))
    assert loss.dtype == torch.float64


@chosen(shards=True)
@quick
@given(seed=seeds)
def test_the_losses_of_two_processes_average_to_that_of_one(case, seed):
    student, teacher = case.pair(seed)
    half = len(student) // 2
    parts = [slice(None, half), slice(half, None)]
    halves = [case.value(student[part], teacher[part], seed, part) for part in parts]
    torch.testing.assert_close(torch.stack(halves).mean(), case.value(student, teacher, seed))


@chosen(shards=False)
def test_relations_depend_on_the_batch_at_hand(case):
    """Said in their docstrings; were it not so, they would belong to the test above."""
    student, teacher = case.pair(0, shape=(8, 4))
    halves = [case.value(student[part], teacher[part]) for part in (slice(None, 4), slice(4, None))]
    assert abs(torch.stack(halves).mean() - case.value(student, teacher)) > 1e-3


# Classes that are not there


@chosen(logits=True)
def test_classes_that_both_rule_out_change_nothing(case):
    student, teacher = case.pair(1)
    student.requires_grad_()
    nowhere = torch.full((*student.shape[:-1], 7), -math.inf)
    plain = case.value(student, teacher)
    padded = case.value(torch.cat([student, nowhere], dim=-1), torch.cat([teacher, nowhere], dim=-1))
    torch.testing.assert_close(padded, plain)
    torch.testing.assert_close(gradient(padded, student), gradient(plain, student))


# Masks


@each_masked
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_a_mask_that_keeps_all_is_no_mask(case, kind):
    student, teacher = case.pair(1)
    masked = case.value(student, teacher, mask=torch.ones(case.mask_shape(), dtype=kind))
    torch.testing.assert_close(masked, case.value(student, teacher))


@each_masked
@pytest.mark.parametrize("padding", [1e6, math.nan])
@quick
@given(seed=seeds)
def test_what_is_padded_away_changes_neither_loss_nor_gradient(case, padding, seed):
    student, teacher = case.pair(seed)
    mask = some_mask(case, seed)
    plain = student.clone().requires_grad_()
    loss = case.value(plain, teacher, seed, mask=mask)
    wanted = gradient(loss, plain)
    assert wanted.isfinite().all()
    assert torch.equal(wanted, case.spoiled(wanted, mask, 0.0))
    spoiled = case.spoiled(student, mask, padding).requires_grad_()
    again = case.value(spoiled, case.spoiled(teacher, mask, padding), seed, mask=mask)
    assert torch.equal(again, loss)
    assert torch.equal(gradient(again, spoiled), wanted)


@chosen(mask="leading")
def test_a_mask_averages_over_what_is_kept(case):
    student, teacher = case.pair(4)
    mask = some_mask(case, 4)
    options = {**case.options, "labels": case.labels(0)[mask]} if case.labelled else case.options
    kept = case.loss(student[mask], teacher[mask], **options)
    torch.testing.assert_close(case.value(student, teacher, mask=mask), kept)


@pytest.mark.parametrize("case", [case for case in MASKED if case.mask != "leading"], ids=str)
@pytest.mark.parametrize("left", [True, False])
def test_padding_an_attention_is_as_if_it_were_shorter(case, left):
    student, teacher = case.pair(4)
    mask = torch.tensor([[False, True, True, True]]).expand(case.mask_shape())
    mask = mask if left else mask.flip(-1)
    short = slice(1, None) if left else slice(None, -1)
    cut = [value[:, :, short, short] if case.mask == "pairs" else value[:, :, short] for value in (student, teacher)]
    torch.testing.assert_close(case.value(student, teacher, mask=mask), case.value(*cut))


@each_masked
def test_an_empty_mask_costs_nothing_and_pulls_nowhere(case):
    student, teacher = case.pair(1)
    student.requires_grad_()
    loss = case.value(student, teacher, mask=torch.zeros(case.mask_shape(), dtype=torch.bool))
    assert loss.item() == 0.0
    assert torch.equal(gradient(loss, student), torch.zeros_like(student))


# Bad input


@each
def test_shapes_that_do_not_match_are_named_with_a_cure(case):
    student, teacher = case.pair(1)
    other = teacher.repeat(2, *[1] * (teacher.dim() - 1))
    with pytest.raises(ValueError, match=r"expected .*got .*; \w+") as caught:
        case.value(student, other)
    assert str(tuple(student.shape)) in str(caught.value)
    assert str(tuple(other.shape)) in str(caught.value)


@each_masked
def test_a_mask_that_does_not_fit_is_named_with_its_cure(case):
    student, teacher = case.pair(1)
    with pytest.raises(ValueError, match=r"expected a mask .*got \(7, 3\); make it with kept_tokens"):
        case.value(student, teacher, mask=torch.ones(7, 3))


@each_softened
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(case, temperature):
    with pytest.raises(ValueError, match=r"expected a positive, finite temperature, got"):
        case.value(*case.pair(1), temperature=temperature)


def test_the_table_has_every_loss():
    """A loss without its row would have none of these promises tested."""
    from lightning_compress.distillation import attention, correlation, features, gradients, losses, relations

    not_losses = {"split_heads", "standardize", "Standardized", "input_gradient", "likeliest"}
    named = {
        name for module in (attention, correlation, features, gradients, losses, relations) for name in module.__all__
    }
    rows = {case.name.replace(",", "").split()[0] for case in CASES} - {"standardized"}
    assert rows == named - not_losses

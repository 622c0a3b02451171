"""Differences of two models' answers against NumPy, enumerated binomials and torchmetrics; damage that a mean hides."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassCalibrationError

from lightning_compress.measure import compare_predictions, differences, mcnemar_p


def drawn(seed, rows=80, classes=4, noise=1.5):
    generator = torch.Generator().manual_seed(seed)
    before = 2 * torch.randn(rows, classes, generator=generator)
    after = before + noise * torch.randn(rows, classes, generator=generator)
    labels = torch.randint(classes, (rows,), generator=generator)
    labels = torch.where(torch.rand(rows, generator=generator) < 0.6, before.argmax(-1), labels)
    return before, after, labels


def softmax(logits):
    e = np.exp(logits.double().numpy() - logits.double().numpy().max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def p_by_enumeration(b, c):
    """Of all ways that n fair coins can fall: the share that is as uneven as b heads, c tails, or more."""
    falls = [sum(fall) for fall in itertools.product((0, 1), repeat=b + c)]
    return sum(abs(heads - (b + c) / 2) >= abs(b - c) / 2 for heads in falls) / len(falls)


def p_by_integers(b, c):
    tail = Fraction(2 * sum(math.comb(b + c, i) for i in range(min(b, c) + 1)), 2 ** (b + c))
    return float(min(Fraction(1), tail))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(1, 40), classes=st.integers(1, 5))
def test_numbers_over_the_whole_are_numpy_s(seed, rows, classes):
    before, after, labels = drawn(seed, rows, classes)
    got = compare_predictions(before, after, labels)
    p, q, y = softmax(before), softmax(after), labels.numpy()
    one, two = p.argmax(-1), q.argmax(-1)
    right, still = one == y, two == y
    assert got.count == rows
    assert got.agreement == pytest.approx(np.mean(one == two))
    assert got.kl_nats == pytest.approx(np.mean((p * np.log(p / q)).sum(-1)), rel=1e-9, abs=1e-12)
    assert (got.accuracy_before, got.accuracy_after) == pytest.approx((right.mean(), still.mean()))
    assert (got.right_to_wrong, got.wrong_to_right) == ((right & ~still).sum(), (~right & still).sum())
    assert {flip.index for flip in got.flips} == set(np.flatnonzero(one != two))
    lost = [flip.confidence_before - flip.confidence_after for flip in got.flips]
    assert lost == sorted(lost, reverse=True)
    for flip in got.flips:
        i = flip.index
        assert (flip.label, flip.before, flip.after) == (y[i], one[i], two[i])
        assert (flip.confidence_before, flip.confidence_after) == pytest.approx((p[i, one[i]], q[i, one[i]]))
    for row in got.classes:
        mine = y == int(row.name.removeprefix("class "))
        assert row.count == mine.sum()
        assert (row.accuracy_before, row.accuracy_after) == pytest.approx((right[mine].mean(), still[mine].mean()))
        assert row.delta == pytest.approx(row.accuracy_after - row.accuracy_before)
    assert sum(row.count for row in got.classes) == rows
    assert json.loads(json.dumps(got.json(), allow_nan=False))["flips"] == [
        {name: getattr(flip, name) for name in flip.__dataclass_fields__} for flip in got.flips
    ]


def test_calibration_errors_are_torchmetrics_s():
    before, after, labels = drawn(0, rows=1000)
    got = compare_predictions(before, after, labels)
    for ours, logits in ((got.ece_before, before), (got.ece_after, after)):
        theirs = MulticlassCalibrationError(4, n_bins=15)(logits.double().softmax(-1), labels)
        assert ours == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize(("b", "c"), [(b, c) for b in range(7) for c in range(7)])
def test_the_p_value_is_the_share_of_coin_falls(b, c):
    assert mcnemar_p(b, c) == pytest.approx(p_by_enumeration(b, c))


@settings(max_examples=60, deadline=None)
@given(b=st.integers(0, 300), c=st.integers(0, 300))
def test_the_p_value_is_the_exact_fraction_to_a_float_s_precision(b, c):
    assert mcnemar_p(b, c) == pytest.approx(p_by_integers(b, c), rel=1e-13)


@pytest.mark.parametrize(("b", "c"), [(2100, 2050), (4000, 100)])
def test_above_4096_flips_it_has_nine_digits(b, c):
    assert mcnemar_p(b, c) == pytest.approx(p_by_integers(b, c), rel=1e-9)


def test_the_p_value_of_many_flips_is_that_of_the_normal_distribution():
    for b, c in ((5200, 4900), (50_300, 49_700)):
        normal = math.erfc((b - c - 1) / math.sqrt(2 * (b + c)))  # with the correction for continuity
        assert mcnemar_p(b, c) == pytest.approx(normal, rel=1e-2)
    assert mcnemar_p(3000, 0) == 0.0  # 2^-2999 is no float


def test_damage_that_the_mean_hides_is_seen():
    """900 examples get a little better, 60 of a slice that cuts across the classes lose half: the mean is the same."""
    rows, classes = 960, 3
    labels = torch.arange(rows) % classes
    rare = torch.arange(rows) >= 900
    right, wrong = torch.eye(classes)[labels] * 4, torch.eye(classes)[(labels + 1) % classes] * 4
    before, after = right.clone(), right.clone()
    before[:30] = wrong[:30]
    after[900:930] = wrong[900:930]
    got = compare_predictions(before, after, labels, {"rare": rare, "frequent": ~rare})
    assert got.accuracy_before == got.accuracy_after
    assert got.p_value == 1.0
    worst = got.worst_slices(2)
    assert worst[0].name == "rare"
    assert worst[0].delta == -0.5
    assert worst[0].p_value == pytest.approx(2 * 0.5**30)
    assert len(worst) == 2
    by_name = {row.name: row for row in got.slices}
    assert by_name["frequent"].delta == pytest.approx(30 / 900)
    assert all(row.p_value == 1.0 for row in got.classes)


def test_the_worst_come_first_and_those_of_no_examples_not_at_all():
    before, after, labels = drawn(1)
    slices = {"none": torch.zeros(80, dtype=torch.bool), "first": torch.arange(80) < 40}
    got = compare_predictions(before, after, labels, slices)
    everything = got.worst_slices(99)
    assert [row.delta for row in everything] == sorted(row.delta for row in everything)
    assert len(everything) == len(got.classes) + 1
    assert got.slices[0].count == 0
    assert got.slices[0].delta is None


def test_without_labels_what_needs_none_is_there():
    before, after, labels = drawn(2)
    got, judged = compare_predictions(before, after), compare_predictions(before, after, labels)
    assert (got.agreement, got.kl_nats) == (judged.agreement, judged.kl_nats)
    assert [flip.index for flip in got.flips] == [flip.index for flip in judged.flips]
    assert {flip.label for flip in got.flips} == {None}
    assert (got.accuracy_before, got.ece_after, got.right_to_wrong, got.p_value) == (None,) * 4
    assert got.classes == got.slices == got.worst_slices() == ()


def test_a_model_against_itself():
    before, _, labels = drawn(3)
    got = compare_predictions(before, before.clone(), labels)
    assert (got.agreement, got.kl_nats, got.flips, got.p_value) == (1.0, 0.0, (), 1.0)
    assert got.ece_before == got.ece_after


def test_tokens_are_examples_and_padding_is_left_out():
    before, after, labels = drawn(4, rows=12)
    labels[::3] = -100
    mask = torch.arange(12) % 2 == 0
    flat = compare_predictions(before, after, labels, {"even": mask})
    shaped = compare_predictions(
        before.view(3, 4, 4), after.view(3, 4, 4), labels.view(3, 4), {"even": mask.view(3, 4)}
    )
    assert flat == shaped
    kept = labels >= 0
    alone = compare_predictions(before[kept], after[kept], labels[kept], {"even": mask[kept]})
    assert (flat.count, flat.agreement, flat.kl_nats, flat.slices) == (8, alone.agreement, alone.kl_nats, alone.slices)
    where = kept.nonzero()[:, 0].tolist()
    assert [flip.index for flip in flat.flips] == [where[flip.index] for flip in alone.flips]


def test_nan_is_no_answer_and_an_infinite_divergence_is_none_in_json():
    before = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    got = compare_predictions(before, torch.tensor([[math.nan, 0.0], [2.0, 0.0]]), torch.tensor([0, 0]))
    assert (got.agreement, got.accuracy_after, got.right_to_wrong) == (0.5, 0.5, 1)
    assert math.isnan(got.kl_nats)
    assert (got.flips[0].after, got.flips[0].confidence_after) == (-1, 0.0)
    assert got.json()["kl_nats"] is None
    both = torch.full((1, 2), math.nan)
    assert compare_predictions(both, both).agreement == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_many_classes_go_in_pieces_and_dtypes_may_differ(monkeypatch, dtype):
    before, after, labels = drawn(5)
    after = after.to(dtype)
    whole = compare_predictions(before, after, labels)
    monkeypatch.setattr(differences, "CHUNK", 17)
    pieces = compare_predictions(before, after.requires_grad_(), labels)
    assert pieces.kl_nats == pytest.approx(whole.kl_nats, rel=1e-12)
    assert pieces.flips == whole.flips


GOOD = (torch.zeros(4, 3), torch.zeros(4, 3))
LABELS = torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((GOOD[0], torch.zeros(4, 2)), ValueError, r"\(4, 3\) and \(4, 2\)"),
        ((GOOD[0].long(), GOOD[1]), TypeError, "floating dtype, got torch.int64"),
        ((*GOOD, LABELS[:3]), ValueError, r"labels of shape \(4,\), got \(3,\)"),
        ((*GOOD, LABELS.float()), TypeError, "integer labels, got torch.float32"),
        ((*GOOD, LABELS + 3), ValueError, "labels below 3, the number of classes, got 3"),
        ((*GOOD, LABELS - 100), ValueError, "examples to compare, got none"),
        ((*GOOD, None, {"a": LABELS == 0}), ValueError, "accuracy of slice 'a' needs labels"),
        ((*GOOD, LABELS, {"a": LABELS}), TypeError, "slice 'a' to be bool, got torch.int64"),
        ((*GOOD, LABELS, {"a": LABELS[:2] == 0}), ValueError, r"slice 'a' of shape \(4,\), got \(2,\)"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        compare_predictions(*arguments)

"""Calibration error and flips: torchmetrics' and NumPy's numbers, whatever the batches and processes."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassCalibrationError

from lightning_compress.measure import CalibrationGap, Flips, calibration_error
from tests.distributed import launching


def drawn(seed, rows=60, classes=4):
    generator = torch.Generator().manual_seed(seed)
    before = 2 * torch.randn(rows, classes, generator=generator)
    after = before + torch.randn(rows, classes, generator=generator)
    labels = torch.where(
        torch.rand(rows, generator=generator) < 0.7,
        before.argmax(-1),
        torch.randint(classes, (rows,), generator=generator),
    )
    return before, after, labels


def error_of(logits, labels, bins=15):
    return float(MulticlassCalibrationError(logits.shape[-1], n_bins=bins)(logits.double().softmax(-1), labels))


def by_hand(confidences, correct, bins):
    """Guo et al., equation 3, in NumPy: bin b holds ((b-1)/bins, b/bins]."""
    confidences, correct = np.asarray(confidences, dtype=float), np.asarray(correct, dtype=float)
    total = 0.0
    for b in range(1, bins + 1):
        inside = (confidences > (b - 1) / bins) & (confidences <= b / bins)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidences[inside].mean())
    return total


def flips_by_hand(before, after, labels):
    right, still = (before.argmax(-1) == labels).numpy(), (after.argmax(-1) == labels).numpy()
    return {"right_to_wrong": int((right & ~still).sum()), "wrong_to_right": int((~right & still).sum())}


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.floats(0.001, 1.0), st.booleans()), min_size=1, max_size=40),
    bins=st.sampled_from([1, 2, 7, 15]),
)
def test_the_error_is_the_formula_s(rows, bins):
    confidences, correct = (list(column) for column in zip(*rows, strict=True))
    got = calibration_error(torch.tensor(confidences, dtype=torch.float64), torch.tensor(correct), bins)
    assert got == pytest.approx(by_hand(confidences, correct, bins), abs=1e-12)


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("seed", range(3))
def test_torchmetrics_finds_the_same(bins, seed):
    before, _, labels = drawn(seed, rows=500)
    confidence, answer = before.double().softmax(-1).max(-1)
    assert calibration_error(confidence, answer == labels, bins) == pytest.approx(
        error_of(before, labels, bins), abs=1e-6
    )


def test_confidence_one_is_in_the_last_bin():
    """torchmetrics has a bin of its own for it."""
    assert calibration_error(torch.tensor([1.0, 0.98]), torch.tensor([True, False])) == pytest.approx(0.49)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 60), max_size=3))
def test_any_split_into_batches_gives_the_numbers_of_the_whole(seed, cuts):
    before, after, labels = drawn(seed)
    gap, flips = CalibrationGap(), Flips()
    for a, b in itertools.pairwise([0, *sorted(cuts), 60]):
        gap.update(before[a:b], after[a:b], labels[a:b])
        flips.update(before[a:b], after[a:b], labels[a:b])
    assert gap.compute().item() == pytest.approx(error_of(after, labels) - error_of(before, labels), abs=1e-6)
    assert {name: int(value) for name, value in flips.compute().items()} == flips_by_hand(before, after, labels)


def work(rank: int, world: int, folder: Path) -> dict[str, float]:
    """One of several processes, each with a share of another size; what all of them together find."""
    dist.init_process_group("gloo")
    before, after, labels = (values.split([17, 43])[rank] for values in drawn(0))
    gap, flips = CalibrationGap(), Flips()
    for metric in (gap, flips):
        metric.update(before, after, labels)
    counts = {name: int(value) for name, value in flips.compute().items()}
    return {"gap": gap.compute().item(), **counts, "own": int(flips.right_to_wrong)}


@pytest.mark.distributed
def test_two_processes_find_what_one_does(tmp_path):
    before, after, labels = drawn(0)
    results = launching.run(__name__, 2, tmp_path)
    expected = flips_by_hand(before, after, labels)
    for result in results:
        assert result["gap"] == pytest.approx(error_of(after, labels) - error_of(before, labels), abs=1e-6)
        assert {name: result[name] for name in expected} == expected
    assert sum(result["own"] for result in results) == expected["right_to_wrong"]  # each had a share


def test_merged_states_are_those_of_the_whole():
    before, after, labels = drawn(1)
    whole, parts = CalibrationGap(), [CalibrationGap() for _ in range(2)]
    whole.update(before, after, labels)
    for part, *own in zip(parts, *(values.split([50, 10]) for values in (before, after, labels)), strict=True):
        part.update(*own)
    parts[0].merge_state(parts[1])
    assert parts[0].compute().item() == pytest.approx(whole.compute().item(), abs=1e-12)


def test_padding_and_nan():
    before, after, labels = drawn(2, rows=6)
    padded = torch.cat([labels, torch.tensor([-100])])
    broken = torch.cat([after, torch.full((1, 4), math.nan)])
    more = torch.cat([before, before[:1]])
    for metric in (CalibrationGap, Flips):
        one, other = metric(), metric()
        one.update(before, after, labels)
        other.update(more.view(7, 1, 4), broken.view(7, 1, 4), padded.view(7, 1))
        assert one.compute() == other.compute()
    flips = Flips()
    flips.update(torch.tensor([[0.0, 1.0]]), torch.tensor([[math.nan, 1.0]]), torch.tensor([0]))
    flips.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[math.nan, 0.0]]), torch.tensor([0]))
    assert flips.compute() == {"right_to_wrong": 1, "wrong_to_right": 0}


def test_nothing_seen_is_nan_and_bf16_states_still_count():
    before, after, labels = drawn(3)
    gap = CalibrationGap()
    gap.update(before[:0], after[:0], labels[:0])
    assert math.isnan(gap.compute())
    gap.reset()
    gap.to(torch.bfloat16)
    gap.update(before, after, labels)
    assert gap.compute().item() == pytest.approx(error_of(after, labels) - error_of(before, labels), abs=1e-6)


@pytest.mark.parametrize("metric", [CalibrationGap, Flips])
@pytest.mark.parametrize(
    ("shapes", "labels", "error", "message"),
    [
        (((4, 3), (4, 2)), torch.zeros(4).long(), ValueError, r"\(4, 3\) and \(4, 2\)"),
        (((4, 3), (4, 3)), torch.zeros(3).long(), ValueError, r"labels of shape \(4,\), got \(3,\)"),
        (((4, 3), (4, 3)), torch.zeros(4), TypeError, "integer labels, got torch.float32"),
    ],
)
def test_bad_batches_are_named(metric, shapes, labels, error, message):
    with pytest.raises(error, match=message):
        metric().update(*(torch.zeros(shape) for shape in shapes), labels)


def test_bins_below_one_are_an_error():
    with pytest.raises(ValueError, match="at least one bin, got bins=0"):
        CalibrationGap(bins=0)

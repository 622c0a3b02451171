"""The corrective bias against trying every bias."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.distillation.missing_class import corrective_bias


def errors(logits, labels, classes, bias):
    moved = logits.clone()
    moved[:, classes] += bias
    return int((moved.argmax(dim=1) != labels).sum())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.sampled_from([[3], [0, 2], [1, 2, 3]]))
def test_no_other_bias_makes_fewer_errors(seed, count, classes):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    # Eighths: equal margins occur, and no bias that is tried meets a margin.
    logits = (torch.randn(count, 4, generator=generator, dtype=torch.float64) * 8).round() / 8
    logits[:, classes] -= 2.0
    bias = corrective_bias(logits, labels, classes)
    tried = [errors(logits, labels, classes, step / 16 + 1 / 32) for step in range(-160, 160)]
    assert errors(logits, labels, classes, bias) == min(tried)


def test_a_missing_class_comes_back():
    """Hinton's missing 3s in small: all is learned but the bias."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (500,), generator=generator)
    logits = torch.randn(500, 10, generator=generator)
    logits[torch.arange(500), labels] += 4.0
    before = errors(logits, labels, [3], 0.0)
    logits[:, 3] -= 9.0
    assert errors(logits, labels, [3], 0.0) > before + 40
    bias = corrective_bias(logits, labels, [3])
    assert bias == pytest.approx(9.0, abs=1.5)
    assert errors(logits, labels, [3], bias) <= before


def test_what_is_right_already_is_left():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert corrective_bias(logits, torch.tensor([0, 1]), [1]) == 0.0


def test_bad_input_is_named():
    logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    for classes in ([], [0, 1, 2]):
        with pytest.raises(ValueError, match=r"expected some but not all of 3 classes, got .*; name those missed"):
            corrective_bias(logits, labels, classes)
    for wrong in (labels[:1], labels[:0]):
        with pytest.raises(ValueError, match=r"as many labels, got .*; gather them over validation batches"):
            corrective_bias(logits[: len(wrong) * 2], wrong, [1])

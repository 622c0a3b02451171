"""Which tokens count."""

from __future__ import annotations

import pytest
import torch

from lightning_compress.distillation.comparing import kept_tokens, unit

ATTENDED = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
LABELS = torch.tensor([[-100, 5, 6, -100], [7, -100, 8, 9]])


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_padding_and_missing_labels_are_left_out(kind):
    attended = ATTENDED.to(kind)
    assert torch.equal(kept_tokens(attended), ATTENDED == 1)
    assert torch.equal(kept_tokens(labels=LABELS), LABELS != -100)
    assert torch.equal(kept_tokens(attended, LABELS), (ATTENDED == 1) & (LABELS != -100))


def test_a_position_predicts_the_next_label():
    kept = kept_tokens(ATTENDED, LABELS, next_token=True)
    assert kept.tolist() == [[True, True, False, False], [False, True, True, False]]


def test_nothing_given_and_other_shapes_are_named():
    with pytest.raises(ValueError, match="got neither; without padding pass mask=None"):
        kept_tokens()
    with pytest.raises(ValueError, match=r"one shape, got \(2, 4\) and \(2, 3\); use kept_tokens with one of them"):
        kept_tokens(ATTENDED, LABELS[:, 1:])


def test_a_vector_without_direction_has_no_gradient_and_others_do():
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    (unit(vectors) * torch.tensor([1.0, 2.0])).sum().backward()
    assert vectors.grad[0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(vectors.grad[1], torch.tensor([-0.16, 0.12]) * 0.4)  # (I - uu')g / 5, u = (.6, .8)

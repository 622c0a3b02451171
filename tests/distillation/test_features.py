"""Losses of features against torch's own, and what they do not see."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lightning_compress.distillation.features import attention_transfer, cosine_distance, feature_mse


def features(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for _ in range(2))


def test_mse_is_torchs_and_takes_a_mask_of_examples():
    student, teacher = features(0, (4, 3, 2, 2))
    torch.testing.assert_close(feature_mse(student, teacher), functional.mse_loss(student, teacher))
    kept = torch.tensor([1, 0, 0, 1])
    wanted = functional.mse_loss(student[kept == 1], teacher[kept == 1])
    torch.testing.assert_close(feature_mse(student, teacher, mask=kept), wanted)


def test_cosine_distance_is_the_loss_that_distilbert_takes():
    student, teacher = features(1, (2, 5, 8))
    own = functional.cosine_embedding_loss(student.flatten(0, 1), teacher.flatten(0, 1), torch.ones(10))
    torch.testing.assert_close(cosine_distance(student, teacher), own)
    torch.testing.assert_close(cosine_distance(3 * student, teacher), own)  # lengths are not seen
    assert float(cosine_distance(student, -student)) == pytest.approx(2.0)
    assert float(cosine_distance(torch.zeros(1, 3), torch.ones(1, 3))) == pytest.approx(0.5)


def test_attention_transfer_is_the_authors_normalized_difference():
    student, teacher = features(2, (4, 3, 5, 5))
    maps = [functional.normalize(value.pow(2).mean(1).flatten(1)) for value in (student, teacher)]
    torch.testing.assert_close(attention_transfer(student, teacher), (maps[0] - maps[1]).pow(2).sum(1).mean())


def test_attention_transfer_sees_neither_channels_nor_sizes():
    student, _ = features(3, (2, 4, 3, 3))
    wide = torch.cat([student, -student], dim=1) * 7
    assert attention_transfer(student, wide[:, torch.randperm(8)]) < 1e-10


def test_attention_transfer_of_other_resolutions_and_powers_is_refused_with_a_cure():
    student, teacher = torch.zeros(2, 3, 8, 8), torch.zeros(2, 5, 4, 4)
    with pytest.raises(ValueError, match=r"spatial size, got \(2, 3, 8, 8\) and \(2, 5, 4, 4\); tap layers of one"):
        attention_transfer(student, teacher)
    with pytest.raises(ValueError, match=r"expected feature maps .*got \(2, 3\) and \(2, 3\)"):
        attention_transfer(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"expected a power of at least 1, got 0.5; 2 is the paper's choice"):
        attention_transfer(student, student, power=0.5)

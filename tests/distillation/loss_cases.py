"""Every distillation loss with what it promises: one row a loss (and an option that changes its course)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_compress.distillation.attention import attention_mse, query_key_relation, value_relation
from lightning_compress.distillation.correlation import Standardized, dist
from lightning_compress.distillation.features import attention_transfer, cosine_distance, feature_mse
from lightning_compress.distillation.gradients import gradient_matching
from lightning_compress.distillation.losses import (
    decoupled,
    hard_labels,
    jensen_shannon,
    logit_mse,
    reverse_kl,
    soft_targets,
)
from lightning_compress.distillation.relations import (
    contrastive,
    relational_angle,
    relational_distance,
    similarity_preserving,
)
from tests.distillation import losses_by_hand

LOGITS, TOKENS, IMAGES, HEADS, MAPS = (6, 5), (2, 4, 5), (4, 3, 2, 2), (2, 2, 4, 3), (2, 2, 4, 4)


def twisted(pair_loss):
    """The queries are given, the keys made of them: a loss of two pairs as one of two tensors."""

    def loss(student, teacher, **options):
        pairs = ((value, value[..., [*range(1, value.shape[-1]), 0]]) for value in (student, teacher))
        return pair_loss(*pairs, **options)

    return loss


@dataclass(frozen=True)
class Case:
    """A loss, shapes that it takes, and which promises are its own."""

    name: str
    loss: Callable[..., torch.Tensor]
    by_hand: Callable[..., float]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    wide: tuple[int, ...] | None = None  # the teacher's shape where it may differ
    mask: str | None = None  # what a mask is over: "leading", "heads" (dimension 2) or "pairs" (2 and 3)
    labelled: bool = False
    softened: bool = False  # takes a temperature
    zero: bool = True  # 0 at equality
    symmetric: bool = False
    shards: bool = True  # equal shards average to the whole
    logits: bool = False

    def __str__(self) -> str:
        return self.name

    def pair(self, seed, dtype=torch.float32, shape=None):
        generator = torch.Generator().manual_seed(seed)
        shapes = (shape or self.shape, shape or self.wide or self.shape)
        return tuple((2 * torch.randn(each, generator=generator, dtype=torch.float64)).to(dtype) for each in shapes)

    def labels(self, seed):
        generator = torch.Generator().manual_seed(seed + 1)
        return torch.randint(0, self.shape[-1], self.shape[:-1], generator=generator)

    def extra(self, seed, part=slice(None)):
        return {**self.options, "labels": self.labels(seed)[part]} if self.labelled else self.options

    def value(self, student, teacher, seed=0, part=slice(None), **more):
        return self.loss(student, teacher, **self.extra(seed, part), **more)

    def mask_shape(self):
        if self.mask == "leading":
            return self.shape[:-1] if self.logits else self.shape[:-1][:2]
        return (self.shape[0], self.shape[2])

    def spoiled(self, value, mask, by):
        """A copy of `value` with `by` wherever the mask does not keep it."""
        if self.mask == "leading":
            kept = mask.reshape(mask.shape + (1,) * (value.dim() - mask.dim()))
        else:
            kept = mask[:, None, :, None]
            kept = kept & mask[:, None, None, :] if self.mask == "pairs" else kept
        return value.masked_fill(~kept, by)


def logit_case(name, loss, by_hand, **more):
    return Case(name, loss, by_hand, **{"shape": LOGITS, "mask": "leading", "logits": True, **more})


hand = losses_by_hand
CASES = [
    logit_case("soft_targets", soft_targets, hand.soft_targets, softened=True),
    logit_case("soft_targets of tokens", soft_targets, hand.soft_targets, softened=True, shape=TOKENS),
    logit_case("hard_labels", hard_labels, hand.hard_labels, zero=False),
    logit_case("logit_mse", logit_mse, hand.logit_mse, symmetric=True),
    logit_case("reverse_kl", reverse_kl, hand.reverse_kl, softened=True, shape=TOKENS),
    logit_case("jensen_shannon", jensen_shannon, hand.jensen_shannon, softened=True, symmetric=True),
    logit_case("jensen_shannon 0.1", jensen_shannon, hand.jensen_shannon, options={"beta": 0.1}, softened=True),
    logit_case("decoupled", decoupled, hand.decoupled, labelled=True, softened=True),
    logit_case("decoupled of tokens", decoupled, hand.decoupled, labelled=True, softened=True, shape=TOKENS),
    logit_case("dist", dist, hand.dist, softened=True, shards=False, symmetric=True),
    logit_case("dist of tokens", dist, hand.dist, softened=True, shards=False, symmetric=True, shape=TOKENS),
    logit_case("dist between classes", dist, hand.dist, options={"intra": 0.0}, softened=True, symmetric=True),
    logit_case("standardized", Standardized(), hand.standardized_soft_targets, softened=True),
    Case("feature_mse", feature_mse, hand.feature_mse, IMAGES, symmetric=True),
    Case("feature_mse of tokens", feature_mse, hand.feature_mse, TOKENS, symmetric=True, mask="leading"),
    Case("cosine_distance", cosine_distance, hand.cosine_distance, TOKENS, symmetric=True, mask="leading"),
    Case("attention_transfer", attention_transfer, hand.attention_transfer, IMAGES, wide=(4, 5, 2, 2), symmetric=True),
    Case("attention_transfer, sum of |x|", attention_transfer, hand.attention_transfer, IMAGES, {"power": 1.0}),
    Case("attention_mse", attention_mse, hand.feature_mse, MAPS, symmetric=True, mask="pairs"),
    Case(
        "query_key_relation", twisted(query_key_relation), twisted(hand.query_key_relation), HEADS,
        wide=(2, 2, 4, 5), mask="heads",
    ),
    Case("value_relation", value_relation, hand.value_relation, HEADS, wide=(2, 2, 4, 5), mask="heads"),
    Case("value_relation, causal", value_relation, hand.value_relation, HEADS, {"causal": True}, mask="heads"),
    Case(
        "similarity_preserving", similarity_preserving, hand.similarity_preserving, (4, 3, 2), wide=(4, 5),
        symmetric=True, shards=False,
    ),
    Case(
        "relational_distance", relational_distance, hand.relational_distance, (4, 3), wide=(4, 5), symmetric=True,
        shards=False,
    ),
    Case(
        "relational_angle", relational_angle, hand.relational_angle, (4, 3), wide=(4, 5), symmetric=True, shards=False
    ),
    Case("contrastive", contrastive, hand.contrastive, (4, 3), symmetric=True, shards=False, zero=False),
    Case("gradient_matching", gradient_matching, hand.gradient_matching, IMAGES, symmetric=True),
    Case("gradient_matching of lengths", gradient_matching, hand.gradient_matching, IMAGES, {"normalize": False}),
]  # fmt: skip
MASKED = [case for case in CASES if case.mask]
SOFTENED = [case for case in CASES if case.softened or case.name == "contrastive"]

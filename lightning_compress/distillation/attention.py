"""Distillation losses of self-attention: what each token looks at, and how its values relate to the others'.

Each is a mean over kept tokens and heads, and is computed in float32 (float64 if given). A padded token is looked at by
nobody and does not count itself; where nothing is kept the loss is 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from lightning_compress.distillation.comparing import (
    check_mask,
    divergence,
    kept_mean,
    paired,
    possible,
    products,
    widened,
)

__all__ = ["attention_mse", "query_key_relation", "split_heads", "value_relation"]

Pair = tuple[Tensor, Tensor]


def split_heads(projected: Tensor, heads: int) -> Tensor:
    """Return (batch, heads, tokens, width / heads) of the output of a query, key or value layer. Runs in each step.

    Args:
        projected: (batch, tokens, width).
        heads: the layer's heads; or, to compare models of different heads, any number of relation heads (Wang et al.
            2021, "MiniLMv2", section 3.1) that divides both widths.

    Raises:
        ValueError: the heads do not divide the width.

    >>> split_heads(torch.zeros(2, 5, 12), 3).shape
    torch.Size([2, 3, 5, 4])
    """
    if heads < 1 or projected.dim() != 3 or projected.shape[-1] % heads:
        raise ValueError(
            f"expected (batch, tokens, width) with a width that {heads} heads divide, got {tuple(projected.shape)}; "
            f"choose heads that divide the widths of student and teacher"
        )
    return projected.reshape(*projected.shape[:2], heads, projected.shape[2] // heads).transpose(1, 2)


def attention_mse(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared difference of attention maps, over heads and pairs of kept tokens. Runs in each step.

    Jiao et al. 2020, "TinyBERT", equation 7; the paper takes scores before the softmax, probabilities work as well.

    Args:
        student: (batch, heads, tokens, tokens). What a mask made -inf in both does not count.
        teacher: the same shape.
        mask: (batch, tokens) the tokens that count.

    Returns:
        () float32.

    Raises:
        ValueError: other shapes.

    >>> attention_mse(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), mask=torch.tensor([[1, 0]]))
    tensor(1.)
    """
    student, teacher = paired(student, teacher, cure="tap layers with as many heads, or take the mean over the heads")
    kept = possible(student, teacher)
    if mask is not None:
        check_mask(mask, (student.shape[0], student.shape[2]))
        token = mask.bool()
        kept = kept & (token[:, None, :, None] & token[:, None, None, :])
    student, teacher = (value.masked_fill(~kept, 0.0) for value in (student, teacher))
    return kept_mean((student - teacher).square(), kept)


def query_key_relation(student: Pair, teacher: Pair, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Return KL(teacher || student) of softmax(Q K^T / sqrt(width)), the attention distributions. Runs in each step.

    Wang et al. 2020, "MiniLM", section 3.1: of the last layer only, so that the number of layers is free; the heads'
    widths may differ.

    Args:
        student: its queries and keys, each (batch, heads, tokens, head width), from `split_heads`.
        teacher: the same; heads and tokens must agree with the student's.
        mask: (batch, tokens) the tokens that count.
        causal: a token sees only itself and those before it.

    Returns:
        () float32.

    Raises:
        ValueError: other shapes.

    >>> one = torch.eye(2).reshape(1, 1, 2, 2)
    >>> query_key_relation((one, one), (one, one))
    tensor(0.)
    """
    _check_relation(*student, *teacher)
    if mask is not None:
        check_mask(mask, (student[0].shape[0], student[0].shape[2]))
    seen = _seen(student[0], mask, causal)
    log_relations = (_log_relation(*widened(*pair), mask, seen) for pair in (student, teacher))
    got, wanted = widened(*log_relations)
    loss = divergence(wanted, got)
    return kept_mean(loss, None if mask is None else mask[:, None].expand_as(loss))


def value_relation(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Return KL(teacher || student) of softmax(V V^T / sqrt(width)), the value relations. Runs in each step.

    Wang et al. 2020, "MiniLM", section 3.2. Queries or keys in place of the values give the other relations of
    MiniLMv2 (Wang et al. 2021, section 3.1).

    Args:
        student: (batch, heads, tokens, head width), from `split_heads`.
        teacher: the same but for the width.
        mask: (batch, tokens) the tokens that count.
        causal: a token is related only to itself and those before it.

    Returns:
        () float32.

    Raises:
        ValueError: other shapes.

    >>> value_relation(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 5))
    tensor(0.)
    """
    return query_key_relation((student, student), (teacher, teacher), mask=mask, causal=causal)


def _log_relation(left: Tensor, right: Tensor, mask: Tensor | None, seen: Tensor | None) -> Tensor:
    if mask is not None:
        padding = ~mask.bool()[:, None, :, None]
        left, right = left.masked_fill(padding, 0.0), right.masked_fill(padding, 0.0)
    scores = products(left, right.transpose(-1, -2)) / math.sqrt(left.shape[-1])
    return functional.log_softmax(scores if seen is None else scores.masked_fill(~seen, -math.inf), dim=-1)


def _seen(queries: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """Return which key (last) each query (before it) sees; None is all."""
    seen = None
    if causal:
        seen = torch.ones(queries.shape[2], queries.shape[2], dtype=torch.bool, device=queries.device).tril()
    if mask is None:
        return seen
    token = mask.bool()
    keys = token[:, None, None, :] if seen is None else token[:, None, None, :] & seen
    # A padded token before all others would see nothing, which is NaN (named by detect_anomaly); its row does not
    # count, so it sees everything.
    return keys | ~token[:, None, :, None]


def _check_relation(*given: Tensor) -> None:
    shapes = [tuple(value.shape) for value in given]
    one_of_each = shapes[0] == shapes[1] and shapes[2] == shapes[3]
    if not one_of_each or shapes[0][:3] != shapes[2][:3] or {len(shape) for shape in shapes} != {4}:
        raise ValueError(
            f"expected queries and keys (batch, heads, tokens, head width) that agree in all but the width, got "
            f"{shapes[0]} and {shapes[1]} from the student, {shapes[2]} and {shapes[3]} from the teacher; "
            f"split_heads gives both the same heads"
        )

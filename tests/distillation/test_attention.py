"""Losses of self-attention against the attention that models really compute."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertModel

from lightning_compress.distillation.attention import attention_mse, query_key_relation, split_heads, value_relation


def tiny_bert(width):
    torch.manual_seed(width)
    config = BertConfig(
        vocab_size=20, hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=8, attn_implementation="eager", initializer_range=1.0,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


def queries_and_keys(bert, **inputs):
    """The outputs of the query and key layers, as a tap reads them, and the attention maps of the model itself."""
    attention, seen = bert.encoder.layer[0].attention.self, []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: seen.append(split_heads(output, 2)))
        for layer in (attention.query, attention.key)
    ]
    with torch.no_grad():
        maps = bert(**inputs, output_attentions=True).attentions[0]
    for hook in hooks:
        hook.remove()
    return tuple(seen), maps


def test_the_relation_of_queries_and_keys_is_that_of_berts_attention_maps():
    ids, mask = torch.arange(10).reshape(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    (student, got), (teacher, wanted) = (
        queries_and_keys(tiny_bert(width), input_ids=ids, attention_mask=mask) for width in (8, 12)
    )
    terms = torch.xlogy(wanted, wanted) - torch.xlogy(wanted, got)
    kept = terms.sum(-1).transpose(1, 2)[mask.bool()]  # (kept tokens, heads)
    torch.testing.assert_close(query_key_relation(student, teacher, mask=mask), kept.mean())
    assert kept.mean() > 0.01


def test_a_causal_relation_is_torchs_causal_attention():
    torch.manual_seed(0)
    student, teacher = ([torch.randn(2, 3, 4, 6) for _ in range(2)] for _ in range(2))
    identity = torch.eye(4).expand(2, 3, 4, 4)
    got, wanted = (
        functional.scaled_dot_product_attention(*pair, identity, is_causal=True) for pair in (student, teacher)
    )
    terms = torch.xlogy(wanted, wanted) - torch.xlogy(wanted, got.clamp_min(1e-30))
    loss = query_key_relation(tuple(student), tuple(teacher), causal=True)
    torch.testing.assert_close(loss, terms.sum(-1).mean())


def test_scores_that_a_mask_made_minus_infinite_do_not_count():
    torch.manual_seed(0)
    future = torch.ones(4, 4, dtype=torch.bool).triu(1)
    student, teacher = (torch.randn(2, 3, 4, 4).masked_fill(future, -torch.inf) for _ in range(2))
    student.requires_grad_()
    loss = attention_mse(student, teacher)
    torch.testing.assert_close(loss, (student - teacher)[..., ~future].square().mean())
    loss.backward()
    assert student.grad.isfinite().all()


def test_left_padding_under_a_causal_mask_is_finite():
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 2, 4, 3, requires_grad=True), torch.randn(1, 2, 4, 3)
    mask = torch.tensor([[0, 0, 1, 1]])
    loss = value_relation(student, teacher, mask=mask, causal=True)
    with torch.autograd.set_detect_anomaly(True):  # names a NaN on the way, even where nothing comes of it
        loss.backward()
    torch.testing.assert_close(loss, value_relation(student[:, :, 2:], teacher[:, :, 2:], causal=True))
    assert student.grad.isfinite().all()


def test_heads_that_do_not_divide_the_width_are_named():
    with pytest.raises(ValueError, match=r"a width that 5 heads divide, got \(2, 3, 8\); choose heads that divide"):
        split_heads(torch.zeros(2, 3, 8), 5)


@pytest.mark.parametrize(
    "shape", [(2, 4, 5, 3), (2, 2, 6, 3), (1, 2, 5, 3)], ids=["other heads", "other tokens", "other batch"]
)
def test_relations_that_do_not_match_are_named(shape):
    student, teacher = torch.zeros(2, 2, 5, 3), torch.zeros(shape)
    with pytest.raises(ValueError, match=r"\(2, 2, 5, 3\) and .* from the student, .*split_heads gives both the same"):
        query_key_relation((student, student), (teacher, teacher))
    with pytest.raises(ValueError, match="agree in all but the width"):
        query_key_relation((student, teacher), (student, student))

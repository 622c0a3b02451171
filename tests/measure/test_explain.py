"""Attributions of two models: against integrals and ranks computed by hand, on the demo's network and a small BERT."""

from __future__ import annotations

import builtins
import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lightning_compress.demo import FashionClassifier
from lightning_compress.demo_data import load_fashion_mnist
from lightning_compress.measure.attributions import Attributions
from lightning_compress.measure.explain import compare_attributions
from lightning_compress.measure.ranks import average_ranks, spearman, top_overlap

pytest.importorskip("captum", reason="needs captum: pip install 'lightning-compress[report]'")


@pytest.fixture(scope="module")
def images():
    return load_fashion_mnist()[1].tensors[0][::250].clone()  # 4 of them, of several classes


@pytest.fixture(scope="module")
def trained():
    """The demo's network after 16 steps on its images."""
    torch.manual_seed(0)
    net, (inputs, labels) = FashionClassifier(), load_fashion_mnist()[0].tensors
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    for batch in torch.randperm(len(inputs))[:1024].split(64):
        loss = functional.cross_entropy(net(inputs[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.zero_grad()
    return net


@pytest.fixture(scope="module")
def pruned(trained):
    """The same network with the smallest 90 % of each weight of two or more dimensions at zero."""
    net = copy.deepcopy(trained)
    with torch.no_grad():
        for weight in (p for p in net.parameters() if p.dim() > 1):
            weight[weight.abs() <= weight.abs().flatten().kthvalue(int(0.9 * weight.numel())).values] = 0.0
    return net


def ranks_by_hand(values):
    values = np.asarray(values)
    return np.array([1 + (values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


series = st.lists(st.integers(-3, 3), min_size=2, max_size=12)


@given(series, st.randoms(use_true_random=False))
def test_rank_correlation_is_pearsons_over_average_ranks(first, random):
    second = first[:]
    random.shuffle(second)
    np.testing.assert_array_equal(average_ranks(torch.tensor(first)).numpy(), ranks_by_hand(first))
    got = spearman(torch.tensor(first), torch.tensor(second))
    if len(set(first)) == 1:
        assert math.isnan(got)
    else:
        assert got == pytest.approx(np.corrcoef(ranks_by_hand(first), ranks_by_hand(second))[0, 1], abs=1e-12)


@given(series)
def test_rank_correlation_has_its_ends_and_ignores_the_scale(values):
    first = torch.tensor(values, dtype=torch.float64)
    if len(set(values)) > 1:
        assert spearman(first, first.exp()) == pytest.approx(1.0)
        assert spearman(first, -first) == pytest.approx(-1.0)


def test_a_series_that_is_not_finite_has_no_rank_correlation():
    assert math.isnan(spearman(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0])))


def test_top_overlap_goes_by_size_without_sign():
    first, second = torch.tensor([-9.0, 1.0, 5.0, 0.0]), torch.tensor([8.0, 7.0, 0.0, 1.0])
    assert [top_overlap(first, second, share) for share in (0.01, 0.25, 0.5, 1.0)] == [1.0, 1.0, 0.5, 1.0]


@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion"])
def test_a_copy_looks_at_the_same_and_a_pruned_network_at_less(trained, pruned, images, method):
    same = compare_attributions(trained, copy.deepcopy(trained), images, method=method)
    assert same.rank_agreement() == pytest.approx([1.0] * 4)
    assert same.top_overlap() == [1.0] * 4
    less = compare_attributions(trained, pruned, images, method=method, steps=16)
    assert max(less.rank_agreement()) < 0.99
    assert max(less.top_overlap()) < 1.0
    assert less.dense.shape == less.compressed.shape == images.shape


def test_integrated_gradients_are_complete_and_the_sum_along_the_way(trained, pruned, images):
    found = compare_attributions(trained, pruned, images, steps=64)
    net = copy.deepcopy(trained).eval()
    with torch.no_grad():
        rows = torch.arange(len(images))
        rise = (net(images) - net(torch.zeros_like(images)))[rows, found.targets]
        assert torch.equal(found.targets, net(images).argmax(1))
    assert found.dense.sum((1, 2, 3)).numpy() == pytest.approx(rise.numpy(), rel=0.02, abs=0.02)
    assert found.gaps[0].numpy() == pytest.approx((found.dense.sum((1, 2, 3)) - rise).numpy(), abs=1e-3)
    assert found.gaps[1].abs().max() < 0.02 * rise.abs().max()

    # The middle of each of 200 pieces of the way from zero, by hand.
    image = images[:1]
    way = ((torch.arange(200) + 0.5) / 200).view(-1, 1, 1, 1) * image
    way.requires_grad_()
    (gradient,) = torch.autograd.grad(net(way)[:, found.targets[0]].sum(), way)
    by_hand = gradient.mean(0) * image[0]
    assert spearman(found.dense[0].flatten(), by_hand.flatten()) > 0.99
    assert (found.dense[0] - by_hand).norm() < 0.1 * by_hand.norm()


def test_of_a_linear_model_both_methods_give_weight_times_input():
    torch.manual_seed(0)
    net, inputs = nn.Linear(5, 3), torch.randn(4, 5)
    target = torch.tensor([0, 1, 2, 1])
    wanted = (net.weight[target] * inputs).detach()
    for method in ("integrated_gradients", "occlusion"):
        found = compare_attributions(net, net, inputs, target, method=method)
        torch.testing.assert_close(found.dense, wanted, rtol=1e-4, atol=1e-5)


def test_a_function_may_attribute():
    def gradient(model, inputs, target):
        inputs = inputs.clone().requires_grad_()
        return torch.autograd.grad(model(inputs).gather(1, target[:, None]).sum(), inputs)[0]

    net, other = nn.Linear(5, 3), nn.Linear(5, 3)
    found = compare_attributions(net, other, torch.randn(2, 5), torch.tensor([0, 2]), method=gradient)
    torch.testing.assert_close(found.compressed, other.weight[[0, 2]].detach())
    assert (found.method, found.gaps) == ("gradient", None)


def test_models_are_left_as_they_were(trained, images):
    dense, other = copy.deepcopy(trained).train(), copy.deepcopy(trained).eval()
    dense.hidden.eval()
    modes = [part.training for part in dense.modules()]
    state = copy.deepcopy(dense.state_dict())
    compare_attributions(dense, other, images, steps=8)
    assert [part.training for part in dense.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())
    assert all(parameter.grad is None for net in (dense, other) for parameter in net.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in dense.modules())


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    net = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(4.0)  # of 0.02 at the start, with which all answers are nearly the same
    return net


def test_tokens_are_explained_through_their_embedding_without_padding():
    net, other = bert(), bert()
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight[:, ::2] = 0.0
    ids, mask = torch.randint(1, 50, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    inputs, options = {"input_ids": ids, "attention_mask": mask}, {"embedding": "bert.embeddings", "steps": 128}
    found = compare_attributions(net, other, inputs, **options)
    assert found.dense.shape == found.compressed.shape == (2, 8)
    assert torch.equal(found.kept, mask.bool())
    with torch.no_grad():
        net.eval()
        rise = net(**inputs).logits - net(input_ids=torch.zeros_like(ids), attention_mask=mask).logits
    assert found.dense.sum(1).numpy() == pytest.approx(rise[[0, 1], found.targets].numpy(), rel=0.02, abs=1e-3)
    assert rise.abs().max() > 0.05
    assert compare_attributions(net, net, inputs, **options).rank_agreement() == pytest.approx([1.0, 1.0])
    assert min(found.rank_agreement()) < 1.0

    nonsense = found.dense.clone()
    nonsense[1, 5:] = 1e6 * torch.arange(1, 4)
    moved = Attributions("", ids, found.targets, nonsense, found.compressed, found.kept)
    assert moved.rank_agreement() == found.rank_agreement()


def test_tokens_can_be_occluded_without_an_embedding():
    net = bert()
    ids = torch.randint(1, 50, (2, 6))
    found = compare_attributions(net, net, {"input_ids": ids}, torch.tensor([0, 1]), method="occlusion")
    with torch.no_grad():
        net.eval()
        without = ids.clone()
        without[:, 2] = 0
        by_hand = (net(ids).logits - net(without).logits)[[0, 1], [0, 1]]
    torch.testing.assert_close(found.dense[:, 2].float(), by_hand, rtol=1e-3, atol=1e-4)


def test_numbers_are_plain_and_a_constant_has_none():
    flat = torch.zeros(2, 3)
    sides = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    got = Attributions("mine", flat, torch.tensor([0, 1]), sides, torch.stack([flat[0], sides[1]])).json()
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert (got["rank_agreement"], got["mean_rank_agreement"]) == ([None, pytest.approx(1.0)], pytest.approx(1.0))
    assert Attributions("mine", flat, flat[:, 0], flat, flat).mean_rank_agreement() is None


IDS = torch.ones(2, 3, dtype=torch.long)
WRONG = [
    ({"method": "saliency"}, ValueError, "integrated_gradients, occlusion, or a function, got 'saliency'"),
    ({"target": torch.tensor([1])}, ValueError, r"each of the 2 examples, got shape \(1,\)"),
    ({"method": "occlusion", "embedding": "0"}, ValueError, "embedding is for integrated gradients"),
]


@pytest.mark.parametrize(("options", "kind", "named"), WRONG, ids=[named for _, _, named in WRONG])
def test_wrong_options_are_named(options, kind, named):
    net = nn.Linear(3, 2)
    with pytest.raises(kind, match=named):
        compare_attributions(net, net, torch.ones(2, 3), **options)


def test_token_ids_without_an_embedding_and_other_outputs_are_named():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(ValueError, match=r"got torch.int64; for token ids name the module"):
        compare_attributions(net, net, IDS)
    with pytest.raises(ValueError, match=r"logits of shape \(examples, classes\), got \(2, 3, 4\)"):
        compare_attributions(net[0], net[0], IDS, torch.zeros(2, dtype=torch.long), method="occlusion")


def test_without_captum_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **named):
        if name.partition(".")[0] == "captum":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    net = nn.Linear(3, 2)
    with pytest.raises(ImportError, match=r"lightning-compress\[report\]"):
        compare_attributions(net, net, torch.ones(2, 3))

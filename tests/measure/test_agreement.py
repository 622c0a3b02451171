"""Agreement and divergence of two models' logits: NumPy's numbers, whatever the batches and processes."""

from __future__ import annotations

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.measure import Agreement, MeanDivergence, agreement

METRICS = (Agreement, MeanDivergence)
STATES = {Agreement: ("agreeing", "total"), MeanDivergence: ("divergence", "total")}


def by_hand(first, second, mask):
    """Share of equal arg max, and mean KL in nats, over the kept rows; all in NumPy."""
    rows = [
        logits.double().numpy().reshape(-1, logits.shape[-1])[mask.numpy().reshape(-1)] for logits in (first, second)
    ]
    p, q = (np.exp(each - each.max(1, keepdims=True)) for each in rows)
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    return float(np.mean(p.argmax(1) == q.argmax(1))), float(np.mean((p * np.log(p / q)).sum(1)))


def drawn(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    first, second = (3 * torch.randn(*shape, generator=generator) for _ in range(2))
    mask = torch.rand(shape[:-1], generator=generator) < 0.7
    mask.view(-1)[0] = True
    return first, second, mask


def measured(metric, *batches):
    for batch in batches:
        metric.update(*batch)
    return metric.compute().item()


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 999),
    shape=st.sampled_from([(12, 3), (12, 2, 4), (12, 1), (12, 2, 2, 5)]),
    cuts=st.lists(st.integers(0, 12), max_size=4),
)
def test_any_split_into_batches_gives_the_numbers_of_the_whole(seed, shape, cuts):
    first, second, mask = drawn(seed, shape)
    places = [0, *sorted(cuts), 12]
    parts = [(first[a:b], second[a:b], mask[a:b]) for a, b in itertools.pairwise(places)]
    expected = by_hand(first, second, mask)
    assert measured(Agreement(), *parts) == expected[0]
    assert measured(MeanDivergence(), *parts) == pytest.approx(expected[1], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("sizes", [(5, 7), (11, 1), (12, 0)])
def test_processes_with_unequal_shares_give_the_numbers_of_one(metric, sizes):
    first, second, mask = drawn(0, (12, 2, 4))
    parts = [tuple(value.split(sizes)[rank] for value in (first, second, mask)) for rank in (0, 1)]

    def gather(value, group):
        name = next(name for name, own in states[0].items() if own is value)
        return [state[name] for state in states]

    ranks = [metric(dist_sync_fn=gather, distributed_available_fn=lambda: True) for _ in parts]
    for rank, part in zip(ranks, parts, strict=True):
        rank.update(*part)
    states = [{name: getattr(rank, name) for name in STATES[metric]} for rank in ranks]
    expected = by_hand(first, second, mask)[metric is MeanDivergence]
    assert ranks[0].compute().item() == pytest.approx(expected, rel=1e-12)
    alone = metric()
    alone.update(*parts[1])
    alone.merge_state(states[0])
    assert alone.compute().item() == pytest.approx(expected, rel=1e-12)


def test_a_model_agrees_with_itself_to_the_last_bit():
    first, _, _ = drawn(1, (7, 5, 9))
    assert measured(Agreement(), (first, first.clone())) == 1.0
    assert measured(MeanDivergence(), (first, first.clone())) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_dtype_is_measured_in_float64(dtype):
    first, second, mask = drawn(2, (6, 4))
    first, second = first.to(dtype), second.to(dtype)
    got = measured(MeanDivergence(), (first, second, mask))
    assert got == pytest.approx(by_hand(first, second, mask)[1], rel=1e-12)


def test_a_tiny_divergence_is_not_rounding():
    first = torch.linspace(-3.0, 3.0, 50)[None]
    second = first.double() + 1e-5 * torch.linspace(-1.0, 1.0, 50).double().cos()
    p = first.double().softmax(-1)
    change = (second - first.double())[0]
    expected = 0.5 * float((p[0] * change**2).sum() - (p[0] * change).sum() ** 2)  # half the variance under p
    assert measured(MeanDivergence(), (first, second)) == pytest.approx(expected, rel=1e-3)


def test_many_classes_go_in_pieces(monkeypatch):
    first, second, mask = drawn(3, (9, 2, 5))
    whole = measured(MeanDivergence(), (first, second, mask))
    monkeypatch.setattr(agreement, "CHUNK", 17)
    assert measured(MeanDivergence(), (first, second, mask)) == pytest.approx(whole, rel=1e-14)


def test_the_order_of_the_models_matters_to_the_divergence_only():
    first, second, mask = drawn(4, (20, 3))
    there, back = (measured(MeanDivergence(), pair) for pair in ((first, second, mask), (second, first, mask)))
    assert abs(there - back) > 0.1
    assert measured(Agreement(), (first, second, mask)) == measured(Agreement(), (second, first, mask))


@pytest.mark.parametrize("hole", [math.nan, math.inf])
def test_what_the_mask_leaves_out_changes_nothing_whatever_it_is(hole):
    first, second, _ = drawn(5, (4, 3))
    broken = first.clone()
    broken[1] = hole
    kept = torch.tensor([1, 0, 1, 1])
    for metric in METRICS:
        assert measured(metric(), (broken, second, kept)) == measured(metric(), (first, second, kept))


def test_nan_agrees_with_nothing_and_shows_in_the_mean():
    broken, whole = torch.tensor([[math.nan, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    for pair in ((broken, broken), (broken, whole), (whole, broken)):
        assert measured(Agreement(), pair) == 0.5
        assert math.isnan(measured(MeanDivergence(), pair))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([0.0, -math.inf], [0.0, 0.0], math.log(2)),
        ([0.0, -math.inf], [0.0, -math.inf], 0.0),
        ([0.0, 0.0], [0.0, -math.inf], math.inf),
    ],
)
def test_classes_that_are_ruled_out(first, second, expected):
    assert measured(MeanDivergence(), (torch.tensor([first]), torch.tensor([second]))) == pytest.approx(expected)


def test_of_equally_likely_classes_the_first_counts():
    even = torch.zeros(1, 3)
    assert measured(Agreement(), (even, torch.tensor([[1.0, 0.0, 0.0]]))) == 1.0
    assert measured(Agreement(), (even, torch.tensor([[0.0, 1.0, 0.0]]))) == 0.0


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_kept_is_nan_and_a_reset_forgets(metric):
    first, second, _ = drawn(6, (3, 2))
    counter = metric()
    assert math.isnan(measured(counter, (first, second, torch.zeros(3))))
    assert math.isfinite(measured(counter, (first, second)))
    counter.reset()
    assert math.isnan(measured(counter, (first[:0], second[:0])))


@pytest.mark.parametrize("metric", METRICS)
def test_counts_keep_their_dtype_and_travel(metric):
    first, second, mask = drawn(7, (5, 4))
    counter = metric().to(torch.bfloat16)
    counter.half()
    value = measured(counter, (first.requires_grad_(), second, mask))
    dtypes = {getattr(counter, name).dtype for name in STATES[metric]}
    assert dtypes == ({torch.int64} if metric is Agreement else {torch.float64, torch.int64})
    assert pickle.loads(pickle.dumps(counter)).compute().item() == value
    assert not counter.compute().requires_grad


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("first", "second", "mask", "error", "message"),
    [
        ((4, 3), (4, 2), None, ValueError, r"\(4, 3\) and \(4, 2\); compare models with the same classes"),
        ((4, 3), (3,), None, ValueError, r"one shape \(..., classes\)"),
        ((), (), None, ValueError, r"one shape \(..., classes\), got \(\) and \(\)"),
        ((4, 0), (4, 0), None, ValueError, r"got \(4, 0\)"),
        ((4, 3), (4, 3), (4, 3), ValueError, r"expected a mask of shape \(4,\), got \(4, 3\)"),
        ((4, 2, 3), (4, 2, 3), (4,), ValueError, r"expected a mask of shape \(4, 2\), got \(4,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(metric, first, second, mask, error, message):
    with pytest.raises(error, match=message):
        metric().update(torch.zeros(first), torch.zeros(second), None if mask is None else torch.ones(mask))


@pytest.mark.parametrize("metric", METRICS)
def test_classes_are_no_logits(metric):
    with pytest.raises(TypeError, match=r"logits of a floating dtype, got torch.int64 and torch.float32; not classes"):
        metric().update(torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3))

"""Observers note extremes as often as they are asked and move the average once, from finite sights only."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress import sharding
from lightning_compress.quantization.observers import fold_extremes, move_ranges, widen

quick = settings(max_examples=50, deadline=None)
NAN, INF = float("nan"), float("inf")
values = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20)


@quick
@given(st.lists(values, min_size=1, max_size=4))
def test_pending_extremes_are_those_of_all_values_seen(batches):
    pending = None
    for batch in batches:
        pending = widen(pending, torch.tensor(batch))
        pending = widen(pending, torch.tensor(batch))  # a recomputation sees the same again
    everything = np.concatenate([np.array(batch, dtype=np.float32) for batch in batches])
    assert pending.tolist() == [-everything.min(), everything.max()]
    assert pending.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_extremes_are_float32_and_without_a_graph(dtype):
    value = torch.tensor([-2.0, 3.0], dtype=dtype, requires_grad=True)
    pending = widen(None, value)
    assert pending.dtype == torch.float32
    assert not pending.requires_grad


def test_an_empty_batch_shows_nothing():
    assert widen(None, torch.empty(0, 3)).tolist() == [-INF, -INF]
    seen = torch.tensor([1.0, 2.0])
    assert widen(seen, torch.empty(0, 3)).tolist() == [1.0, 2.0]
    assert move_ranges(torch.tensor([[1.0, 2.0]]), widen(None, torch.empty(0))[None], 0.5).tolist() == [[1.0, 2.0]]


@quick
@given(st.floats(0.015625, 1.0, width=32), st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=10))
def test_the_average_moves_as_by_hand(momentum, sights):
    ranges = torch.full((1, 2), NAN)
    expected = None
    for sight in sights:
        ranges = move_ranges(ranges, torch.tensor([[sight, 2 * sight]]), momentum)
        expected = sight if expected is None else expected + momentum * (sight - expected)
    assert ranges[0].tolist() == pytest.approx([expected, 2 * expected], rel=1e-4, abs=1e-3)


@pytest.mark.parametrize(
    ("before", "pending", "after"),
    [
        ([NAN, NAN], [1.0, 2.0], [1.0, 2.0]),  # the first sight as it is
        ([0.0, 1.0], [1.0, 2.0], [0.5, 1.5]),
        ([0.0, 1.0], [-INF, -INF], [0.0, 1.0]),  # not called in this step
        ([NAN, NAN], [-INF, -INF], [NAN, NAN]),  # never called
        ([0.0, 1.0], [NAN, NAN], [0.0, 1.0]),  # a diverged batch
        ([0.0, 1.0], [0.0, INF], [0.0, 1.0]),
        ([NAN, NAN], [0.0, INF], [NAN, NAN]),
    ],
)
def test_what_moves_a_range(before, pending, after):
    other = [[3.0, 3.0]]  # another layer's range moves on its own
    moved = move_ranges(torch.tensor([before, *other]), torch.tensor([pending, [5.0, 5.0]]), 0.5)
    torch.testing.assert_close(moved, torch.tensor([after, [4.0, 4.0]]), equal_nan=True)


@pytest.mark.parametrize(
    ("before", "pending", "after"),
    [
        ([NAN, NAN], [1.0, 2.0], [1.0, 2.0]),
        ([0.0, 3.0], [1.0, 2.0], [1.0, 3.0]),
        ([0.0, 1.0], [-INF, -INF], [0.0, 1.0]),
        ([0.0, 1.0], [NAN, 5.0], [0.0, 1.0]),
        ([0.0, 1.0], [0.0, INF], [0.0, 1.0]),
    ],
)
def test_what_widens_a_range_without_momentum(before, pending, after):
    joined = move_ranges(torch.tensor([before, [3.0, 3.0]]), torch.tensor([pending, [5.0, 1.0]]), None)
    torch.testing.assert_close(joined, torch.tensor([after, [5.0, 3.0]]), equal_nan=True)


def test_a_nested_tensor_shows_the_values_of_all_its_rows():
    value = torch.nested.nested_tensor([torch.tensor([[-2.0, 0.0]]), torch.tensor([[1.0, 5.0]])], layout=torch.jagged)
    assert widen(None, value).tolist() == [2.0, 5.0]


def test_momentum_one_follows_the_last_step():
    assert move_ranges(torch.tensor([[9.0, 9.0]]), torch.tensor([[1.0, 2.0]]), 1.0).tolist() == [[1.0, 2.0]]


def test_all_ranges_move_by_what_any_process_saw_in_one_all_reduce(monkeypatch):
    elsewhere = torch.tensor([[0.0, 9.0], [-INF, -INF], [3.0, 3.0], [1.0, INF]])
    calls = []

    def all_reduce(tensor, op):
        calls.append(op)
        tensor.copy_(torch.maximum(tensor, elsewhere))

    monkeypatch.setattr(sharding, "world_size", lambda: 2)
    monkeypatch.setattr(sharding.dist, "all_reduce", all_reduce)
    ranges, pending = [[0.0, 1.0], [NAN, NAN], [NAN, NAN], [2.0, 2.0]], [[4.0, 5.0], [NAN, 1.0], None, [0.0, 0.0]]
    states = [
        SimpleNamespace(extremes=torch.tensor(r), pending=None if p is None else torch.tensor(p))
        for r, p in zip(ranges, pending, strict=True)
    ]
    seen = fold_extremes(states, 0.5)
    assert calls == [torch.distributed.ReduceOp.MAX]
    assert seen.tolist() == [[4.0, 9.0], [INF, 1.0], [3.0, 3.0], [1.0, INF]]
    moved = [state.extremes.tolist() for state in states]
    assert moved[0] == [2.0, 5.0]
    assert np.isnan(moved[1]).all()  # the NaN here is not lost where the other process saw nothing
    assert moved[2:] == [[3.0, 3.0], [2.0, 2.0]]
    assert [state.pending for state in states] == [None] * 4

"""The exact k-th score and the masks it makes, against NumPy and torch on any shapes, dtypes, ties and zeros."""

from __future__ import annotations

import weakref
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.errors import CompressError
from lightning_compress.pruning import threshold
from lightning_compress.pruning.threshold import Piecewise, Threshold, keep_masks, kth_smallest

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
shapes = st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=3).map(tuple), min_size=1, max_size=4)
quick = settings(max_examples=60, deadline=None)


def scores_like(shapes, dtype, seed, coarse, signed=False):
    """Random scores; coarse ones are full of ties, zeros, negative zeros and infinities."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for shape in shapes:
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        value = value if signed else value.abs()
        if coarse:
            value = (value * 3).round()
            value[value == 1] = -0.0
            value[value >= 8] = float("inf")
            value[value <= -8] = float("-inf")
        tensors.append(value.to(dtype))
    return tensors


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).double().numpy()


@st.composite
def cases(draw):
    tensors = scores_like(
        draw(shapes),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 10**6)),
        *draw(st.tuples(st.booleans(), st.booleans())),
    )
    total = sum(tensor.numel() for tensor in tensors)
    return tensors, draw(st.integers(0, total))


@quick
@given(cases(), st.booleans(), st.sampled_from([3, 8, 20, 1 << 18]))
def test_threshold_and_masks_are_those_of_a_sort(case, streamed, chunk):
    tensors, k = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threshold, "CHUNK", chunk)
        lazy, found = keep_masks([(lambda tensor=tensor: tensor) for tensor in tensors] if streamed else tensors, k)
        masks = list(lazy)
    values = flat(tensors)
    dropped = np.zeros(values.size, dtype=bool)
    dropped[np.argsort(values, kind="stable")[:k]] = True  # stable: ties fall in order of tensor and position
    np.testing.assert_array_equal(~np.concatenate([mask.numpy().ravel() for mask in masks]), dropped)
    assert [mask.shape for mask in masks] == [tensor.shape for tensor in tensors]
    if k:
        assert found.value == np.partition(values, k - 1)[k - 1]
        assert found == kth_smallest(tensors, k)
        assert found.ties == k - int((values < found.value).sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 500, 999, 1000])
def test_equal_to_torch_kthvalue(dtype, k):
    scores = torch.rand(1000, generator=torch.Generator().manual_seed(k)).to(dtype)
    assert kth_smallest([scores[:300].view(3, 100), scores[300:]], k).value == scores.kthvalue(k).values.item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_whole_range_of_a_dtype_is_ordered(dtype):
    info = torch.finfo(dtype)
    positive = [
        0.0,
        info.smallest_normal / 4,
        info.smallest_normal,
        info.eps,
        1.0,
        1.0 + info.eps,
        info.max,
        float("inf"),
    ]
    ascending = torch.tensor([-value for value in positive[:0:-1]] + positive, dtype=dtype)
    for scores in (ascending, ascending[7:]):
        assert [kth_smallest([scores.flip(0)], k).value for k in range(1, len(scores) + 1)] == scores.tolist()


def test_pieces_of_a_function_of_single_entries_are_its_scores(monkeypatch):
    monkeypatch.setattr(threshold, "CHUNK", 7)
    weights = scores_like([(5, 6), (11,)], torch.float32, 3, coarse=True, signed=True)
    lazy, found = keep_masks([Piecewise(weight, torch.abs) for weight in weights], 20)
    masks, plain = keep_masks([weight.abs() for weight in weights], 20)
    assert found == plain
    assert all(torch.equal(one, other) for one, other in zip(lazy, masks, strict=True))


def test_one_tensor_of_scores_is_alive_at_a_time():
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def scores(seed):
        nonlocal most
        made = torch.rand(100, generator=torch.Generator().manual_seed(seed))
        alive.add(made)
        most = max(most, len(alive))
        return made

    masks, _ = keep_masks([partial(scores, seed) for seed in range(9)], 450)
    assert sum(int((~mask).sum()) for mask in masks) == 450
    assert most <= 2  # the next one is made before the loop lets the last one go


def test_scores_that_change_between_passes_are_named():
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(CompressError, match="the scores changed between two passes"):
        kth_smallest([lambda: torch.rand(1000, generator=generator)], 500)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tensors", [1, 3])
def test_scores_that_change_before_the_masks_are_named(dtype, tensors):
    calls = 0

    def scores():
        nonlocal calls
        calls += 1
        return torch.full((10,), float(calls > before), dtype=dtype)

    before = 10**6
    keep_masks([scores] * tensors, 5)
    before, calls = calls, 0  # from here on the scores change once the threshold is found
    masks, _ = keep_masks([scores] * tensors, 5)
    taken = []
    with pytest.raises(CompressError, match="5 were to go, now 0"):
        taken.extend(masks)
    assert len(taken) == tensors - 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_named(dtype):
    for sign in (1.0, -1.0):
        nan = torch.tensor([1.0, sign * float("nan")]).to(dtype).copysign(torch.tensor(sign))
        with pytest.raises(CompressError, match="NaN in tensor 1"):
            kth_smallest([torch.ones(2, dtype=dtype), nan], 1)


def test_pieces_longer_than_a_chunk(monkeypatch):
    monkeypatch.setattr(threshold, "CHUNK", 7)
    tensors = scores_like([(5, 6), (11,), (0,)], torch.float32, 3, coarse=True)
    lazy, found = keep_masks(tensors, 20)
    masks = list(lazy)
    assert found.value == np.partition(flat(tensors), 19)[19]
    assert sum(int((~mask).sum()) for mask in masks) == 20


def test_scores_in_another_memory_order_drop_the_same_weights():
    scores = (torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 5).round()  # ties
    (plain,), _ = keep_masks([scores], 111)
    for strided in (
        scores.contiguous(memory_format=torch.channels_last),
        scores.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert not strided.is_contiguous()
        (mask,), _ = keep_masks([strided], 111)
        assert torch.equal(mask, plain)


def test_scores_that_are_not_dense_are_read_in_order():
    scores = (torch.randn(404, generator=torch.Generator().manual_seed(0)) * 3).round()
    for strided in (scores[::2], scores[::2].view(2, 101).t(), scores[:1].expand(100)):
        for k in (1, 30, 99):
            (mask,), found = keep_masks([strided], k)
            (plain,), same = keep_masks([strided.clone(memory_format=torch.contiguous_format)], k)
            assert torch.equal(mask, plain)
            assert found == same


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("count", [5, 8, 83])
def test_scores_that_differ_in_their_last_digit_only(sign, count):
    key = torch.randperm(count, generator=torch.Generator().manual_seed(0)).int() + (1 << 30)
    scores = sign * key.view(torch.float32)
    found = [kth_smallest([scores[:3], scores[3:]], k) for k in range(1, count + 1)]
    assert [one.value for one in found] == scores.sort().values.tolist()
    assert {(one.ties, one.equal) for one in found} == {(1, 1)}


def test_the_scores_are_only_read():
    for signed in (False, True):
        scores = scores_like([(20,)], torch.float32, 1, coarse=True, signed=signed)[0]
        before = scores.clone().view(torch.int32)
        list(keep_masks([scores], 7)[0])
        assert torch.equal(scores.view(torch.int32), before)


def test_nothing_dropped_and_everything_dropped():
    scores = [torch.rand(3), torch.rand(2, 2)]
    masks, found = keep_masks(scores, 0)
    assert all(bool(mask.all()) for mask in masks)
    assert found == Threshold(0.0, 0, 0, 0)
    masks, _ = keep_masks(scores, 7)
    assert not any(bool(mask.any()) for mask in masks)


@pytest.mark.parametrize("k", [0, 4, -1])
def test_a_rank_outside_the_scores_is_named(k):
    with pytest.raises(ValueError, match=rf"expected k in 1 .. 3, the number of scores, got {k}"):
        kth_smallest([torch.rand(3)], k)


@pytest.mark.parametrize(
    "scores", [[torch.rand(2), torch.rand(2).double()], [torch.ones(2, dtype=torch.int32)]], ids=["mixed", "integer"]
)
def test_mixed_or_unsupported_dtypes_are_named(scores):
    with pytest.raises(ValueError, match="one dtype among float64, float32, bfloat16, float16, got"):
        kth_smallest(scores, 1)


def test_no_tensor_of_the_size_of_all_scores_is_made():
    scores = [torch.rand(1 << 21) for _ in range(4)]  # 8 MiB each, 32 MiB together
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kth_smallest(scores, 1 << 22)
    allocated = [event.cpu_memory_usage for event in profile.events()]
    assert 0 < max(allocated) < 20 * 2**20  # a chunk's bincount widens a million digits to int64: 8 MiB

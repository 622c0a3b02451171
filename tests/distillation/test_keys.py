"""Keys of examples: the same wherever the example comes, another for anything that the teacher is given otherwise."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress.distillation.keys import THREADED_BYTES, example_keys, fingerprint

IMAGES = torch.randn(6, 3, 5, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_an_examples_key_depends_neither_on_its_batch_nor_on_how_memory_holds_it(dtype):
    images = (10 * IMAGES).relu().to(dtype)
    keys = example_keys((images,), {})
    assert len(set(keys)) == 6
    assert {len(key) for key in keys} == {16}
    order = torch.tensor([4, 1, 5])
    assert example_keys((images[order],), {}) == [keys[index] for index in order]
    for same in (images.contiguous(memory_format=torch.channels_last), images.mT.contiguous().mT):
        assert not same.is_contiguous()
        assert example_keys((same,), {}) == keys
    if dtype.is_floating_point:
        assert example_keys((images.clone().requires_grad_(),), {}) == keys


def test_complex_views_have_their_values_keys():
    spectrum = torch.view_as_complex(IMAGES[..., :2].contiguous())
    assert example_keys((spectrum.conj(),), {}) == example_keys((spectrum.conj_physical(),), {})
    assert example_keys((spectrum.conj(),), {}) != example_keys((spectrum,), {})


def test_large_examples_hashed_by_threads_have_the_keys_of_one_at_a_time():
    large = torch.randn(5, THREADED_BYTES // 4)
    assert example_keys((large,), {}) == [example_keys((large[i : i + 1],), {})[0] for i in range(5)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_changes_no_key():
    assert example_keys((IMAGES.cuda(),), {}) == example_keys((IMAGES,), {})


X, Y = IMAGES[:2, 0, 0], IMAGES[2:4, 0, 0]
CALLS = [
    ((X,), {}),
    ((Y,), {}),
    ((X.double(),), {}),
    ((X.view(torch.int32),), {}),
    ((X.reshape(2, 2, 2),), {}),
    ((X, Y), {}),
    ((Y, X), {}),
    (((X, Y),), {}),
    ((), {"x": X}),
    ((), {"y": X}),
    ((), {"x": X, "y": Y}),
    ((), {"x": Y, "y": X}),
    ((X,), {"scale": 1}),
    ((X,), {"scale": 2}),
    ((X,), {"scale": 1.0}),
    ((X,), {"scale": "1"}),
    ((X,), {"scale": None}),
    ((X,), {"scale": ()}),
    ((X,), {"scale": {}}),
    ((X,), {"scale": torch.float16}),
    ((X,), {"scale": torch.tensor(1)}),
    ((X,), {"scale": torch.tensor(2)}),
    ((X,), {"scale": torch.ones(1, 3)}),
    ((X,), {"scale": {"1": X}}),
    ((X,), {"scale": {1: X}}),
]


def test_whatever_differs_in_a_call_changes_every_key():
    keys = [key for args, kwargs in CALLS for key in example_keys(args, kwargs)]
    assert len(set(keys)) == 2 * len(CALLS)


def test_the_order_of_names_labels_and_the_batch_of_what_is_shared_change_no_key():
    keys = example_keys((), {"x": X, "y": {"a": Y, "b": torch.ones(1, 3)}})
    assert example_keys((), {"y": {"b": torch.ones(1, 3), "a": Y}, "x": X, "labels": torch.zeros(2)}) == keys
    assert example_keys((), {"x": X[1:], "y": {"a": Y[1:], "b": torch.ones(1, 3)}}) == keys[1:]
    assert example_keys((UserDict(x=X),), {}) == example_keys((UserDict(x=X),), {})
    assert example_keys((X[:0],), {}) == []


def text(lengths, width, filler, mask_dtype=torch.int64, left=False):
    """Examples 1 2 3 ..., of these lengths, padded to a width with a filler."""
    ids, mask = torch.full((len(lengths), width), filler), torch.zeros(len(lengths), width, dtype=mask_dtype)
    for row, length in enumerate(lengths):
        at = slice(width - length, width) if left else slice(0, length)
        ids[row, at], mask[row, at] = torch.arange(1, length + 1), 1
    return {"input_ids": ids, "attention_mask": mask}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
    st.integers(0, 5),
    st.integers(0, 5),
    st.sampled_from([torch.int64, torch.bool, torch.float32]),
)
def test_padding_to_the_right_changes_no_key(lengths, more, filler, dtype):
    short, long = text(lengths, 6, 0, dtype), text(lengths, 6 + more, filler, dtype)
    for call in (
        lambda batch: ((), batch),
        lambda batch: ((batch,), {}),
        lambda batch: ((batch["input_ids"],), {"attention_mask": batch["attention_mask"]}),
        lambda batch: ((), {**batch, "token_type_ids": batch["input_ids"] % 2}),
    ):
        keys = example_keys(*call(long))
        assert keys == example_keys(*call(short))
        assert len(set(keys)) == len(set(lengths))


def test_what_is_no_padding_to_the_right_counts():
    plain = text([2, 3], 4, 0)
    ids, mask = plain["input_ids"], plain["attention_mask"]
    base = example_keys((), plain)
    wider = {name: nn.functional.pad(value, (0, 1)) for name, value in plain.items()}
    assert example_keys((), wider) == base
    added = {"attention_mask": (1.0 - mask) * -1e4}  # this one is added to the scores
    for padded, unpadded in (
        (text([2, 3], 5, 0, left=True), text([2, 3], 4, 0, left=True)),
        ({**wider, **added | {"attention_mask": nn.functional.pad(added["attention_mask"], (0, 1))}}, plain | added),
        ({**wider, "bias": wider["input_ids"].float()}, {**plain, "bias": ids.float()}),  # numbers, not tokens
        ({"input_ids": wider["input_ids"]}, {"input_ids": ids}),
    ):
        assert not set(example_keys((), padded)) & set(example_keys((), unpadded))
    holed = mask.clone()
    holed[:, 0] = 0
    for changed in ({"attention_mask": holed}, {"attention_mask": mask.bool()}, {"input_ids": ids.int()}):
        assert not set(example_keys((), {**plain, **changed})) & set(base)


def test_each_mapping_has_its_own_mask():
    def pair(width):
        return {"query": text([1, 2], 3, 0), "passage": text([3, 2], width, 9)}

    assert example_keys((), pair(4)) == example_keys((), pair(8))
    one, two = ({name: value.clamp(max=1) for name, value in text([n], 2, 0).items()} for n in (1, 2))
    assert example_keys((), {"query": one, "passage": two}) != example_keys((), {"query": two, "passage": one})


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((), {}, ValueError, "first dimension is the batch, got no tensor"),
        ((), {"labels": X}, ValueError, "got no tensor"),
        ((torch.tensor(1.0),), {}, ValueError, r"got \(\)"),
        ((X, torch.ones(3)), {}, ValueError, r"got \(2, 4\), \(3,\); pass inputs="),
        ((X, np.ones(2000)), {}, TypeError, r"got ndarray at 0.1, whose content it cannot read; pass inputs="),
        ((X,), {"hook": print}, TypeError, r"got builtin_function_or_method at 1.'hook'"),
    ],
)
def test_what_cannot_be_keyed_is_refused(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        example_keys(args, kwargs)


class Scaled(nn.Module):
    """With extra state."""

    def __init__(self, extra):
        super().__init__()
        self.extra = extra

    def get_extra_state(self):
        return self.extra


def teacher(activation=nn.ReLU, features=3, **extra):
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(linear=nn.Linear(4, features), norm=nn.BatchNorm1d(features), act=activation(), **extra)
    )


def changed(name, index):
    module = teacher()
    with torch.no_grad():
        module.get_parameter(name).view(-1)[index] += 1e-6
    return module


def test_a_teacher_has_one_fingerprint_and_another_has_another():
    counted, renamed = teacher(), teacher()
    counted.norm.num_batches_tracked += 1
    renamed.final = nn.Identity()
    others = [
        changed("linear.weight", 11),
        changed("norm.bias", 0),
        teacher(nn.GELU),
        teacher(features=2),
        teacher().double(),
        teacher().bfloat16(),
        counted,
        renamed,
        teacher(scale=Scaled({"a": 1})),
        teacher(scale=Scaled({"a": 2})),
    ]
    mine = fingerprint(teacher())
    assert fingerprint(copy.deepcopy(teacher()).eval()) == mine
    assert len({mine, *map(fingerprint, others)}) == 1 + len(others)
    assert len(bytes.fromhex(mine)) == 16


def test_a_frozen_transposed_weight_has_its_values_fingerprint():
    module, same = nn.Linear(3, 3), nn.Linear(3, 3)
    same.load_state_dict(module.state_dict())
    same.weight = nn.Parameter(module.weight.detach().mT.contiguous().mT, requires_grad=False)
    assert fingerprint(same) == fingerprint(module)

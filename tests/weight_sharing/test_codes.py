"""Codes against numpy, and packed and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.weight_sharing.codebook import shared_values
from lightning_compress.weight_sharing.codes import Codes, found_codes, pack_codes, unpack_codes


@given(st.integers(2, 200), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
def test_members_of_an_entry_get_their_mean(count, entries, zeros, seed):
    draws = np.random.default_rng(seed)
    entry, values = draws.integers(0, entries + 1, count), draws.standard_normal(count).astype(np.float32)
    expected = np.array([values[entry == own].astype(np.float64).mean() for own in entry])
    expected[(entry == 0) & zeros] = 0.0

    found = torch.from_numpy(values.copy())
    codes = Codes.of(torch.from_numpy(entry).int())
    codes.average(found, zeros)

    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
    again = found.clone()
    codes.average(again, zeros)
    assert torch.equal(again, found)  # values that are equal stay as they are, to the bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_in_any_layout_are_changed_in_place(dtype):
    values = torch.randn(4, 3, 5, 5).to(dtype).to(memory_format=torch.channels_last)
    entry = torch.randint(0, 6, values.shape, dtype=torch.int32)
    expected = values.double().contiguous()
    for own in range(6):
        expected[entry == own] = expected[entry == own].mean() if own else 0.0

    Codes.of(entry).average(values, zeros=True)

    assert torch.equal(values, expected.to(dtype))
    assert values.is_contiguous(memory_format=torch.channels_last)


@given(st.integers(2, 300), st.floats(0, 1), st.integers(2, 40), st.integers(0, 2**31))
def test_codes_give_what_share_weights_gives(count, kept, entries, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(count, generator=generator) * (torch.rand(count, generator=generator) < kept)
    codes = found_codes(weight, entries)
    ours = weight.clone()
    codes.average(ours, zeros=True)
    assert torch.equal(codes.entry == 0, weight == 0)
    assert len(ours.unique()) <= entries
    torch.testing.assert_close(ours, shared_values(weight, entries), rtol=2e-2, atol=1e-3)  # k-means may stop early


@given(st.lists(st.integers(0, 255), min_size=1, max_size=100))
def test_packed_codes_come_back_in_log2_bits(entries):
    codes = Codes.of(torch.tensor(entries, dtype=torch.int32))
    packed = pack_codes(codes)
    assert packed.shape == (max(1, int(np.ceil(np.log2(max(entries) + 1)))), -(-len(entries) // 8))
    again = unpack_codes(packed, torch.Size([len(entries)]))
    assert torch.equal(again.entry, codes.entry)
    assert torch.equal(again.counts, codes.counts)

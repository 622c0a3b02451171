"""Several versions of a model in one file: each comes back, and the finer ones cost what the coarser ones lack."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_compress import load_packed, pack, pack_levels, unpack
from lightning_compress.packing.given import pack_given, unpack_given
from lightning_compress.packing.reading import packed_tensors
from lightning_compress.packing.stream import PackedFileError, Stream
from lightning_compress.quantization.grid import FLOAT_BITS, Range
from lightning_compress.quantization.weights import Symmetric
from lightning_compress.weight_sharing.codebook import shared_values

SHAPE = (200, 300)


@given(st.integers(0, 500), st.integers(1, 256), st.integers(1, 256), st.integers(0, 2**31))
def test_symbols_given_others(count, alphabet, known_alphabet, seed):
    generator = np.random.default_rng(seed)
    symbols = generator.integers(0, alphabet, count).astype(np.uint8)
    known = generator.integers(0, known_alphabet, count).astype(np.uint8)
    stream = Stream(pack_given(symbols, known))
    assert np.array_equal(unpack_given(stream, known), symbols)
    assert stream.left == 0


def sparse(sparsity, entries=16):
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    shared = shared_values(weight, entries)
    return shared * (weight.abs() > weight.abs().flatten().kthvalue(int(sparsity * weight.numel()))[0])


def sizes(levels, folder, ranges=None):
    """Bytes of the file of all levels, and of each alone."""
    together = pack_levels(levels, folder / "all", ranges)
    alone = [pack(level, folder / f"{n}", None if ranges is None else ranges[n]) for n, level in enumerate(levels)]
    return together, [path.stat().st_size for path in alone], alone


def test_95_percent_within_80_within_50(tmp_path):
    levels = [{"w": sparse(0.95)}, {"w": sparse(0.8)}, {"w": sparse(0.5)}]
    path, alone, _ = sizes(levels, tmp_path)
    for number, level in enumerate(levels):
        assert torch.equal(unpack(path, number)["w"], level["w"])
    assert torch.equal(unpack(path)["w"], levels[-1]["w"])
    assert path.stat().st_size < 1.07 * alone[-1] < 0.7 * sum(alone)
    assert packed_tensors(path, 2)[0].way == "what the level before lacks"
    assert packed_tensors(path, 0)[0].size_bytes < 0.2 * packed_tensors(path, 2)[0].size_bytes


def test_4_bits_within_8(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 5))
    ranges = [{"0": Range(0.0, 0.0, FLOAT_BITS, bits, Symmetric(bits))} for bits in (4, 8)]
    path, alone, files = sizes([net, net], tmp_path, ranges)
    for number, file in enumerate(files):
        assert torch.equal(unpack(path, number)["0.weight"], unpack(file)["0.weight"])
    assert torch.equal(load_packed(nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 5)), path, 0)[0].weight,
                       unpack(files[0])["0.weight"])  # fmt: skip
    assert path.stat().st_size < 1.1 * alone[1] < 0.8 * sum(alone)


def test_a_level_that_is_the_same_costs_a_byte_a_tensor(tmp_path):
    state = {"w": torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), "b": torch.ones(3)}
    path, alone, _ = sizes([state, state, state], tmp_path)
    assert path.stat().st_size < alone[0] + 60
    assert packed_tensors(path)[0].way == "as in the level before"


def test_versions_that_have_little_in_common_are_kept_alone(tmp_path):
    levels = [{"w": torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))} for seed in (0, 1)]
    path, alone, _ = sizes(levels, tmp_path)
    assert path.stat().st_size < sum(alone) + 60
    assert torch.equal(unpack(path, 0)["w"], levels[0]["w"])


def test_bad_levels_are_named(tmp_path):
    w = torch.ones(3)
    path = pack_levels([{"w": w}, {"w": 2 * w}], tmp_path / "a")
    for level in (2, -1):
        with pytest.raises(ValueError, match=f"levels 0 to 1, got {level}"):
            unpack(path, level)
    with pytest.raises(ValueError, match=r"'v' is None in the first and .*version 1"):
        pack_levels([{"w": w}, {"w": w, "v": w}], tmp_path / "b")
    with pytest.raises(ValueError, match=r"'w' is \(\(3,\), torch.float32\) in the first and \(\(4,\)"):
        pack_levels([{"w": w}, {"w": torch.ones(4)}], tmp_path / "b")
    with pytest.raises(ValueError, match="1 to 64 versions"):
        pack_levels([], tmp_path / "b")
    with pytest.raises(ValueError, match="as many ranges, got 1 and 2"):
        pack_levels([{"w": w}], tmp_path / "b", [None, None])
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_changed_coarse_level_is_found_in_the_fine_one_too(tmp_path):
    path = pack_levels([{"w": sparse(0.95)}, {"w": sparse(0.5)}], tmp_path / "a")
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    for level in (0, 1):
        with pytest.raises(PackedFileError, match=r"'w' of .*changed"):
            unpack(path, level)

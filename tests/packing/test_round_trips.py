"""What is packed comes back bit for bit, whatever it is, in a file near its entropy."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_compress import fake_quantized
from lightning_compress.packing.positions import pack_positions, unpack_positions
from lightning_compress.packing.reading import load_packed, packed_tensors, unpack, unpacked
from lightning_compress.packing.stream import Stream
from lightning_compress.packing.symbols import pack_symbols, unpack_symbols
from lightning_compress.packing.tensors import DTYPES, bits_of, pack_tensor, unpack_tensor
from lightning_compress.packing.writing import pack
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.lowbit import Binary, Ternary
from lightning_compress.quantization.posttraining import quantize_post_training
from lightning_compress.quantization.weights import Symmetric

SEEDS = st.integers(0, 2**31)


def there_and_back(tensor):
    name = {dtype: name for name, dtype in DTYPES.items()}[tensor.dtype]
    return unpack_tensor(pack_tensor(tensor), name, tuple(tensor.shape))[0]


def same_bits(one, other):
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert np.array_equal(bits_of(one), bits_of(other))


@given(
    st.sampled_from(list(DTYPES.values())),
    st.lists(st.integers(0, 6), max_size=4),
    SEEDS,
    st.sampled_from([2, 200, 2**8]),
)
def test_any_bits_of_any_dtype(dtype, shape, seed, values):
    generator = np.random.default_rng(seed)
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    raw = torch.from_numpy(generator.integers(0, 2 if dtype is torch.bool else values, count, dtype=np.uint8))
    tensor = raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    same_bits(there_and_back(tensor), tensor)


@given(st.integers(1, 3000), st.floats(0, 1), st.integers(1, 300), SEEDS)
def test_weights_with_zeros_and_few_values(count, density, values, seed):
    generator = torch.Generator().manual_seed(seed)
    book = torch.randn(values, generator=generator)
    weight = book[torch.randint(values, (count,), generator=generator)]
    weight *= torch.rand(count, generator=generator) < density
    same_bits(there_and_back(weight), weight)


@given(st.integers(1, 256), st.integers(0, 2000), SEEDS)
def test_symbols(alphabet, count, seed):
    symbols = np.random.default_rng(seed).integers(0, alphabet, count).astype(np.uint8)
    stream = Stream(pack_symbols(symbols, alphabet))
    assert np.array_equal(unpack_symbols(stream, count, alphabet), symbols)
    assert stream.left == 0


@given(st.lists(st.booleans(), max_size=300), st.integers(1, 400))
def test_positions_near_and_far(taken, spread):
    bitmap = np.repeat(np.array(taken, bool), spread) & (np.arange(len(taken) * spread) % spread == 0)
    stream = Stream(pack_positions(bitmap))
    places = unpack_positions(stream, len(bitmap), int(bitmap.sum()))
    assert np.array_equal(places, np.flatnonzero(bitmap))


def sparse(shape, density, values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(1, values + 1, shape, generator=generator).float()
    return weight * (torch.rand(shape, generator=generator) < density)


@pytest.mark.parametrize(("density", "values"), [(0.02, 7), (0.1, 15), (0.1, 254), (0.5, 3), (1.0, 16)])
def test_files_are_within_three_percent_of_the_entropy(density, values, tmp_path):
    weight = sparse((400, 785), density, values)
    counts = np.unique(weight.numpy(), return_counts=True)[1] / weight.numel()
    entropy_bytes = -(counts * np.log2(counts)).sum() * weight.numel() / 8
    path = pack({"weight": weight}, tmp_path / "a.packed")
    assert path.stat().st_size < 1.03 * entropy_bytes + 4 * values + 64  # the codebook itself, and the directory
    (told,) = packed_tensors(path)
    assert told.bound_bytes == pytest.approx(entropy_bytes)
    assert told.size_bytes < path.stat().st_size
    assert told.way == "codebook"


def test_zeros_that_gather_take_less_than_the_entropy_of_each(tmp_path):
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    weight[:460] = 0
    path = pack({"weight": weight}, tmp_path / "a.packed")
    assert path.stat().st_size < 52 * 512 * 4 * 0.9
    assert packed_tensors(path)[0].way == "zeros apart"


class Everything(nn.Module):
    """Tied weights, buffers of several dtypes, a scalar, nothing, and a slice of a larger tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(30, 8)
        self.body = nn.Sequential(
            nn.Conv1d(8, 8, 3, bias=False), nn.BatchNorm1d(8), nn.Linear(4, 4, dtype=torch.bfloat16)
        )
        self.head = nn.Linear(8, 30)
        self.head.weight = self.words.weight
        self.register_buffer("kept_mask", torch.rand(3, 5) > 0.5)
        self.register_buffer("none", torch.empty(0, 3))
        self.register_buffer("part", torch.arange(20.0).view(4, 5)[:, 1:3])
        self.register_buffer("odd", torch.tensor([float("nan"), float("-inf"), 1e-42, -0.0]))


def test_a_modules_state_whole(tmp_path):
    module = Everything()
    path = pack(module, tmp_path / "deep" / "a.packed", signed_zeros=True)
    state = unpack(path)
    assert state.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        same_bits(state[name], tensor)
    assert state["head.weight"].data_ptr() == state["words.weight"].data_ptr()
    assert [name for name, _ in unpacked(path)].count("head.weight") == 1
    other = Everything()
    other.words.weight.data.zero_()
    assert load_packed(other, path) is other
    assert torch.equal(other.head.weight, module.words.weight)


def test_an_expanded_tensor_comes_back_whole(tmp_path):
    tensor = torch.full((1,), 2.5).expand(5, 5)
    same_bits(unpack(pack({"w": tensor}, tmp_path / "a"))["w"], tensor.contiguous())


def test_the_sign_of_zeros_is_dropped_unless_asked_for(tmp_path):
    weight = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    weight *= torch.rand(300, 300, generator=torch.Generator().manual_seed(1)) < 0.1
    assert torch.signbit(weight[weight == 0]).any()  # so do masks
    plain, signed = (pack({"w": weight}, tmp_path / f"{kept}", signed_zeros=kept) for kept in (False, True))
    same_bits(unpack(signed)["w"], weight)
    same_bits(unpack(plain)["w"], weight + 0.0)
    assert signed.stat().st_size - plain.stat().st_size > 0.85 * weight.numel() / 8


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES.values() if dtype.is_floating_point], ids=str)
def test_zeros_lose_their_sign_in_every_floating_dtype_and_nans_keep_their_bits(dtype, tmp_path):
    values = torch.tensor([0.0, -0.0, 1.5, -1.5, float("nan")], dtype=torch.float64).to(dtype)
    found = unpack(pack({"w": values.expand(2, 5).t()}, tmp_path / "a"))["w"]
    same_bits(found[2:], values[2:, None].expand(3, 2).contiguous())
    assert not bits_of(found[:2]).any()


class Nets(nn.Module):
    """Each kind of layer that grids round."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.up = nn.ConvTranspose2d(8, 6, 2)
        self.grouped = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.linear = nn.Linear(16, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, images):
        found = self.grouped(self.up(self.conv(images))).flatten(1)[:, :32].view(-1, 2, 16)
        return self.head(self.linear(self.attention(found, found, found)[0].mean(1)))


@pytest.mark.parametrize(
    "grid", [Symmetric(8), Symmetric(4), Symmetric(4, 16), Symmetric(8, "tensor"), Ternary(), Binary()]
)
def test_weights_come_back_as_they_were_rounded_in_training(grid, tmp_path):
    module = Nets()
    images = torch.randn(4, 3, 8, 8)
    found = quantize_post_training(module, [images], include=["Linear", "Conv2d"])
    ranges = {name: Range(r.low, r.high, 32, grid.bits, grid) for name, r in found.items()}
    if getattr(grid, "group", None) == 16:
        ranges = {"linear": ranges["linear"], "head": ranges["head"]}
    else:
        free = Range(0.0, 0.0, 32, grid.bits, grid)
        ranges |= dict.fromkeys(["up", "grouped", "attention.in_proj", "attention.out_proj"], free)
    with torch.no_grad(), fake_quantized(module, ranges):
        expected = module(images)
    path = pack(module, tmp_path / "a.packed", ranges=ranges)
    read = load_packed(Nets(), path)
    with torch.no_grad():
        assert torch.equal(read(images), expected)
    ways = {told.name: told.way for told in packed_tensors(path)}
    assert ways["linear.weight"] == "codes and scales"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_scale_too_small_for_its_dtype_gives_zeros_without_a_sign(dtype, tmp_path):
    module = nn.Sequential(nn.Linear(64, 4)).to(dtype)
    with torch.no_grad():
        module[0].weight.zero_()
        module[0].weight[:, 1] = -torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the least there is
    range_ = Range(0.0, 0.0, 32, 1, Binary())
    with torch.no_grad(), fake_quantized(module, {"0": range_}):
        expected = module(torch.eye(64, dtype=dtype)).T - module[0].bias[:, None]
    assert not expected.any()
    for signed in (False, True):
        found = unpack(pack(module, tmp_path / "a", {"0": range_}, signed))["0.weight"]
        assert not found.any()
        assert bool(torch.signbit(found).any()) == signed


def test_a_small_net_pruned_shared_and_packed_is_140_times_smaller(tmp_path):
    """LeNet-300-100 with 2 % of its weights and 7 values for them, as RESULTS of Deep Compression go."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    dense = sum(4 * parameter.numel() for parameter in net.parameters())
    for number in (0, 2, 4):
        net[number].weight.data = sparse(net[number].weight.shape, 0.02, 7, number) / 50
    path = pack(net, tmp_path / "lenet.packed")
    assert path.stat().st_size < 8600
    assert dense / path.stat().st_size > 120
    read = load_packed(nn.Sequential(*(type(layer)(*_sizes(layer)) for layer in net)), path)
    x = torch.randn(5, 784)
    assert torch.equal(read(x), net(x))


def _sizes(layer):
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else ()


def test_files_repeat_to_the_byte(tmp_path):
    state = {"w": sparse((50, 50), 0.1, 9)}
    one, other = pack(state, tmp_path / "a"), pack(state, tmp_path / "b")
    assert zlib.crc32(one.read_bytes()) == zlib.crc32(other.read_bytes())

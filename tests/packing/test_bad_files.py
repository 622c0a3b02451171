"""A file that is cut, changed, newer or a lie is refused by name, before memory is taken and with nothing half done."""

from __future__ import annotations

import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress import CompressError
from lightning_compress.packing import layout
from lightning_compress.packing.layout import Directory, Entry, write_head
from lightning_compress.packing.positions import pack_positions
from lightning_compress.packing.reading import load_packed, packed_tensors, unpack
from lightning_compress.packing.stream import PackedFileError, varint
from lightning_compress.packing.tensors import bits_of
from lightning_compress.packing.writing import pack

MUTATIONS = int(os.environ.get("LIGHTNING_COMPRESS_MUTATIONS", "3000"))
MOST_BYTES = 64 << 20  # of Python's and numpy's memory while a bad file of some kB is refused


def state():
    generator = torch.Generator().manual_seed(0)
    sparse = torch.randn(40, 50, generator=generator) * (torch.rand(40, 50, generator=generator) < 0.2)
    shared = torch.randint(0, 9, (60, 40), generator=generator).float() * 0.5
    return {
        "sparse.weight": sparse + 0.0,
        "shared.weight": shared * (torch.rand(60, 40, generator=generator) < 0.3),
        "dense.weight": torch.randn(20, 20, generator=generator),
        "rows": torch.eye(64).repeat(1, 4),
        "bits": torch.rand(100, generator=generator) < 0.5,
        "steps": torch.tensor(7),
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return pack(state(), tmp_path_factory.mktemp("packed") / "good.packed")


def written(path, data):
    path.write_bytes(data)
    return path


def with_directory(path, rows, tensors, same=None):
    """A file of our own making; a size or checksum that is no tuple is that of the only level."""
    entries = (Entry(*row[:3], *(part if isinstance(part, tuple) else (part,) for part in row[3:])) for row in rows)
    with path.open("wb") as file:
        write_head(file, Directory(tuple(entries), same or {}))
        file.write(tensors)
    return path


def test_a_cut_file_names_the_tensor_that_is_not_whole(file, tmp_path):
    data = file.read_bytes()
    with pytest.raises(PackedFileError, match="cut: 'steps' has 9 of its 10 bytes"):
        unpack(written(tmp_path / "a", data[:-1]))
    with pytest.raises(PackedFileError, match=r"cut: 'sparse\.weight'"):
        unpack(written(tmp_path / "a", data[:400]))
    with pytest.raises(PackedFileError, match="cut within its directory"):
        unpack(written(tmp_path / "a", data[:40]))
    with pytest.raises(PackedFileError, match="1 bytes after its last tensor"):
        unpack(written(tmp_path / "a", data + b"x"))


@pytest.mark.parametrize("name", ["sparse.weight", "shared.weight", "dense.weight", "rows", "bits", "steps"])
def test_a_flipped_bit_names_its_tensor(file, name, tmp_path):
    data = bytearray(file.read_bytes())
    at = len(data)
    for told in reversed(packed_tensors(file)):
        at -= told.size_bytes
        if told.name == name:
            break
    data[at + told.size_bytes // 2] ^= 4
    with pytest.raises(PackedFileError, match=f"'{name}' of .*changed"):
        unpack(written(tmp_path / "a", bytes(data)))


def test_other_files_and_versions(file, tmp_path):
    data = file.read_bytes()
    with pytest.raises(PackedFileError, match=r"of version 2.*reads 1.*update"):
        unpack(written(tmp_path / "a", data[:4] + b"\x02" + data[5:]))
    for other in (b"", b"LC", b"PK\x03\x04" + data):
        with pytest.raises(PackedFileError, match="expected a packed file"):
            unpack(written(tmp_path / "a", other))
    with pytest.raises(FileNotFoundError):
        unpack(tmp_path / "missing")


def test_mutations_are_refused_or_change_nothing(file, tmp_path):
    """Bytes that are flipped, cut, doubled, zeroed or exchanged: no crash, no memory, no other values."""
    data, expected, path = file.read_bytes(), unpack(file), tmp_path / "a"
    generator = np.random.default_rng(MUTATIONS)
    refused = 0
    tracemalloc.start()
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(data, generator))
        try:
            found = unpack(path)
        except PackedFileError:
            refused += 1
        else:
            assert all(np.array_equal(bits_of(found[name]), bits_of(tensor)) for name, tensor in expected.items())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST_BYTES
    assert refused > 0.95 * MUTATIONS


def mutated(data, generator):
    changed = bytearray(data)
    first, last = sorted(generator.integers(0, len(data), 2))
    kind = generator.integers(6)
    if kind == 0:
        changed[first] ^= 1 << int(generator.integers(8))
    elif kind == 1:
        changed[first] = int(generator.integers(256))
    elif kind == 2:
        del changed[first:last]
    elif kind == 3:
        changed[first:first] = changed[first:last]
    elif kind == 4:
        changed[first:last] = bytes(last - first)
    else:
        changed[first:last] = generator.bytes(last - first)
    return bytes(changed)


def test_mutations_under_right_checksums_are_refused_too(tmp_path):
    """Whoever writes checksums may lie in every byte of a tensor: reading it ends, and takes no more than it claims."""
    generator, path = np.random.default_rng(0), tmp_path / "a"
    tensors = {name: tensor for name, tensor in state().items() if tensor.dim() > 1}
    parts = {}
    for name, tensor in tensors.items():
        whole = pack({name: tensor}, path).read_bytes()
        parts[name] = whole[-packed_tensors(path)[0].size_bytes :]
    tracemalloc.start()
    for number in range(MUTATIONS // 2):
        name = list(parts)[number % len(parts)]
        data = mutated(parts[name], generator)
        shape = tensors[name].shape
        with_directory(path, [(name, "F32", tuple(shape), len(data), 0)], data)
        with pytest.raises(PackedFileError, match=name):
            unpack(path)  # a checksum of 0 is never right: what is shown is that decoding ends
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST_BYTES


def test_a_huge_claim_takes_no_memory(tmp_path):
    zeros = b"\x00\x02\x01\x00\x00\x00\x00\x03\x00"  # a codebook of one value, and one symbol for all
    path = with_directory(tmp_path / "a", [("w", "F32", (1 << 20, 1 << 20), len(zeros), 0)], zeros)
    tracemalloc.start()
    with pytest.raises(PackedFileError, match=r"claims 4398046511104 bytes.*most_bytes="):
        unpack(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    small = with_directory(tmp_path / "b", [("w", "F32", (4, 4), len(zeros), zlib.crc32(bytes(64)))], zeros)
    assert torch.equal(unpack(small)["w"], torch.zeros(4, 4))  # the same bytes are right for 16 zeros
    with pytest.raises(PackedFileError, match=r"claims 64 bytes.*63 are allowed"):
        unpack(small, most_bytes=63)


@pytest.mark.parametrize(("count", "depth"), [(100_000, 40), (4000, 3000)])
def test_zeros_within_zeros_are_refused(count, depth, tmp_path):
    """A few bytes a step that would each take the memory of the whole tensor, or the stack of Python."""
    steps = (b"\x03" + varint(n - 1) + pack_positions(np.arange(n) < n - 1) for n in range(count, count - depth, -1))
    data = b"\x00" + b"".join(steps)
    path = with_directory(tmp_path / "a", [("w", "F32", (count,), len(data), 0)], data)
    tracemalloc.start()
    with pytest.raises(PackedFileError, match=r"'w' of .*coding values, 0 to 2, got 3"):
        unpack(path)
    assert tracemalloc.get_traced_memory()[1] < 10 * 4 * count + (1 << 20)
    tracemalloc.stop()


def test_a_directory_that_inflates_without_end_is_refused(tmp_path):
    kept = zlib.compress(b"[" + b"[]," * (1 << 23) + b"[]]")
    head = struct.pack("<4sBII", layout.MAGIC, layout.VERSION, len(kept), zlib.crc32(kept))
    assert len(kept) < 50_000
    tracemalloc.start()
    with pytest.raises(PackedFileError, match=r"directory .* does not end within"):
        unpack(written(tmp_path / "a", head + kept))
    assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    tracemalloc.stop()


def test_a_directory_larger_than_is_read_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"2 tensors take \d+ bytes.*files of their own"):
        pack({"w": torch.ones(1), "v" * layout.LARGEST_DIRECTORY: torch.ones(1)}, tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rows", "same"),
    [
        ([("w", "F32", (2**40, 2**40), 0, 0)], {}),
        ([("w", "F32", (-1, 4), 0, 0)], {}),
        ([("w", "F32", (1.5,), 0, 0)], {}),
        ([("w", "F31", (1,), 0, 0)], {}),
        ([("w", "F32", (1,) * 65, 0, 0)], {}),
        ([("w", "F32", (True,), 0, 0)], {}),
        ([("w", "F32", (0, 2**63), 0, 0)], {}),
        ([(3, "F32", (1,), 0, 0)], {}),
        ([("w", "F32", (0,), 0, 0)] * 2, {}),
        ([], {"v": "w"}),
        ([("w", "F32", (0,), 0, 0)], {"w": "w"}),
        ([("w", "F32", (1,), -5, 0)], {}),
        ([("w", "F32", (0,), 0, 0), ("v", "F32", (0,), (0, 0), (0, 0))], {}),
    ],
)
def test_a_directory_that_cannot_be(rows, same, tmp_path):
    with pytest.raises(PackedFileError, match="the directory of "):
        unpack(with_directory(tmp_path / "a", rows, b"", same))


@pytest.mark.parametrize("text", [b"[1]", b"{}", b"[[[1]],{}]", b"nonsense", b"[" * 100_000, b"[[],[]]", b"\xff"])
def test_a_directory_of_something_else(text, tmp_path):
    kept = zlib.compress(text)
    head = struct.pack("<4sBII", layout.MAGIC, layout.VERSION, len(kept), zlib.crc32(kept))
    with pytest.raises(PackedFileError, match="the directory of "):
        unpack(written(tmp_path / "a", head + kept))


class Net(nn.Module):
    def __init__(self, width=4, more=False):
        super().__init__()
        self.first = nn.Linear(3, width)
        self.second = nn.Linear(width, 2, bias=not more)


def test_another_architecture_is_named_and_left_as_it_was(tmp_path):
    path = pack(Net(), tmp_path / "a")
    for other, words in [
        (Net(5), r"'first\.weight' is of shape \(4, 3\) in the file and of shape \(5, 3\) in the module"),
        (Net(more=True), r"'second\.bias' is of shape \(2,\) in the file and missing in the module"),
        (
            nn.ModuleDict({"first": nn.Linear(3, 4), "third": nn.Linear(1, 1)}),
            r"'third\.weight' is missing in the file",
        ),
    ]:
        before = {name: value.clone() for name, value in other.state_dict().items()}
        with pytest.raises(CompressError, match=words):
            load_packed(other, path)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_changed_file_leaves_the_module_as_it_was(tmp_path):
    path = pack(Net(), tmp_path / "a")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    module = Net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(PackedFileError, match="second"):
        load_packed(module, path)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Remembering(nn.Linear):
    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        self.steps = state["steps"]


def test_a_module_that_keeps_more_than_tensors_is_named(tmp_path):
    with pytest.raises(CompressError, match="'_extra_state' is missing in the file"):
        load_packed(Remembering(2, 2), pack(nn.Linear(2, 2), tmp_path / "a"))


def test_what_cannot_be_packed_is_named_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"sparse_coo.*'w'"):
        pack({"w": torch.eye(3).to_sparse()}, tmp_path / "a")
    with pytest.raises(ValueError, match=r"complex128.*'w'"):
        pack({"w": torch.zeros(3, dtype=torch.complex128)}, tmp_path / "a")
    with pytest.raises(ValueError, match=r"'w' is on the meta device"):
        pack({"w": torch.zeros(3, device="meta")}, tmp_path / "a")
    with pytest.raises(TypeError, match="give the module"):
        pack({"w": torch.eye(3)}, tmp_path / "a", ranges={"w": None})
    with pytest.raises(TypeError, match=r"'0\._extra_state' is a dict"):
        pack(nn.Sequential(Remembering(1, 1)), tmp_path / "a")
    with pytest.raises(AttributeError, match="third"):
        pack(Net(), tmp_path / "a", ranges=_range("third"))
    assert not list(Path(tmp_path).iterdir())


def _range(name):
    from lightning_compress.quantization.grid import Range

    return {name: Range(-1.0, 1.0)}

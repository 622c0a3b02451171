"""One tensor as bytes: its bits, the codes and scales of a grid that it is rounded on, or what a coarser one lacks."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_compress.packing.given import pack_given, unpack_given
from lightning_compress.packing.stream import PackedFileError, Stream, varint
from lightning_compress.packing.symbols import ALPHABET
from lightning_compress.packing.values import WAYS, codebook_of, pack_values, unpack_values

__all__ = [
    "DTYPES", "Codes", "Version", "bits_of", "checksum", "known_of", "pack_tensor", "tensor_bytes", "tensor_of",
    "ties_of", "unpack_tensor", "way_of",
]  # fmt: skip

DTYPES = {  # as safetensors names them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
BITS, GRID, BITS_GIVEN, GRID_GIVEN, SAME = range(5)
Known = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Codes:
    """A weight as whole numbers and scales.

    Args:
        integers: int8, of the weight's shape.
        scales: (parts,) float32, for equal parts of each of the pieces that `before` cuts the weight in.
        before: 1 where parts are output channels or groups of them; what lies before the dimension of the channels.

    >>> Codes(torch.tensor([[2, 3]], dtype=torch.int8), torch.tensor([0.5, 2.0])).product()
    tensor([[1., 6.]])
    """

    integers: Tensor
    scales: Tensor
    before: int = 1

    def product(self) -> Tensor:
        """Return the weight, float32."""
        parts = self.integers.reshape(self.before, len(self.scales), -1).float()
        return parts.mul_(self.scales.unsqueeze(-1)).view(self.integers.shape)


Version = tuple[Tensor, Codes | None]  # a tensor, and the codes it is kept by if it has a grid


def bits_of(tensor: Tensor) -> npt.NDArray[np.unsignedinteger]:
    """Return the bits of all elements as unsigned integers, (n,), from the CPU.

    >>> bits_of(torch.tensor([1.0, -0.0]))
    array([1065353216, 2147483648], dtype=uint32)
    """
    flat = (
        tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1).contiguous()
    )  # expanded ones have a stride of 0
    width = flat.element_size()
    found: npt.NDArray[np.unsignedinteger] = flat.view(_SAME_WIDTH[width]).numpy().view(_UNSIGNED[width])
    return found


def tensor_of(bits: npt.NDArray[np.unsignedinteger], dtype: str) -> Tensor:
    """Return the elements of some bits, (n,), sharing their memory.

    Raises:
        PackedFileError: bits of True and False that are neither.

    >>> tensor_of(np.array([0x3F800000], np.uint32), "F32")
    tensor([1.])
    """
    width = DTYPES[dtype].itemsize
    signed = bits.view(np.uint8 if width == 1 else f"i{width}")
    if dtype == "BOOL" and len(bits) and int(bits.max()) > 1:
        raise PackedFileError("expected 0 and 1 for True and False, got more")
    return torch.from_numpy(signed).view(DTYPES[dtype])


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes, little endian.

    >>> checksum(torch.tensor([1, 2], dtype=torch.uint8))
    3066839698
    """
    return zlib.crc32(bits_of(tensor).astype(f"<u{tensor.element_size()}", copy=False).data)


def ties_of(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the keys whose tensor is, in memory, that of an earlier key, and that key.

    >>> weight = torch.ones(2)
    >>> ties_of({"words": weight, "bias": torch.ones(2), "head": weight})
    {'head': 'words'}
    """
    first: dict[object, str] = {}
    holders = {name: first.setdefault(_place(tensor), name) for name, tensor in state.items()}
    return {name: holder for name, holder in holders.items() if name != holder}


def _place(tensor: Tensor) -> object:
    """What two keys of one tensor have in common; nothing but itself where there is no memory."""
    if not tensor.numel():
        return object()
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a whole tensor."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def known_of(tensor: Tensor, codes: Codes | None = None) -> Known | None:
    """Return the symbols that a finer version of a tensor can be coded by; None of a tensor of many values."""
    return codebook_of(bits_of(tensor))[1] if codes is None else bits_of(codes.integers).astype(np.uint8, copy=False)


def pack_tensor(tensor: Tensor, codes: Codes | None = None, coarser: Version | None = None) -> bytes:
    """Return a tensor as bytes, of which `unpack_tensor` makes it again; needs its dtype and shape.

    Args:
        tensor: of a dtype in DTYPES.
        codes: whose product is the tensor to the bit; None keeps the bits themselves.
        coarser: a version of it that the reader has, with its codes.
    """
    alone = bytes([BITS]) + pack_values(bits_of(tensor)) if codes is None else bytes([GRID]) + _grid(codes)
    if coarser is None:
        return alone
    if np.array_equal(bits_of(tensor), bits_of(coarser[0])):
        return bytes([SAME])
    known, own = known_of(*coarser), known_of(tensor, codes)
    if known is None or own is None:
        return alone
    head = bytes([GRID_GIVEN]) + _head(codes) if codes is not None else bytes([BITS_GIVEN]) + _book(tensor)
    return min(alone, head + pack_given(own, known), key=len)


def _book(tensor: Tensor) -> bytes:
    book = np.unique(bits_of(tensor))
    return varint(len(book)) + book.astype(book.dtype.newbyteorder("<")).tobytes()


def _head(codes: Codes) -> bytes:
    return varint(len(codes.scales)) + varint(codes.before) + pack_values(bits_of(codes.scales))


def _grid(codes: Codes) -> bytes:
    return _head(codes) + pack_values(bits_of(codes.integers))


def unpack_tensor(
    data: bytes | memoryview, dtype: str, shape: Sequence[int], coarser: Version | None = None
) -> Version:
    """Return the tensor of some bytes, and its codes if it has a grid.

    Raises:
        PackedFileError: they are not those of such a tensor.
    """
    stream, count, width = Stream(data), math.prod(shape), DTYPES[dtype].itemsize
    kind = stream.byte()
    if kind == SAME and coarser is not None:
        return coarser
    known = known_of(*coarser) if coarser is not None and kind in (BITS_GIVEN, GRID_GIVEN) else None
    codes = None
    if kind == BITS:
        tensor = tensor_of(unpack_values(stream, count, _UNSIGNED[width]), dtype)
    elif kind == BITS_GIVEN and known is not None:
        book = np.frombuffer(stream.take(stream.varint(ALPHABET) * width), np.dtype(_UNSIGNED[width]).newbyteorder("<"))
        own = unpack_given(stream, known)
        if int(own.max(initial=0)) >= len(book):
            raise PackedFileError(f"expected codes of {len(book)} values, got higher ones")
        tensor = tensor_of(book.astype(_UNSIGNED[width])[own], dtype)
    elif kind == GRID or (kind == GRID_GIVEN and known is not None):
        codes = _codes(stream, count, shape, known)
        tensor = codes.product().to(DTYPES[dtype])
    else:
        raise PackedFileError(f"expected a tensor's bits or codes, 0 to 4, got {kind}")
    if stream.left:
        raise PackedFileError(f"expected no more bytes, got {stream.left}")
    return tensor.reshape(tuple(shape)), codes


def way_of(data: bytes | memoryview) -> str:
    """Return in words how a tensor is kept."""
    stream = Stream(data)
    kind = stream.byte()
    if kind == BITS:
        return WAYS[stream.varint(len(WAYS) - 1)]
    return {GRID: "codes and scales", SAME: "as in the level before"}.get(kind, "what the level before lacks")


def _codes(stream: Stream, count: int, shape: Sequence[int], known: Known | None) -> Codes:
    parts, before = stream.varint(count), stream.varint(count)
    if not parts or not before or count % (parts * before):
        raise PackedFileError(f"expected scales for equal parts of {count} codes, got {before} x {parts}")
    scales = torch.from_numpy(unpack_values(stream, parts, np.uint32).view(np.float32))
    bits = unpack_values(stream, count, np.uint8) if known is None else unpack_given(stream, known)
    return Codes(
        torch.from_numpy(bits.astype(np.uint8, copy=False).view(np.int8)).reshape(tuple(shape)), scales, before
    )

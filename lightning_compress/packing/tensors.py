"""One tensor as bytes: its bits as they are, or the codes and scales of a grid that it is rounded on."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_compress.packing.stream import PackedFileError, Stream, varint
from lightning_compress.packing.values import WAYS, pack_values, unpack_values

__all__ = ["DTYPES", "Codes", "bits_of", "checksum", "pack_tensor", "tensor_bytes", "unpack_tensor", "way_of"]

DTYPES = {  # as safetensors names them
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
BITS, GRID = range(2)


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


def bits_of(tensor: Tensor) -> npt.NDArray[np.unsignedinteger]:
    """Return the bits of all elements as unsigned integers, (n,), from the CPU.

    >>> bits_of(torch.tensor([1.0, -0.0]))
    array([1065353216, 2147483648], dtype=uint32)
    """
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1)
    width = flat.element_size()
    found: npt.NDArray[np.unsignedinteger] = flat.view(_SAME_WIDTH[width]).numpy().view(_UNSIGNED[width])
    return found


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes, little endian.

    >>> checksum(torch.tensor([1, 2], dtype=torch.uint8))
    3066839698
    """
    return zlib.crc32(bits_of(tensor).astype(f"<u{tensor.element_size()}", copy=False).data)


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a whole tensor."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def pack_tensor(tensor: Tensor, codes: Codes | None = None) -> bytes:
    """Return a tensor as bytes, of which `unpack_tensor` makes it again; needs its dtype and shape.

    Args:
        tensor: of a dtype in DTYPES.
        codes: whose product is the tensor to the bit; None keeps the bits themselves.
    """
    if codes is None:
        return bytes([BITS]) + pack_values(bits_of(tensor))
    head = bytes([GRID]) + varint(len(codes.scales)) + varint(codes.before)
    return head + pack_values(bits_of(codes.scales)) + pack_values(bits_of(codes.integers))


def unpack_tensor(data: bytes | memoryview, dtype: str, shape: Sequence[int]) -> Tensor:
    """Return the tensor of some bytes.

    Raises:
        PackedFileError: they are not those of such a tensor.
    """
    stream, count, width = Stream(data), math.prod(shape), DTYPES[dtype].itemsize
    kind = stream.byte()
    if kind == BITS:
        tensor = _tensor(unpack_values(stream, count, _UNSIGNED[width]), dtype)
    elif kind == GRID:
        tensor = _on_grid(stream, count).to(DTYPES[dtype])
    else:
        raise PackedFileError(f"expected a tensor's bits or codes, 0 or 1, got {kind}")
    if stream.left:
        raise PackedFileError(f"expected no more bytes, got {stream.left}")
    return tensor.reshape(tuple(shape))


def way_of(data: bytes | memoryview) -> str:
    """Return in words how a tensor is kept."""
    stream = Stream(data)
    if stream.byte() == GRID:
        return "codes and scales"
    return WAYS[stream.varint(len(WAYS) - 1)]


def _tensor(bits: npt.NDArray[np.unsignedinteger], dtype: str) -> Tensor:
    width = DTYPES[dtype].itemsize
    signed = bits.view(np.uint8 if width == 1 else f"i{width}")
    if dtype == "BOOL" and len(bits) and int(bits.max()) > 1:
        raise PackedFileError("expected 0 and 1 for True and False, got more")
    return torch.from_numpy(signed).view(DTYPES[dtype])


def _on_grid(stream: Stream, count: int) -> Tensor:
    parts, before = stream.varint(count), stream.varint(count)
    if not parts or not before or count % (parts * before):
        raise PackedFileError(f"expected scales for equal parts of {count} codes, got {before} x {parts}")
    scales = torch.from_numpy(unpack_values(stream, parts, np.uint32).view(np.float32))
    integers = torch.from_numpy(unpack_values(stream, count, np.uint8).view(np.int8))
    return Codes(integers, scales, before).product()

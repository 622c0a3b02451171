"""The values of one tensor as bytes, each way that there is for them, the smallest by its counts.

Values are told apart by their bits, so that -0.0 and every NaN come back. The ways: as they are; the bytes of all
values by place, each place entropy coded (the exponents of floats take 3 bits instead of 8); a codebook of up to 256
values and their codes (Han et al. 2016, section 3); and zeros apart, with the rest in one of these ways.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightning_compress.packing.positions import gathered, pack_positions, unpack_positions
from lightning_compress.packing.stream import PackedFileError, Stream, varint
from lightning_compress.packing.symbols import ALPHABET, coded_bytes, pack_symbols, unpack_symbols

__all__ = ["WAYS", "codebook_of", "pack_values", "unpack_values"]

Bits = npt.NDArray[np.unsignedinteger]
STORED, BY_PLACE, CODEBOOK, ZEROS_APART = range(4)
WAYS = ("stored", "bytes by place", "codebook", "zeros apart")
SAMPLE = 1 << 12
FEWEST_ZEROS = 0.05  # of all values, for zeros to be kept apart
FIBONACCI = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: its products spread evenly
TRIES = 200
LEAST_GAIN = 0.98  # of the stored bytes, for an entropy coder to be worth its time


def pack_values(values: Bits) -> bytes:
    r"""Return values as bytes; their number and type are kept elsewhere.

    Args:
        values: (n,) unsigned integers: the bits of any elements.

    >>> pack_values(np.array([7, 7, 9], np.uint8))
    b'\x00\x07\x07\t'
    """
    found = [bytes([STORED]) + values.tobytes()]
    book, codes = codebook_of(values)
    taken = values != 0
    zeros = len(values) - int(np.count_nonzero(taken))
    if book is not None:
        kept = book.astype(book.dtype.newbyteorder("<")).tobytes()
        found.append(bytes([CODEBOOK]) + varint(len(book)) + kept + pack_symbols(codes, len(book)))
    if len(values) > zeros >= FEWEST_ZEROS * len(values) and (book is None or (len(book) > 2 and gathered(taken))):
        rest = values[taken]
        found.append(bytes([ZEROS_APART]) + varint(len(rest)) + pack_positions(taken) + pack_values(rest))
    elif values.itemsize > 1 and (len(values) <= SAMPLE or (book is None and _gains(values))):
        planes = _planes(values)
        found.append(bytes([BY_PLACE]) + b"".join(pack_symbols(plane, ALPHABET) for plane in planes))
    return min(found, key=len)


def unpack_values(stream: Stream, count: int, dtype: npt.DTypeLike, zeros: bool = True) -> Bits:
    """Return the next `count` values of a stream as unsigned integers of `dtype`; `zeros` says that some may be apart.

    Raises:
        PackedFileError: the bytes are not those of so many values.
    """
    way, kind = stream.byte(), np.dtype(dtype)
    if way == STORED:
        return np.frombuffer(stream.take(count * kind.itemsize), kind.newbyteorder("<")).astype(kind)
    if way == BY_PLACE:
        planes = np.empty((count, kind.itemsize), np.uint8)
        for place in range(kind.itemsize):
            planes[:, place] = unpack_symbols(stream, count, ALPHABET)
        return planes.view(kind.newbyteorder("<")).reshape(count).astype(kind, copy=False)
    if way == CODEBOOK:
        size = stream.varint(ALPHABET)
        book = np.frombuffer(stream.take(size * kind.itemsize), kind.newbyteorder("<")).astype(kind)
        if not size:
            raise PackedFileError("expected a codebook with an entry, got an empty one")
        return book[unpack_symbols(stream, count, size)]
    if way == ZEROS_APART and zeros:  # no zeros are left in the rest: so nothing nests, whatever a file says
        taken = stream.varint(count)
        if taken == count:
            raise PackedFileError(f"expected zeros among {count} values, got none")
        places = unpack_positions(stream, count, taken)
        values = np.zeros(count, kind)
        values[places] = unpack_values(stream, taken, kind, zeros=False)
        return values
    raise PackedFileError(f"expected a way of coding values, 0 to {3 if zeros else 2}, got {way}")


def codebook_of(values: Bits) -> tuple[Bits | None, npt.NDArray[np.uint8]]:
    """Return the distinct values, ascending, and the code of each; None where they are too many to gain by.

    >>> codebook_of(np.array([7, 9, 7, 7], np.uint16))
    (array([7, 9], dtype=uint16), array([0, 1, 0, 0], dtype=uint8))
    """
    none = None, np.empty(0, np.uint8)
    book = np.unique(values[:: max(1, len(values) // SAMPLE)])
    while 0 < len(book) <= ALPHABET and len(book) * values.itemsize < values.nbytes:
        codes = _codes(book, values)
        missing = values[book[codes] != values]
        if not len(missing):
            return book, codes
        book = np.union1d(book, np.unique(missing[:SAMPLE]))
    return none


def _codes(book: Bits, values: Bits) -> npt.NDArray[np.uint8]:
    """The place in the book of each value that is in it, by a table whose slots no two of them share."""
    if values.itemsize <= 2:
        slots, where = book, values
    else:
        bits = 8 * values.itemsize
        factor, shift = values.dtype.type(1), values.dtype.type(bits - 16)
        for seed in range(1, TRIES):
            factor = values.dtype.type(FIBONACCI * (2 * seed + 1) % 2**bits)
            slots = (book * factor) >> shift
            if len(np.unique(slots)) == len(book):
                break
        else:
            return np.searchsorted(book, values).clip(max=len(book) - 1).astype(np.uint8)
        where = (values * factor) >> shift
    table = np.zeros(1 << 16, np.uint8)
    table[slots] = np.arange(len(book), dtype=np.uint8)
    return table[where]


def _gains(values: Bits) -> bool:
    """Say whether coding each byte of the values by its place gains anything, from a part of them."""
    planes = _planes(np.ascontiguousarray(values[:: max(1, len(values) // (SAMPLE * 16))]))
    coded = sum(min(coded_bytes(np.bincount(plane, minlength=ALPHABET)), len(plane)) for plane in planes)
    return coded < LEAST_GAIN * planes.size


def _planes(values: Bits) -> npt.NDArray[np.uint8]:
    """(itemsize, n): the lowest byte of all values, the next, ..."""
    bytes_of = values.astype(values.dtype.newbyteorder("<"), copy=False).view(np.uint8)
    return np.ascontiguousarray(bytes_of.reshape(-1, values.itemsize).T)

"""Symbols coded given other symbols that the reader has already: a finer version of a tensor inside a coarser one.

For each symbol of the coarser version the finer ones that occur there are coded with counts of their own: n H(X | Y)
bits. A weight that a sparser version has keeps its value (nothing to code), an 8-bit code within a 4-bit one is one of
about sixteen.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from lightning_compress.packing.stream import Stream, varint
from lightning_compress.packing.symbols import ALPHABET, pack_symbols, unpack_symbols

__all__ = ["pack_given", "unpack_given"]

Symbols = npt.NDArray[np.uint8]


def pack_given(symbols: Symbols, known: Symbols) -> bytes:
    """Return symbols as bytes, of which `unpack_given` makes them again with what is known.

    Args:
        symbols: (n,).
        known: (n,), of the coarser version.

    >>> fine = np.random.default_rng(0).integers(0, 16, 4000, dtype=np.uint8)
    >>> len(pack_symbols(fine, 16)) > 2000, len(pack_given(fine, fine // 4)) < 1100, len(pack_given(fine, fine))
    (True, True, 64)
    """
    found = []
    for places in _places(known):
        part = symbols[places]
        local = np.unique(part)
        relabelled = np.searchsorted(local, part).astype(np.uint8)
        found.append(varint(len(local)) + local.tobytes() + pack_symbols(relabelled, len(local)))
    return b"".join(found)


def unpack_given(stream: Stream, known: Symbols) -> Symbols:
    """Return the next symbols of a stream, (n,).

    Raises:
        PackedFileError: the bytes are not those of symbols with this known of them.
    """
    symbols = np.empty(len(known), np.uint8)
    for places in _places(known):
        size = stream.varint(ALPHABET)
        local = np.frombuffer(stream.take(size), np.uint8)
        symbols[places] = local[unpack_symbols(stream, len(places), size)]
    return symbols


def _places(known: Symbols) -> Iterator[npt.NDArray[np.int64]]:
    """Where each of the known symbols is, in the order of the symbols."""
    order = np.argsort(known, kind="stable")
    ends = np.cumsum(np.bincount(known, minlength=ALPHABET))
    for start, end in zip(np.concatenate([[0], ends[:-1]]), ends, strict=True):
        if end > start:
            yield order[start:end]

"""Where the values that are not zero are: a bitmap, or the gaps between them, both entropy coded.

Gaps are those of S. Han et al., "Deep Compression", 2016 (arXiv:1510.00149), section 2 (relative index), in bytes: a
gap of 255 or more is written as fillers of 255 and a rest. For zeros that are spread evenly both are as small as can
be; where zeros gather, gaps are less.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightning_compress.packing.stream import PackedFileError, Stream, varint
from lightning_compress.packing.symbols import ALPHABET, coded_bytes, pack_symbols, unpack_symbols

__all__ = ["pack_positions", "unpack_positions"]

Places = npt.NDArray[np.int64]
BITMAP, GAPS = range(2)
FILLER = 255
SMALL = 1 << 16  # places: up to there both ways are tried
CLEARLY, FASTER = 0.98, 1.01


def gathered(taken: npt.NDArray[np.bool_]) -> bool:
    """Say whether gaps need clearly fewer bytes than a bitmap, so that zeros are worth being kept apart from codes.

    >>> gathered(np.arange(100_000) < 10_000), gathered(np.random.default_rng(0).random(100_000) < 0.1)
    (True, False)
    """
    gaps, bitmap = _estimates(taken)
    return len(taken) < SMALL or gaps < CLEARLY * bitmap


def pack_positions(taken: npt.NDArray[np.bool_]) -> bytes:
    """Return where `taken`, (n,) bool, is True as bytes; n and the number taken are kept elsewhere.

    >>> len(pack_positions(np.arange(10_000) < 100))
    4
    """
    gaps, bitmap = _estimates(taken)
    found = []
    if gaps <= FASTER * bitmap or len(taken) < SMALL:  # fewer symbols are read faster
        between = _gaps(np.flatnonzero(taken))
        found.append(bytes([GAPS]) + varint(len(between)) + pack_symbols(between, ALPHABET))
    if gaps > FASTER * bitmap or len(taken) < SMALL:
        found.append(bytes([BITMAP]) + pack_symbols(taken.view(np.uint8), 2))
    return min(found, key=len)


def _estimates(taken: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """About how many bytes gaps need, and a bitmap."""
    places = np.flatnonzero(taken)
    gaps = coded_bytes(np.bincount(_gaps(places), minlength=ALPHABET)) if len(places) * 2 < len(taken) else float("inf")
    return gaps, coded_bytes(np.array([len(taken) - len(places), len(places)]))


def unpack_positions(stream: Stream, count: int, taken: int) -> Places:
    """Return the places, ascending int64, of `taken` values among `count`.

    Raises:
        PackedFileError: the bytes are not those of so many places.
    """
    method = stream.byte()
    if method == BITMAP:
        places = np.flatnonzero(unpack_symbols(stream, count, 2))
    elif method == GAPS:
        gaps = unpack_symbols(stream, stream.varint(taken + count // FILLER), ALPHABET)
        places = np.cumsum(gaps, dtype=np.int64)
        places = places[gaps != FILLER] + np.arange(np.count_nonzero(gaps != FILLER))
    else:
        raise PackedFileError(f"expected a way of coding positions, 0 or 1, got {method}")
    if len(places) != taken or (taken and int(places[-1]) >= count):
        raise PackedFileError(f"expected {taken} places below {count}, got others")
    return places


def _gaps(places: Places) -> npt.NDArray[np.uint8]:
    """Empty places before each taken one, with fillers."""
    gaps = np.diff(places, prepend=-1) - 1
    fillers = gaps // FILLER
    found = np.full(len(gaps) + int(fillers.sum()), FILLER, np.uint8)
    found[np.arange(len(gaps)) + np.cumsum(fillers)] = gaps % FILLER
    return found

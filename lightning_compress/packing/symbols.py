"""Symbols of a small alphabet as few bytes: an entropy coder, repeats, or a byte each, whatever is least.

The entropy coder is constriction's asymmetric numeral system (J. Duda, "Asymmetric numeral systems", 2013,
arXiv:1311.2540) over the symbols' counts: n H bits and the table of counts, H being their entropy. zstandard is less
where patterns repeat.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_compress.packing.stream import PackedFileError, Stream, varint

__all__ = ["ALPHABET", "coded_bytes", "pack_symbols", "unpack_symbols"]

Symbols = npt.NDArray[np.uint8]
ALPHABET = 256
STORED, ENTROPY, REPEATS, ONE, ENTROPY_OF_FEW = range(5)
CHUNK = 1 << 20  # symbols that are coded at a time, so that their 32-bit form stays small
SCALE = 1 << 20  # counts are kept as shares of this many, where there are more
LEVEL = 9
TRIED = 1 << 16  # symbols on which repeats are tried first
WORTH = 0.97  # of a byte a symbol: above, coding costs more time than it saves bytes


def coded_bytes(counts: npt.NDArray[np.int64]) -> float:
    """Return about how many bytes the entropy coder needs for symbols with these counts, with its table.

    >>> round(coded_bytes(np.array([400, 400])), 1)
    111.0
    """
    kept = counts[counts > 0]
    if len(kept) < 2:
        return 2.0
    return float(-(kept * np.log2(kept / counts.sum())).sum() / 8) + len(_table(_shares(counts))) + 6


def pack_symbols(symbols: Symbols, alphabet: int) -> bytes:
    """Return symbols as bytes, of which `unpack_symbols` makes them again; needs their number and the alphabet.

    Args:
        symbols: (n,), each below `alphabet`.
        alphabet: 1 to 256.

    >>> len(pack_symbols(np.zeros(1000, np.uint8), 16))
    2
    """
    counts = np.bincount(symbols, minlength=alphabet)
    if counts.max(initial=0) == len(symbols):
        return bytes([ONE, int(symbols[0]) if len(symbols) else 0])
    found = [bytes([STORED]) + symbols.tobytes()]
    if coded_bytes(counts) < WORTH * len(symbols):
        found.append(_entropy_coded(symbols, counts))
    if _repeats(symbols, len(min(found, key=len)) / len(symbols)):
        found.append(bytes([REPEATS]) + _with_length(_zstandard().ZstdCompressor(level=LEVEL).compress(symbols)))
    return min(found, key=len)


def unpack_symbols(stream: Stream, count: int, alphabet: int) -> Symbols:
    """Return the next `count` symbols of a stream.

    Raises:
        PackedFileError: the bytes are not those of so many symbols of this alphabet.
    """
    method = stream.byte()
    if method == ONE:
        return np.full(count, _below(stream.byte(), alphabet), np.uint8)
    if method == STORED:
        symbols = np.frombuffer(stream.take(count), np.uint8).copy()
    elif method in (ENTROPY, ENTROPY_OF_FEW):
        symbols = _entropy_decoded(stream, count, _read_table(stream, alphabet, few=method == ENTROPY_OF_FEW))
    elif method == REPEATS:
        symbols = _decompressed(stream.take(stream.varint()), count)
    else:
        raise PackedFileError(f"expected a way of coding symbols, 0 to 4, got {method}")
    _below(int(symbols.max(initial=0)), alphabet)
    return symbols


def _below(symbol: int, alphabet: int) -> int:
    if symbol >= alphabet:
        raise PackedFileError(f"expected symbols below {alphabet}, got {symbol}")
    return symbol


def _with_length(data: bytes) -> bytes:
    return varint(len(data)) + data


def _repeats(symbols: Symbols, bytes_a_symbol: float) -> bool:
    """Say whether repeats may be less, by a part: they are slow to look for."""
    if len(symbols) <= TRIED:
        return True
    middle = len(symbols) // 2
    part = symbols[middle - TRIED // 2 : middle + TRIED // 2]
    return len(_zstandard().ZstdCompressor(level=LEVEL).compress(part)) < bytes_a_symbol * len(part)


def _shares(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Counts as whole shares of SCALE, none of a symbol that occurs being 0."""
    scaled = np.maximum(counts * SCALE // max(int(counts.sum()), 1), counts > 0)
    return np.where(counts.sum() <= SCALE, counts, scaled)


def _entropy_coded(symbols: Symbols, counts: npt.NDArray[np.int64]) -> bytes:
    shares = _shares(counts)
    coder, model = _constriction().stream.stack.AnsCoder(), _model(shares)
    for start in range((len(symbols) - 1) // CHUNK * CHUNK, -1, -CHUNK):  # a stack: the last symbol goes in first
        coder.encode_reverse(symbols[start : start + CHUNK].astype(np.int32), model)
    words: bytes = coder.get_compressed().astype("<u4").tobytes()
    return _table(shares) + varint(len(words) // 4) + words


def _table(shares: npt.NDArray[np.int64]) -> bytes:
    """The shares of all symbols, or of those that occur, each after its distance from the one before."""
    whole = bytes([ENTROPY]) + b"".join(varint(share) for share in shares.tolist())
    places = np.flatnonzero(shares)
    steps = np.diff(places, prepend=0).tolist()
    pairs = b"".join(varint(step) + varint(share) for step, share in zip(steps, shares[places].tolist(), strict=True))
    return min(whole, bytes([ENTROPY_OF_FEW]) + varint(len(places)) + pairs, key=len)


def _read_table(stream: Stream, alphabet: int, few: bool) -> npt.NDArray[np.int64]:
    if not few:
        return np.array([stream.varint(SCALE) for _ in range(alphabet)], np.int64)
    shares, at = np.zeros(alphabet, np.int64), 0
    for _ in range(stream.varint(alphabet)):
        at += stream.varint(alphabet)
        shares[_below(at, alphabet)] = stream.varint(SCALE)
    return shares


def _entropy_decoded(stream: Stream, count: int, shares: npt.NDArray[np.int64]) -> Symbols:
    if np.count_nonzero(shares) < 2:
        raise PackedFileError("expected shares of two symbols or more, got fewer")
    words = np.frombuffer(stream.take(4 * stream.varint(stream.left)), "<u4").astype(np.uint32)
    try:
        coder, model = _constriction().stream.stack.AnsCoder(words), _model(shares)
    except ValueError as error:
        raise PackedFileError(f"the entropy coder refuses its words: {error}") from error
    symbols = np.empty(count, np.uint8)
    for start in range(0, count, CHUNK):
        symbols[start : start + CHUNK] = coder.decode(model, min(CHUNK, count - start))
    return symbols


def _model(shares: npt.NDArray[np.int64]) -> Any:
    return _constriction().stream.model.Categorical(shares / shares.sum(), perfect=False)


def _decompressed(data: memoryview, count: int) -> Symbols:
    zstandard = _zstandard()
    try:
        # The frame says its size, for which memory is taken, so that it is looked at first.
        told = zstandard.get_frame_parameters(bytes(data[:18])).content_size
        if told != count:
            raise PackedFileError(f"expected {count} symbols, got {told}")
        found = zstandard.ZstdDecompressor().decompress(bytes(data))
    except zstandard.ZstdError as error:
        raise PackedFileError(f"zstandard cannot read its bytes: {error}") from error
    if len(found) != count:
        raise PackedFileError(f"expected {count} symbols, got {len(found)}")
    return np.frombuffer(found, np.uint8).copy()


def _constriction() -> Any:
    return _optional("constriction")


def _zstandard() -> Any:
    return _optional("zstandard")


def _optional(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"packed files need {name}; pip install 'lightning-compress[packed]'") from error

"""Whole numbers and pieces of bytes, written one after the other, and read with their bounds checked."""

from __future__ import annotations

from lightning_compress.errors import CompressError

__all__ = ["PackedFileError", "Stream", "varint"]

LONGEST_VARINT = 9  # bytes: 63 bits


class PackedFileError(CompressError):
    """A packed file that is cut, changed, of a newer version, or claims more than it can hold."""


def varint(number: int) -> bytes:
    r"""Return a whole number as LEB128: seven bits a byte, lowest first, the high bit says that more follow.

    >>> varint(5), varint(300)
    (b'\x05', b'\xac\x02')
    """
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


class Stream:
    """Bytes that are read from front to back; what is not there raises.

    >>> stream = Stream(varint(300) + b"ab")
    >>> stream.varint(), bytes(stream.take(2)), stream.left
    (300, b'ab', 0)
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self._at = memoryview(data), 0

    @property
    def left(self) -> int:
        """Bytes that have not been read."""
        return len(self._data) - self._at

    def take(self, count: int) -> memoryview:
        """Return the next bytes, without a copy.

        Raises:
            PackedFileError: there are fewer.
        """
        if count > self.left:
            raise PackedFileError(f"expected {count} more bytes, got {self.left}")
        self._at += count
        return self._data[self._at - count : self._at]

    def byte(self) -> int:
        """Return the next byte."""
        return self.take(1)[0]

    def varint(self, most: int = 2**63 - 1) -> int:
        """Return the next whole number.

        Raises:
            PackedFileError: it is above `most`, or longer than 63 bits.
        """
        number = 0
        for place in range(LONGEST_VARINT):
            byte = self.byte()
            number |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                break
        else:
            raise PackedFileError("expected a number of 63 bits, got a longer one")
        if number > most:
            raise PackedFileError(f"expected a number up to {most}, got {number}")
        return number

"""Rows of bytes by key, in files that many processes write side by side and read through memory maps.

A folder holds parts, each written by one process of one run: `values-0.bin`, the rows, and `keys-0.bin`, 16 bytes for
each of them. Nothing is ever written over, and keys follow their values, so that a killed process leaves at most a row
without its key, which nobody reads.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_compress.distillation.keys import KEY_BYTES

__all__ = ["Parts"]

ROW_BITS = 40  # a place is one integer, part and row: tuples would take three times the memory


class Parts:
    """The parts in a folder; what this process adds goes into one of its own, made when the first row comes.

    Args:
        folder: of the parts; other files in it are not touched.
        row_bytes: length of each row.
    """

    def __init__(self, folder: Path, row_bytes: int) -> None:
        self.folder, self.row_bytes = folder, row_bytes
        self._places: dict[bytes, int] = {}
        self._rows: dict[int, int] = {}
        self._maps: dict[int, NDArray[np.uint8]] = {}
        self._own: int | None = None

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        """Whether this key's row is known."""
        return key in self._places

    def refresh(self) -> None:
        """Take up the whole rows that other processes wrote; one of them may be writing the next."""
        for path in self.folder.glob("keys-*.bin"):
            part = int(path.stem.partition("-")[2])
            if self._file("values", part).exists():
                self._read_keys(part)

    def find(self, keys: list[bytes]) -> NDArray[np.uint8] | None:
        """Return the rows of these keys, (keys, row_bytes), copied; None unless all are known."""
        places = [self._places.get(key, -1) for key in keys]
        if -1 in places:
            return None
        at = np.array(places, dtype=np.int64)
        parts, rows = at >> ROW_BITS, at & ((1 << ROW_BITS) - 1)
        found = np.empty((len(keys), self.row_bytes), dtype=np.uint8)
        for part in np.unique(parts):
            here = parts == part
            found[here] = self._mapped(int(part))[rows[here]]
        return found

    def add(self, keys: list[bytes], rows: bytes) -> None:
        """Write new rows; the keys are all different, and none of them is known."""
        part, self._own = self._claimed() if self._own is None else self._own, None
        _append(self._file("values", part), rows)
        _append(self._file("keys", part), b"".join(keys))
        self._own = part  # a part whose writing failed, on a full disk, is not gone on with
        self._index(part, keys)

    def close(self) -> None:
        """Let go of the memory maps; `find` makes them again."""
        self._maps.clear()

    def _file(self, kind: str, part: int) -> Path:
        return self.folder / f"{kind}-{part}.bin"

    def _read_keys(self, part: int) -> None:
        start = self._rows.get(part, 0)
        with self._file("keys", part).open("rb") as file:
            file.seek(start * KEY_BYTES)
            data = file.read()
        whole = self._file("values", part).stat().st_size // self.row_bytes
        count = min(len(data) // KEY_BYTES, whole - start)
        self._index(part, [data[i * KEY_BYTES : (i + 1) * KEY_BYTES] for i in range(count)])

    def _index(self, part: int, keys: list[bytes]) -> None:
        start = self._rows.get(part, 0)
        for row, key in enumerate(keys, start):
            self._places[key] = part << ROW_BITS | row
        self._rows[part] = start + len(keys)

    def _claimed(self) -> int:
        """Make the files of a part that no other process, of this run or another, will write."""
        part = len(list(self.folder.glob("keys-*.bin")))
        while True:
            try:
                self._file("keys", part).open("xb").close()
            except FileExistsError:
                part += 1
            else:
                self._file("values", part).open("wb").close()
                return part

    def _mapped(self, part: int) -> NDArray[np.uint8]:
        if part not in self._maps or len(self._maps[part]) < self._rows[part]:
            shape = (self._rows[part], self.row_bytes)
            self._maps[part] = np.memmap(self._file("values", part), dtype=np.uint8, mode="r", shape=shape)
        return self._maps[part]


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)

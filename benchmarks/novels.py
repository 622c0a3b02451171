"""Six novels by Jane Austen as one text of characters, read from the R package janeaustenr without R."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

DATA_DIR = "/usr/lib/R/site-library/janeaustenr"
HELD_OUT = 0.05  # of each novel, its end
STRINGS = 16  # R's type of a vector of strings


@dataclass(frozen=True)
class Novels:
    """Character numbers, (characters,) int64, to train on and to validate on, and the characters they stand for."""

    train: Tensor
    held_out: Tensor
    characters: str


@dataclass(frozen=True)
class Windows(Dataset[Tensor]):
    """`steps` batches, each (batch, length) int64 from places that the seed draws; a batch is one item."""

    text: Tensor
    steps: int
    batch: int
    length: int
    seed: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        starts = torch.randint(len(self.text) - self.length, (self.batch,), generator=generator)
        return torch.stack([self.text[start : start + self.length] for start in starts.tolist()])


def novels(folder: str) -> Novels:
    path = Path(folder) / "data" / "Rdata.rdb"
    if not path.is_file():
        raise SystemExit(
            f"no novels in {path}: apt-get install r-cran-janeaustenr, or unpack that package and give --data-dir"
        )
    texts = [text.decode("utf-8") for text in stored_texts(path.read_bytes())]
    characters = "".join(sorted(set("".join(texts))))
    number = {character: place for place, character in enumerate(characters)}
    numbers = [torch.tensor([number[character] for character in text]) for text in texts]
    ends = [round(len(text) * (1 - HELD_OUT)) for text in texts]
    parts = list(zip(numbers, ends, strict=True))
    train, held_out = torch.cat([text[:end] for text, end in parts]), torch.cat([text[end:] for text, end in parts])
    return Novels(train, held_out, characters)


def stored_texts(raw: bytes) -> list[bytes]:
    """Return the texts in a lazy-load file: records of a length and a zlib stream, each one vector of lines."""
    texts = []
    while raw:
        stream = zlib.decompressobj()
        texts.append(b"\n".join(lines(stream.decompress(raw[4:]))))
        raw = stream.unused_data
    return texts


def lines(record: bytes) -> list[bytes]:
    """Return the strings of a vector in R's serialization: format, version 3, an encoding's name, type, count."""
    at = 18 + struct.unpack_from(">I", record, 14)[0]
    kind, count = struct.unpack_from(">II", record, at)
    if record[:2] != b"X\n" or kind != STRINGS:
        raise ValueError(f"expected a vector of strings in R's binary format, got {record[:2]!r} and type {kind}")
    at, found = at + 8, []
    for _ in range(count):
        size = struct.unpack_from(">i", record, at + 4)[0]
        found.append(record[at + 8 : at + 8 + size])
        at += 8 + size
    return found

"""Write a file beside its place and move it there at the end, so that only a file that passed its check appears."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["written_at_the_end"]


@contextmanager
def written_at_the_end(path: Path, suffix: str = "") -> Iterator[Path]:
    """Give a path beside `path` to write to; move it there unless the block raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished{suffix}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)

"""Write a file beside its place and move it there at the end, so that only a file that passed its check appears."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["written_at_the_end"]


@contextmanager
def written_at_the_end(path: Path, suffix: str = "", beside: Sequence[str] = ()) -> Iterator[Path]:
    """Give a path beside `path` to write to; move it there unless the block raises.

    Args:
        path: where the file is to appear.
        suffix: how the unfinished file's name must end.
        beside: suffixes of files that belong to it and have its stem; they move first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished{suffix}")
    moves = [(unfinished.with_suffix(each), path.with_suffix(each)) for each in beside] + [(unfinished, path)]
    try:
        yield unfinished
        for made, kept in moves:
            made.replace(kept)
    finally:
        for made, _ in moves:
            made.unlink(missing_ok=True)

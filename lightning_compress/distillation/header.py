"""The header of a cache's folder: whose logits it holds and how they lie there; what is not this run's is refused."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_compress.distillation.rows import RowFormat, RowType
from lightning_compress.errors import CompressError

__all__ = ["check_folder", "read_header", "write_header"]

FORMAT = 1
NAME = "header.json"
OURS = re.compile(r"header\.json|(keys|values)-\d+\.bin|\..*")
CURES = {
    "format": "delete it, or read it with the version of this package that wrote it",
    "teacher": "other weights, layers or dtypes make another teacher: give each a folder of its own",
    "dtype": "pass LogitCache(folder, dtype={!r}), or another folder",
    "top_k": "pass LogitCache(folder, top_k={!r}), or another folder",
    "layers": "teach the same layers, {!r}, or give another folder",
    "logits": "teach by logits too, or not, as the run that wrote it, or give another folder",
}


def check_folder(folder: Path) -> None:
    """Make a cache's folder, or refuse one that holds anything else. Runs when a cache is opened.

    Raises:
        CompressError: other files, or parts without a header.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if not OURS.fullmatch(name)]
    headless = [name for name in names if name.endswith(".bin") and not (folder / NAME).exists()]
    if others or headless:
        raise CompressError(
            f"expected the cache '{folder}' to be an empty folder, or one with a {NAME} and its parts, got "
            f"{', '.join(map(repr, (others or headless)[:3]))}; give the cache a folder of its own"
        )


def read_header(
    folder: Path, teacher: str | None, dtype: RowType, top_k: int | None, layers: Collection[str], logits: bool
) -> RowFormat | None:
    """Return the format of a folder's rows; None where nothing was written yet.

    Args:
        folder: the cache's.
        teacher: this run's; None takes whoever's it is, and what is there beyond `layers` and `logits`.
        dtype: this run's.
        top_k: this run's.
        layers: what this run reads of which layers.
        logits: whether this run reads logits.

    Raises:
        CompressError: the header's are others.
    """
    if not (folder / NAME).exists():
        return None
    header = _parsed((folder / NAME).read_text(encoding="utf-8"))
    there = {**header, "layers": sorted(header.get("layers", {})), "logits": header.get("shape") is not None}
    wanted: dict[str, Any] = {"format": FORMAT, "teacher": teacher, "dtype": dtype, "top_k": top_k}
    wanted |= {"layers": sorted(layers), "logits": logits}
    for name, value in wanted.items():
        found = there.get(name)
        if found != value and not (teacher is None and _enough(name, found, value)):
            raise CompressError(
                f"the cache '{folder}' has {name} {found!r}, this run has {name} {value!r}; {CURES[name].format(found)}"
            )
    shapes = {name: [tuple(shape) for shape in own] for name, own in header.get("layers", {}).items()}
    return RowFormat(None if header["shape"] is None else tuple(header["shape"]), dtype, top_k, shapes)


def _enough(name: str, found: Any, wanted: Any) -> bool:
    """Whether who only reads can do with what is there."""
    if name == "layers":
        return set(wanted) <= set(found)
    return name == "teacher" or (name == "logits" and not wanted)


def write_header(folder: Path, teacher: str, form: RowFormat) -> None:
    """Write the header, unless another process was first; read it again afterwards. Runs when the first row comes."""
    draft = folder / f".{uuid.uuid4().hex}.json"
    header = {"format": FORMAT, "teacher": teacher, **asdict(form)}
    if not form.layers:
        del header["layers"]  # as before there were any
    draft.write_text(json.dumps(header), encoding="utf-8")
    try:
        os.link(draft, folder / NAME)  # whole or not at all
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def _parsed(text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except json.JSONDecodeError:
        header = None
    return header if isinstance(header, dict) else {}  # of no format, which is refused

"""Results that grow cell by cell, in a JSON file of one cell a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Cells = list[dict[str, Any]]


def load(path: Path) -> Cells:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def save(path: Path, cells: Cells) -> None:
    """Write one cell a line, by a file beside it: an interrupted run leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(cell) for cell in cells)
    beside = path.with_suffix(".part")
    beside.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    beside.replace(path)

"""A callback without a row stops the collection; tests/conftest.py tells, at the end, how many promises were kept.

A callback's first row meets each promise in every variant (of modules, precisions, places of an exception, ...). Its
further rows, one a mode, meet each promise too, but a third of its variants, and each mode another third;
LIGHTNING_COMPRESS_WHOLE_MATRIX=1 runs them all.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from tests.conformance.cases import PROMISES, ROWS, without_row

HERE = Path(__file__).parent
WHOLE = os.environ.get("LIGHTNING_COMPRESS_WHOLE_MATRIX") == "1"
SHARE = 3


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = without_row(ROWS)
    if missing:
        raise pytest.UsageError(f"{', '.join(missing)} has no row in tests/conformance/cases.py; add one to ROWS")
    unknown = sorted({name for row in ROWS for name in row.excused} - {*PROMISES})
    if unknown:
        raise pytest.UsageError(f"a row is excused from {unknown}, which is no promise of the table")
    for item in items:
        name = getattr(getattr(item, "function", None), "promise", None)
        if name is not None and HERE in item.path.parents:
            item.user_properties.append(("promise", f"{name} | {item.callspec.params['row'].name}"))
    left_out = set() if WHOLE else _variants_of_modes(items)
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def _variants_of_modes(items: list[pytest.Item]) -> set[pytest.Item]:
    """Return the variants of promises that further rows of a callback do not meet."""
    first = {row.callback: row.name for row in reversed(ROWS)}
    modes = {row.name: place for place, row in enumerate(ROWS) if first[row.callback] != row.name}
    variants: dict[tuple[object, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        row = getattr(item, "callspec", None) and item.callspec.params.get("row")
        if HERE in item.path.parents and row is not None and row.name in modes:
            variants[item.function, row.name].append(item)
    return {
        item
        for (_, name), group in variants.items()
        for number, item in enumerate(group)
        if number % min(SHARE, len(group)) != modes[name] % min(SHARE, len(group))
    }


@pytest.fixture(autouse=True)
def quiet_corner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, on one thread: results are compared to the bit."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

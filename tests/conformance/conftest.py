"""A callback without a row stops the collection; tests/conftest.py tells, at the end, how many promises were kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conformance.cases import PROMISES, ROWS, without_row

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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


@pytest.fixture(autouse=True)
def quiet_corner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, on one thread: results are compared to the bit."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

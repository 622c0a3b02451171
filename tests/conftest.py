"""At the end of a run, the number of conformance promises kept; here, where pytest-xdist's controller finds it."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    kept, broken = (_told(terminalreporter, outcome) for outcome in ("passed", "failed"))
    if kept or broken:
        callbacks = len({pair.split(" | ")[1] for pair in kept | broken})
        promises = {pair.split(" | ")[0] for pair in kept | broken}
        line = f"conformance: {len(promises)} promises x {callbacks} callbacks, {len(kept - broken)} of "
        terminalreporter.write_line(f"{line}{len(kept | broken)} pairs kept")


def _told(terminalreporter: Any, outcome: str) -> set[str]:
    reports = terminalreporter.stats.get(outcome, [])
    return {value for report in reports for key, value in getattr(report, "user_properties", ()) if key == "promise"}

"""Who runs a trial: a process, by host, number and start; so that a trial whose process was killed is found."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

__all__ = ["is_gone", "this_process"]


def this_process() -> dict[str, str]:
    """Return who runs: host, process number and start; numbers are used again, starts are not.

    >>> this_process()["pid"] == str(os.getpid())
    True
    """
    return {"host": platform.node(), "pid": str(os.getpid()), "start": _own_start(os.getpid())}


def is_gone(owner: Mapping[str, str]) -> bool:
    """Say whether the process is known to have ended; of another host's processes nothing is known.

    >>> is_gone(this_process()), is_gone({**this_process(), "start": "long ago"})
    (False, True)
    """
    return owner["host"] == platform.node() and _start(int(owner["pid"])) != owner["start"]


@cache
def _own_start(pid: int) -> str:
    return _start(pid)


def _start(pid: int) -> str:
    """Return when a process started, in the system's own words; empty where there is none."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        return "" if fields[0] == "Z" else fields[19]  # clock ticks from the boot; a zombie has ended
    found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return found.stdout.strip()

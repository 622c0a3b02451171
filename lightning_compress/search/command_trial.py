"""One trial of a command line: a run of the user's own training command with an overlay, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_compress.errors import CompressError

__all__ = ["CommandTrial", "TrialFailed"]

WATCHER = "lightning_compress.callbacks.trials.TrialResult"
RESULT, PROGRESS = "result.json", "progress.jsonl"  # what TrialResult writes
TRIAL = "LIGHTNING_COMPRESS_TRIAL"  # tells our own command that a config may be there already
POLL_S = 0.2
TOLD_LINES = 5  # of a failed trial's output that its message repeats


class TrialFailed(CompressError):
    """A trial's process ended with an error, or without a result; raised to the search, which goes on."""


@dataclass(frozen=True)
class CommandTrial:
    """Runs `fit` with an overlay and reads what `TrialResult` wrote.

    Args:
        arguments: of `fit`, as the user gave them.
        script: a training script with a LightningCLI; None is `python -m lightning_compress`.
        folder: where trials write, a folder each.
        metric: that the module logs and the search keeps.
        group: W&B group of all trials, where they log there.
    """

    arguments: tuple[str, ...]
    script: str | None
    folder: Path
    metric: str
    group: str

    def command(self, overlays: Sequence[Path]) -> list[str]:
        """Return the command of a run with these overlays."""
        program = [sys.executable, self.script] if self.script else [sys.executable, "-m", "lightning_compress"]
        return [*program, "fit", *self.arguments, *(part for path in overlays for part in ("-c", str(path)))]

    def run(
        self, overlay: Mapping[str, Any], report: Callable[[int, float], None], name: str | None = None
    ) -> dict[str, float]:
        """Run a trial to its end, or until `report` raises; return its metrics and `size_bytes`.

        Raises:
            TrialFailed: it ended with an error; the last lines of its output are told.
        """
        digest = hashlib.sha256(json.dumps(overlay, sort_keys=True).encode()).hexdigest()[:12]
        own = self.folder / (name or f"trial-{digest}")
        shutil.rmtree(own, ignore_errors=True)  # what a killed trial has left
        own.mkdir(parents=True)
        watcher = {"class_path": WATCHER, "init_args": {"folder": str(own), "metric": self.metric}}
        paths = [own / "recipe.yaml", own / "watch.yaml"]
        # JSON is YAML. Lightning refuses to write the same config file twice, so each trial has a root of its own.
        paths[0].write_text(json.dumps(overlay), encoding="utf-8")
        watched = {"trainer": {"default_root_dir": str(own), "callbacks+": [watcher]}}
        paths[1].write_text(json.dumps(watched), encoding="utf-8")
        environment = {"WANDB_RUN_GROUP": self.group, "WANDB_NAME": own.name, **os.environ, TRIAL: own.name}
        # A process that has used wandb names its service here; a trial's files would go where that one was started.
        environment.pop("WANDB_SERVICE", None)
        with (own / "output.txt").open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                self.command(paths if overlay else paths[1:]), stdout=output, stderr=subprocess.STDOUT, env=environment
            )
            try:
                _follow(process, own / PROGRESS, report)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        return _result(own, process.returncode)


def _follow(process: subprocess.Popen[bytes], progress: Path, report: Callable[[int, float], None]) -> None:
    told = 0
    running = True
    while running:
        running = process.poll() is None
        text = progress.read_text(encoding="utf-8") if progress.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        for line in lines[told:]:
            said = json.loads(line)
            report(said["step"], said["value"])
        told = len(lines)
        if running:
            time.sleep(POLL_S)


def _result(own: Path, status: int) -> dict[str, float]:
    result = own / RESULT
    if status or not result.exists():
        lines = (own / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise TrialFailed(
            f"ended with status {status}{'' if result.exists() else ' and without a result'}; '{own / 'output.txt'}' "
            f"ends with: {' / '.join(lines[-TOLD_LINES:])}"
        )
    found: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))
    return found

"""Reads an offline W&B run back from disk; wandb 0.31 has no public reader.

A `.wandb` file is a log in LevelDB's framing (7-byte header of its own, then blocks of 32 KiB with chunks of
crc, length, type) whose entries are `wandb.proto` Records.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as protocol

_BLOCK = 32768
_HEADER = 7
_FULL, _LAST = 1, 4


@dataclass
class OfflineRun:
    """What one run left: `history` in order, the last `summary`, the artifacts' type and files by name."""

    files: Path
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, tuple[str, set[str]]] = field(default_factory=dict)
    metrics: list[tuple[str, str]] = field(default_factory=list)  # a name or glob, and the axis it is drawn over
    exit_code: int | None = None

    def column(self, key: str) -> list[Any]:
        """Every value logged under `key`, in order."""
        return [row[key] for row in self.history if key in row]

    def media(self, value: dict[str, Any]) -> Path:
        """The file a logged table or image was written to."""
        return self.files / value["path"]

    def tables(self, key: str) -> list[list[dict[str, Any]]]:
        """Every table logged under `key`, in order, each as its rows by column."""
        contents = [json.loads(self.media(value).read_text(encoding="utf-8")) for value in self.column(key)]
        return [[dict(zip(content["columns"], row, strict=True)) for row in content["data"]] for content in contents]


def read_run(folder: Path, timeout_s: float = 20.0) -> OfflineRun:
    """Read the one finished run below `folder`; waits for its exit record, written after `finish()`."""
    (log,) = folder.rglob("run-*.wandb")
    deadline = time.monotonic() + timeout_s
    while (run := _parse(log)).exit_code is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no exit record in {log} after {timeout_s} s")
        time.sleep(0.05)
    return run


def _parse(log: Path) -> OfflineRun:
    run = OfflineRun(log.parent / "files")
    for entry in _entries(log.read_bytes()):
        record = protocol.Record.FromString(entry)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            run.history.append(_update({}, record.history.item))
        elif kind == "summary":
            _update(run.summary, record.summary.update)
        elif kind == "config":
            _update(run.config, record.config.update)
        elif kind == "run":
            _update(run.config, record.run.config.update)
        elif kind == "metric":
            run.metrics.append((record.metric.name or record.metric.glob_name, record.metric.step_metric))
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
        else:
            _read_artifact(run, record)
    return run


def _read_artifact(run: OfflineRun, record: protocol.Record) -> None:
    artifact = record.artifact
    if record.WhichOneof("record_type") == "request":
        artifact = record.request.log_artifact.artifact
    if artifact.name:
        run.artifacts[artifact.name] = (artifact.type, {entry.path for entry in artifact.manifest.contents})


def _update(values: dict[str, Any], items: Any) -> dict[str, Any]:
    """Set every item in `values`; a nested key walks into the dictionaries below it."""
    for item in items:
        *outer, last = item.nested_key or [item.key]
        place = values
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return values


def _entries(data: bytes) -> Iterator[bytes]:
    """The entries that are whole; a file that is still being written ends in the middle of one."""
    place, entry = _HEADER, b""
    while place + _HEADER <= len(data):
        room = _BLOCK - place % _BLOCK
        if room < _HEADER:  # too little for another chunk: padding
            place += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        chunk = data[place + _HEADER : place + _HEADER + length]
        if kind == 0 or len(chunk) < length:
            return
        place += _HEADER + length
        entry += chunk
        if kind in (_FULL, _LAST):
            yield entry
            entry = b""

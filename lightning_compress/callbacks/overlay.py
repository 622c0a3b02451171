"""The callbacks of a run as an overlay for LightningCLI: the recipe that another run can be started with."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any

import yaml  # type: ignore[import-untyped]

__all__ = ["overlay"]

# Options that a callback keeps under another name, because a number there is short for a schedule or a grid.
_KEPT_AS = {"sparsity": "schedule", "amount": "schedule", "teacher": "source"}


class _NotPlain(Exception):
    """A value that a YAML file cannot hold, such as a module or a function without an import path."""


def overlay(callbacks: Iterable[object]) -> str:
    """Return the YAML of an overlay (`callbacks+:`) that makes these callbacks anew. Runs when the recipe is kept.

    Options that are no plain values, such as a teacher in memory, stand in a comment: give them yourself.

    >>> from lightning_compress import LotteryRewinding
    >>> print(overlay([LotteryRewinding(0.1)]))
    trainer:
      callbacks+:
      - class_path: lightning_compress.LotteryRewinding
        init_args:
          to: 0.1
          buffers: true
          enabled: true
    """
    entries, missing = [], []
    for callback in callbacks:
        kept, left_out = _options(callback)
        name = _import_path(type(callback))
        entries.append({"class_path": name, "init_args": kept})
        missing += [f"# {name} had {option}={kind}, which a file cannot hold\n" for option, kind in left_out]
    text: str = yaml.safe_dump({"trainer": {"callbacks+": entries}}, sort_keys=False)
    return "".join(missing) + text


def _options(callback: object) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """What a callback was made with, as plain values, and the options whose values are not."""
    kept: dict[str, Any] = {}
    left_out = []
    for name, parameter in inspect.signature(type(callback)).parameters.items():
        value = getattr(callback, name, None)
        if _KEPT_AS.get(name) in vars(callback):
            value = getattr(callback, _KEPT_AS[name])
        if value is None and parameter.default is None:
            continue
        try:
            kept[name] = _plain(value)
        except _NotPlain:
            left_out.append((name, f"a {type(value).__qualname__}"))
    return kept, left_out


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, Enum):
        return int(value) if isinstance(value, int) else float(value)  # NumPy's float64 is a float that YAML refuses
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, type):
        return value.__name__  # of a layer to include or exclude: selections know classes by name
    if is_dataclass(value):
        return {"class_path": _import_path(type(value)), "init_args": _fields(value)}
    if isinstance(value, functools.partial) or not hasattr(value, "__qualname__"):
        raise _NotPlain
    return _import_path(value)


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a schedule, pattern or grid that are not the defaults."""
    found = {}
    for field in fields(value):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.init and (default is MISSING or getattr(value, field.name) != default):
            found[field.name] = _plain(getattr(value, field.name))
    return found


def _import_path(value: Any) -> str:
    """Where a class or function can be imported from: the package's own name where it is public."""
    name = value.__qualname__
    for module in ("lightning_compress", value.__module__):
        if getattr(importlib.import_module(module), name, None) is value:
            return f"{module}.{name}"
    raise _NotPlain

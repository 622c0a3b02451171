"""Which batch norm an exporter folds into which convolution."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from lightning_compress.export.tracing import Inputs, evaluating
from lightning_compress.quantization.dataflow import watched
from lightning_compress.quantization.placement import NORMS
from lightning_compress.sharding import clean_name

__all__ = ["called", "norms_behind"]


def called(module: nn.Module, inputs: Inputs) -> Any:
    """Return `module(*inputs)` or, for a dict, `module(**inputs)`."""
    return module(**inputs) if isinstance(inputs, dict) else module(*inputs)


def norms_behind(module: nn.Module, layers: Collection[str], inputs: Inputs) -> dict[str, str]:
    """Return the batch norm that alone reads a convolution's output, by the convolution's name, both called once.

    Runs one forward in eval mode.
    """
    with evaluating(module), watched(module) as flow:
        called(module, inputs)
    kinds = {clean_name(name): part for name, part in module.named_modules()}
    readers, found = flow.readers(), {}
    for index, step in enumerate(flow.steps):
        name = step.modules[-1] if step.modules else ""
        if "convolution" not in step.operator or name not in layers or len(readers[index]) != 1:
            continue
        behind = flow.steps[readers[index][0]]
        norm = behind.modules[-1]
        once = flow.calls[name] == 1 and flow.calls[norm] == 1
        if behind.operator in NORMS and isinstance(kinds.get(norm), nn.BatchNorm1d | nn.BatchNorm2d) and once:
            found[name] = norm
    return found

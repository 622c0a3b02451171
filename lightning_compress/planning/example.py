"""One call of the module, by which its multiply-accumulates are counted and its channels traced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.measure.flops import count_macs, macs_per_weight
from lightning_compress.sharding import clean_name

__all__ = ["Example", "ExampleCall", "example_call"]


@dataclass(frozen=True)
class ExampleCall:
    """How to run the module once: the submodule that is called ("" is the module itself), and with what."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def macs(self, module: nn.Module) -> dict[str, float]:
        """Return the multiply-accumulates with weights that are not zero, by parameter name."""
        called = macs_per_weight(module.get_submodule(self.name), self.args, self.kwargs)
        positions = {f"{self.name}.{name}".removeprefix("."): count for name, count in called.items()}
        weights = {clean_name(name): parameter for name, parameter in module.named_parameters()}
        return {name: count * int(torch.count_nonzero(weights[name])) for name, count in positions.items()}

    def total(self, module: nn.Module) -> int:
        """Return all multiply-accumulates, those of zeros too."""
        return count_macs(module.get_submodule(self.name), self.args, self.kwargs)


Example = Tensor | tuple[Any, ...] | Mapping[str, Any] | ExampleCall | None


def example_call(module: nn.Module, example: Example) -> ExampleCall | None:
    """Return how to call the module; None if neither the example nor its `example_input_array` says so."""
    example = getattr(module, "example_input_array", None) if example is None else example
    if example is None or isinstance(example, ExampleCall):
        return example
    if isinstance(example, Mapping):
        return ExampleCall("", (), dict(example))
    return ExampleCall("", example if isinstance(example, tuple) else (example,), {})

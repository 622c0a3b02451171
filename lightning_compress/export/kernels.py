"""Which nodes of an ONNX file run on integers in ONNX Runtime, which stay float, and why."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_compress.export.runtime import onnx_session, require

if TYPE_CHECKING:
    import onnx

__all__ = ["Int8Report", "Kernel", "int8_report"]

INTEGER = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "QAttention", "DynamicQuantize")
WITH_WEIGHTS = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
OF_CODES = ("Add", "Concat")  # counted only where they read what was rounded


@dataclass(frozen=True)
class Kernel:
    """One node of the graph that ONNX Runtime runs; `reason` says why it computes in float, empty if it does not."""

    layer: str
    operator: str
    reason: str = ""

    @property
    def integer(self) -> bool:
        """Whether it computes on integers."""
        return not self.reason


@dataclass(frozen=True)
class Int8Report:
    """Every product, and every addition and concatenation of rounded values, of one file."""

    kernels: tuple[Kernel, ...]

    @property
    def floats(self) -> tuple[Kernel, ...]:
        """What stays float."""
        return tuple(kernel for kernel in self.kernels if not kernel.integer)

    def text(self) -> str:
        """Return the counts, then one line for each float node.

        >>> print(Int8Report((Kernel("a", "QGemm"), Kernel("b", "Gemm", "its weight is float32"))).text())
        1 of 2 nodes run on integers
        Gemm of b: its weight is float32
        """
        lines = [f"{len(self.kernels) - len(self.floats)} of {len(self.kernels)} nodes run on integers"]
        return "\n".join(lines + [f"{each.operator} of {each.layer}: {each.reason}" for each in self.floats])


def int8_report(path: str | Path) -> Int8Report:
    """Say of each product, and of each addition of rounded values, whether it runs on integers. Runs after export.

    It reads the graph that ONNX Runtime makes of the file on this machine's CPU, before weights are reordered.

    Raises:
        ImportError: onnx or onnxruntime is missing.
    """
    require("onnx", "onnxruntime")
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        onnx_session(path, optimized=optimized, layouts=False)
        graph = _Graph(onnx.load(str(optimized)).graph)
    return Int8Report(tuple(graph.kernels()))


@dataclass
class _Graph:
    graph: onnx.GraphProto
    producers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    readers: dict[str, list[str]] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.types.update({each.name: each.data_type for each in self.graph.initializer})
        for node in self.graph.node:
            self.producers.update(dict.fromkeys(node.output, node))
            for name in node.input:
                self.readers.setdefault(name, []).append(node.op_type)

    def kernels(self) -> Iterator[Kernel]:
        for node in self.graph.node:
            if node.op_type.startswith(INTEGER):
                yield Kernel(self.layer(node), node.op_type)
            elif node.op_type in WITH_WEIGHTS:
                yield Kernel(self.layer(node), node.op_type, self.why_float(node))
            elif node.op_type in OF_CODES and any(map(self.dequantized, node.input)):
                yield Kernel(node.name, node.op_type, self.why_float_join(node))

    def layer(self, node: onnx.NodeProto) -> str:
        """Return the module whose weight a node holds, else the node's own name."""
        sources = (name for each in node.input for name in (each, *self.stored(each)))
        return next((name.partition(".weight")[0] for name in sources if ".weight" in name), node.name)

    def stored(self, name: str) -> list[str]:
        """Return what is behind a DequantizeLinear."""
        return list(self.producers[name].input[:1]) if self.dequantized(name) else []

    def dequantized(self, name: str) -> bool:
        return name in self.producers and self.producers[name].op_type == "DequantizeLinear"

    def why_float(self, node: onnx.NodeProto) -> str:
        constants = [name for each in node.input[:2] for name in (each, *self.stored(each)) if name in self.types]
        if not constants:
            return "it multiplies two computed values, which are not quantized"
        if not self.dequantized(node.input[1]):
            return "its weight is float32, for it has no range"
        if len(node.input) > 2 and node.input[2] in self.types:
            return "its bias is float32, which the CPU has no integer kernel for"
        if "Conv" in node.op_type:
            return (
                f"its output is read as floats{self.read_by(node)}: it needs an output range (quantization.placement)"
            )
        return "ONNX Runtime found no integer kernel for it"

    def why_float_join(self, node: onnx.NodeProto) -> str:
        if not all(map(self.dequantized, node.input)):
            return "one of its inputs is not rounded"
        return f"its output is read as floats{self.read_by(node)}"

    def read_by(self, node: onnx.NodeProto) -> str:
        readers = [reader for name in node.output for reader in self.readers.get(name, [])]
        return f", by {readers[0]}" if readers else ", as an output of the graph"

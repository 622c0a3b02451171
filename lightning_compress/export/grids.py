"""QuantizeLinear and DequantizeLinear on trained grids: of layers' inputs, of outputs, and of what additions read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from lightning_compress.export.graph import Editor, array_of, only_reader, scopes_of
from lightning_compress.export.profiles import Profile
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.outputs import OutputRange

__all__ = ["MOVED_BEHIND_ROUNDING", "Grids"]

# Codes pass through these as well as floats do, so ONNX Runtime rounds before them.
MOVED_BEHIND_ROUNDING = ("MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
JOINS = ("Add", "Concat")

Grid = tuple[float, int, int]  # scale, zero point among unsigned codes, bits


@dataclass
class Grids:
    """The roundings of one graph; what several nodes read on one grid is rounded once."""

    editor: Editor
    profile: Profile
    made: dict[tuple[ir.Value, Grid], ir.Value] = field(default_factory=dict)
    known: dict[ir.Value, Grid] = field(default_factory=dict)

    def rounded(self, name: str, source: ir.Value, grid: Grid) -> ir.Value:
        """Return a value on a grid: itself where it lies on that grid already."""
        if self.known.get(source) == grid:
            return source
        if (source, grid) not in self.made:
            scale, zero_point, bits = grid
            dtype = np.int8 if self.profile.signed else np.uint8
            step = self.editor.constant(f"{name}:scale", np.float32(scale))
            zero = self.editor.constant(f"{name}:zero_point", dtype(zero_point - self.profile.offset))
            add = self.editor.behind(source)
            codes = add("QuantizeLinear", f"{name}:int", source, step, zero)
            if bits < 8:  # clipped as codes: a clip before the rounding would keep a float kernel before it
                top = self.editor.constant(f"top:{bits}", dtype(2**bits - 1 - self.profile.offset))
                codes = add("Clip", f"{name}:clipped", codes, None, top)
            value = add("DequantizeLinear", f"{name}:float", codes, step, zero)
            self.made[source, grid] = value
            self.known[value] = grid
        return self.made[source, grid]

    def round_input(self, name: str, node: ir.Node, trained: Range) -> None:
        """Put the first input of a layer's node on its trained grid."""
        source = node.inputs[0]
        if source is not None:
            node.replace_input_with(0, self.rounded(f"{name}.input", source, grid_of(trained)))

    def round_outputs(self, outputs: Mapping[str, OutputRange]) -> None:
        """Put the outputs of modules on their trained grids, for all that read them.

        Raises:
            ValueError: a module has no output in the graph.
        """
        # All are found before any is rounded: the nodes added lie in no module, and would look like readers outside.
        graph = self.editor.graph
        found = {name: [_behind_clip(v, trained) for v in _outputs(graph, name)] for name, trained in outputs.items()}
        for name, values in found.items():
            if not values:
                raise ValueError(
                    f"expected '{name}', whose output has a range, to compute a value that is read outside of it, but "
                    "the ONNX graph has none; leave it out of ranges"
                )
            for value in dict.fromkeys(values):
                self.round_everywhere(f"{name}.output", value, grid_of(outputs[name]))

    def round_everywhere(self, name: str, value: ir.Value, grid: Grid) -> None:
        """Let all readers of a value, and the graph's outputs, have it rounded."""
        uses, graph = list(value.uses()), self.editor.graph
        rounded = self.rounded(name, value, grid)
        for use in uses:
            use.node.replace_input_with(use.idx, rounded)
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = rounded
                rounded.name, value.name = value.name, f"{name}:unrounded"
                rounded.shape, rounded.type = value.shape, value.type

    def round_joins(self) -> None:
        """Put what additions and concatenations read on its grid again where it was moved since it was rounded.

        The runtime makes an integer kernel only where the rounding stands right before the node; rounding on the same
        grid twice changes nothing.
        """
        for node in list(self.editor.graph):
            inputs = [value for value in node.inputs if value is not None]
            if node.op_type not in JOINS or len(inputs) < 2:
                continue
            grids = [self.grid_behind(value) for value in inputs]
            for index, (value, grid) in enumerate(zip(inputs, grids, strict=True)):
                if grid is not None and None not in grids:
                    node.replace_input_with(index, self.rounded(f"{node.name}.input{index}", value, grid))

    def grid_behind(self, value: ir.Value) -> Grid | None:
        """Return the grid that a value lies on, rounded itself or before it was moved."""
        producer = value.producer()
        if value in self.known or producer is None:
            return self.known.get(value)
        source = producer.inputs[0] if producer.op_type in MOVED_BEHIND_ROUNDING else None
        return self.grid_behind(source) if source is not None else None


def grid_of(trained: Range | OutputRange) -> Grid:
    """Return scale, zero point and bits of a trained range."""
    return trained.scale, trained.zero_point, trained.bits


def _outputs(graph: ir.Graph, name: str) -> Iterator[ir.Value]:
    """Yield the float values made inside a module and read outside of it: one for each call."""
    for node in graph:
        if name not in scopes_of(node):
            continue
        for value in node.outputs:
            readers = [use.node for use in value.uses()]
            leaves = value.is_graph_output() or any(name not in scopes_of(reader) for reader in readers)
            if leaves and value.dtype == ir.DataType.FLOAT:
                yield value


def _behind_clip(value: ir.Value, trained: OutputRange) -> ir.Value:
    """Return the ReLU or clip that alone reads a value, if the grid ends where it does.

    Rounding on such a grid clips in the same place, before or behind; only behind does the kernel take the ReLU in.
    """
    reader = only_reader(value)
    if reader is None or reader.op_type not in ("Relu", "Clip"):
        return value
    low, high = 0.0, float("inf")
    if reader.op_type == "Clip":
        bounds = [array_of(each) if each is not None and each.const_value is not None else None
                  for each in (*reader.inputs[1:], None, None)][:2]  # fmt: skip
        if any(bound is None for bound in bounds):
            return value
        low, high = (float(bound) for bound in bounds if bound is not None)
    return reader.outputs[0] if low <= trained.low and trained.high <= high else value

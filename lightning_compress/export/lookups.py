"""Embeddings in an int8 file: codes are looked up, and become floats row by row, as they were trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from lightning_compress.export.graph import Editor, array_of, input_of, scopes_of
from lightning_compress.export.integer import layer_codes
from lightning_compress.quantization.grid import Range

__all__ = ["round_lookups"]


def round_lookups(editor: Editor, module: nn.Module, ranges: Mapping[str, Range]) -> None:
    """Let each look-up in an embedding with a range read int8 codes, and the rows' scales. Runs at an export.

    The float weight then has no reader. Rows are multiplied as training does: codes times scale, in float32.

    Args:
        editor: of the exported graph, changed in place.
        module: the exported one.
        ranges: of embeddings, by name.

    Raises:
        ValueError: nothing is looked up in one of them.
    """
    layers = {name: module.get_submodule(name) for name in ranges}
    found = list(_look_ups(editor.graph, layers))
    unused = sorted(ranges.keys() - {name for name, _ in found})
    if unused:
        raise ValueError(
            f"expected the embeddings in ranges to run in forward, but nothing in the ONNX graph looks up {unused}; "
            f"leave these names out of ranges, or, where what is looked up depends on the inputs' length alone, such "
            f"as positions, export with dynamic_sequence=True"
        )
    for name, node in found:
        codes, scale = layer_codes(layers[name].get_parameter("weight"), ranges[name])
        rows = editor.constant(f"{name}.weight:int", codes.cpu().numpy())
        steps = editor.constant(f"{name}.weight:scale", _column(scale))
        add, ids = editor.before(node), input_of(node, 1)
        found_codes = add("Gather", f"{name}:codes", rows, ids)
        values = add("Cast", f"{name}:values", found_codes, to=int(ir.DataType.FLOAT))
        editor.replace(node, add("Mul", f"{name}:rows", values, add("Gather", f"{name}:steps", steps, ids)))


def _column(scale: torch.Tensor) -> np.ndarray:
    return scale.detach().cpu().float().numpy().reshape(-1, 1)


def _look_ups(graph: ir.Graph, layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, ir.Node]]:
    """Yield each node that looks something up in the weight of a layer, with the layer's name."""
    for node in graph:
        weight = node.inputs[0] if node.op_type == "Gather" else None
        if weight is None or weight.const_value is None or node.attributes.get_int("axis", 0) != 0:
            continue
        scope = scopes_of(node)[-1:]
        # A table's own name may be that of another with the same values, which the exporter has kept of the two.
        called = [name for name in layers if scope == [name]]
        for name in called or [name for name in layers if weight.name == f"{name}.weight"]:
            own = layers[name].get_parameter("weight").detach().cpu().numpy()
            if array_of(weight).shape == own.shape and np.array_equal(array_of(weight), own):
                yield name, node
                break

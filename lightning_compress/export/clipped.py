"""A ReLU between an integer kernel and codes of negative values too, as a learned grid may have: clipped as codes."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from lightning_compress.export.graph import Editor, array_of, input_of, only_reader
from lightning_compress.export.grids import MOVED_BEHIND_ROUNDING

__all__ = ["clip_codes"]


def clip_codes(editor: Editor, kernels: Collection[ir.Node], offset: int) -> None:
    """Round before such a ReLU and clip the codes at that of zero instead, in place. Runs once, after all rounding.

    ONNX Runtime (1.31) makes an integer kernel of a Conv or Add only if codes follow it at once, or with a ReLU between
    which the codes' own lower end makes needless. Rounding keeps the order of values, and 0 has a code, so that either
    way gives the same codes.

    Args:
        editor: of the graph.
        kernels: the Conv and Gemm nodes that compute on integers.
        offset: what is subtracted from a code of the grid when it is stored.
    """
    for relu in [node for node in editor.graph if node.op_type == "Relu"]:
        source, rounding = input_of(relu, 0), only_reader(relu.outputs[0])
        while rounding is not None and rounding.op_type in MOVED_BEHIND_ROUNDING:  # these keep the order too
            rounding = only_reader(rounding.outputs[0])
        node = source.producer()
        if node is None or only_reader(source) is not relu or not _integer(node, kernels):
            continue
        if rounding is None or rounding.op_type != "QuantizeLinear":
            continue
        zero = input_of(rounding, 2)
        if int(array_of(zero)) == -offset:  # codes begin at zero: the runtime takes the ReLU away itself
            continue
        codes, name = rounding.outputs[0], str(rounding.name)
        for use in list(relu.outputs[0].uses()):
            use.node.replace_input_with(use.idx, source)
        readers = list(codes.uses())
        clipped = editor.behind(codes)("Clip", f"{name}:relu", codes, zero)
        for use in readers:
            use.node.replace_input_with(use.idx, clipped)
        editor.graph.remove(relu, safe=True)


def _integer(node: ir.Node, kernels: Collection[ir.Node]) -> bool:
    """Whether a node is a Conv that computes on integers, or an Add of values that all come from codes."""
    if node.op_type == "Conv":
        return any(node is kernel for kernel in kernels)
    sources = [value.producer() if value is not None else None for value in node.inputs]
    return node.op_type == "Add" and all(each is not None and each.op_type == "DequantizeLinear" for each in sources)

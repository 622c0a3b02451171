"""Bring a graph of `quantized_decomposed` operators into the patterns that XNNPACK has integer kernels for.

XNNPACK makes an integer kernel of dequantize -> product (-> ReLU or clip) -> quantize, with int8 codes. What training
left between a product and its rounding is moved behind the rounding; a product whose output stays float gets another
kernel, which has none.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.ao.quantization.fx import _decomposed  # noqa: F401 - registers torch.ops.quantized_decomposed

__all__ = ["as_xnnpack_fuses"]

OPS, ATEN = torch.ops.quantized_decomposed, torch.ops.aten
QUANTIZE, DEQUANTIZE = OPS.quantize_per_tensor.default, OPS.dequantize_per_tensor.default
DEQUANTIZE_WEIGHT = OPS.dequantize_per_channel.default
LINEAR = ATEN.linear.default
PRODUCTS = (LINEAR, ATEN.convolution.default)
FUSED = (ATEN.relu.default, ATEN.relu_.default, ATEN.hardtanh.default, ATEN.hardtanh_.default)
# Rounding commutes with these: they move values, or take the largest of them.
MOVES = (
    ATEN.max_pool2d.default, ATEN.view.default, ATEN.reshape.default, ATEN.flatten.using_ints, ATEN.permute.default,
    ATEN.transpose.int, ATEN.unsqueeze.default, ATEN.squeeze.dim,
)  # fmt: skip
CODES = (-128, 127)


def as_xnnpack_fuses(module: fx.GraphModule) -> None:
    """Rewrite, in place, an exported reference module with signed codes of 8 bits. Runs once, before it is lowered.

    A Linear whose output is not rounded multiplies the trained codes of its weight with inputs that are rounded to 8
    bits by the range that each row has when it runs, which is finer than the trained grid and not it. A Conv whose
    output is not rounded multiplies floats: its weight is stored as such.

    Args:
        module: of `torch.export.ExportedProgram.module()`.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is QUANTIZE:
            _round_before_moves(graph, node)
    for node in list(graph.nodes):
        if node.target is QUANTIZE:
            _drop_second_rounding(node)
    for node in list(graph.nodes):
        if node.target in PRODUCTS and not _rounded_behind(node) and _is_dequantized_weight(node.args[1]):
            if node.target is LINEAR:
                _round_by_row(graph, node)
            else:
                _store_floats(module, node)
    graph.eliminate_dead_code()
    module.recompile()


def _round_before_moves(graph: fx.Graph, rounding: fx.Node) -> None:
    """Round what moves values too, all the way up; where something else reads the floats, not."""
    grid = rounding.args[1:]
    for moving in _moves_before(rounding):
        source: Any = moving.args[0]
        with graph.inserting_before(moving):
            codes = graph.call_function(QUANTIZE, (source, *grid))
            moving.replace_input_with(source, graph.call_function(DEQUANTIZE, (codes, *grid)))


def _moves_before(rounding: fx.Node) -> Iterator[fx.Node]:
    node: Any = rounding.args[0]
    while isinstance(node, fx.Node) and node.target in MOVES and len(node.users) == 1:
        yield node
        # The rounding that was added before this one stands between it and the next.
        source: Any = node.args[0]
        node = source.args[0].args[0] if source.target is DEQUANTIZE else source


def _drop_second_rounding(rounding: fx.Node) -> None:
    """Take the codes themselves where a value that lies on a grid is rounded on it again."""
    source: Any = rounding.args[0]
    if source.target is DEQUANTIZE and source.args[1:] == rounding.args[1:]:
        rounding.replace_all_uses_with(source.args[0])


def _rounded_behind(node: fx.Node) -> bool:
    users = list(node.users)
    if len(users) == 1 and users[0].target in FUSED:
        users = list(users[0].users)
    return len(users) == 1 and users[0].target is QUANTIZE


def _is_dequantized_weight(weight: Any) -> bool:
    return isinstance(weight, fx.Node) and weight.target is DEQUANTIZE_WEIGHT


def _round_by_row(graph: fx.Graph, node: fx.Node) -> None:
    # Not on the trained grid first: two grids that do not meet round worse (a MiniLM: 22.4 dB instead of 23.5).
    rounded: Any = node.args[0]
    source = rounded.args[0].args[0]
    with graph.inserting_before(node):
        grid = graph.call_function(OPS.choose_qparams_per_token_asymmetric.default, (source, torch.int8))
        scale, zero = (graph.call_function(operator.getitem, (grid, index)) for index in (0, 1))
        codes = graph.call_function(OPS.quantize_per_token.default, (source, scale, zero, *CODES, torch.int8))
        options = (scale, zero, *CODES, torch.int8, torch.float32)
        value = graph.call_function(OPS.dequantize_per_token.default, (codes, *options))
    node.replace_input_with(rounded, value)


def _store_floats(module: fx.GraphModule, node: fx.Node) -> None:
    weight: Any = node.args[1]
    stored = [_attribute(module, arg.target) if isinstance(arg, fx.Node) else arg for arg in weight.args]
    name = f"{weight.name}_floats"
    module.register_buffer(name, DEQUANTIZE_WEIGHT(*stored))
    with module.graph.inserting_before(node):
        node.replace_input_with(weight, module.graph.get_attr(name))


def _attribute(module: fx.GraphModule, name: Any) -> Any:
    return operator.attrgetter(str(name))(module)

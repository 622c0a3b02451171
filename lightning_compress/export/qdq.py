"""Turn a float ONNX graph into an int8 one: QuantizeLinear and DequantizeLinear around each layer, on trained grids.

What ONNX Runtime fuses into integer kernels on x86: uint8 inputs per tensor, int8 weights per output channel as
initializers, int32 biases of scale s_x * s_w, and Gemm rather than MatMul + Add.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.convenience import replace_all_uses_with
from torch import Tensor, nn

from lightning_compress.export.integer import bias_scale, integer_layer
from lightning_compress.quantization.attach import QUANTIZABLE
from lightning_compress.quantization.grid import Range

__all__ = ["insert_qdq"]

SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter's note on a node: the modules it lies in, then its own name

# Codes pass through these as well as floats do, so ONNX Runtime rounds before them.
MOVED_BEHIND_ROUNDING = ("MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def insert_qdq(model: ir.Model, module: nn.Module, ranges: Mapping[str, Range]) -> None:
    """Quantize, in place, the layers of an exported graph that have a range. Runs once, after the float export.

    Args:
        model: from `torch.onnx.export(module, dynamo=True)`, its metadata not yet stripped.
        module: the exported module; read only.
        ranges: name of a layer of `module` -> its trained range.

    Raises:
        ValueError: a layer has no Conv, Gemm or MatMul in the graph.
    """
    found = list(_find(model.graph, module, ranges))
    unused = sorted(set(ranges) - {name for name, _ in found})
    if unused:
        raise ValueError(
            f"expected every layer in ranges to run in forward with its weight, but the ONNX graph has no Conv, Gemm "
            f"or MatMul of {unused}; leave these names out of ranges, or call the layer as a module in forward"
        )
    inserter = _Inserter(model.graph)
    kernels = [inserter.quantize(name, node, ranges[name]) for name, node in found]
    for node in kernels:
        if node.op_type != "Conv":
            inserter.free_of_relu(node)
    for value in list(model.graph.initializers.values()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[str(value.name)]


def _find(graph: ir.Graph, module: nn.Module, ranges: Mapping[str, Range]) -> Iterator[tuple[str, ir.Node]]:
    """Yield each node that computes with the weight of a layer in `ranges`, with the layer's name."""
    layers = dict(module.named_modules(remove_duplicate=False))
    names = {id(layers[name]): name for name in ranges}
    for node in graph:
        weight = node.inputs[1] if node.op_type in ("Conv", "Gemm", "MatMul") else None
        if weight is None or weight.const_value is None or not _plain(node):
            continue
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        owner = layers.get(scopes[-2]) if len(scopes) > 1 else None
        if not isinstance(owner, QUANTIZABLE):
            # A convolution that took in a batch norm lies in the norm's scope, but its weight keeps its name.
            owner = layers.get(str(weight.name).removesuffix(".weight"))
        name = names.get(id(owner))
        if name is not None and _same_shape(weight, layers[name]):
            yield name, node


def _plain(node: ir.Node) -> bool:
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    return all(node.attributes[key].value == value for key, value in plain.items() if key in node.attributes)


def _same_shape(weight: ir.Value, layer: nn.Module) -> bool:
    shape, stored = layer.get_parameter("weight").shape, _array(weight).shape
    return stored == tuple(shape) or (len(shape) == 2 and stored == tuple(shape[::-1]))


@dataclass
class _Inserter:
    """Adds nodes and constants to one graph; what several layers read is added once."""

    graph: ir.Graph
    inputs: dict[tuple[ir.Value, float, int, int], ir.Value] = field(default_factory=dict)
    rows: dict[ir.Value, ir.Value] = field(default_factory=dict)
    names: set[str | None] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.names.update(value.name for node in self.graph for value in node.outputs)
        self.names.update(value.name for value in self.graph.inputs)

    def quantize(self, name: str, node: ir.Node, trained: Range) -> ir.Node:
        """Put one node's input, weight and bias on their grids; return the node that now computes the layer."""
        node = self.as_gemm(name, node) if node.op_type == "MatMul" else node
        weight, bias = _input(node, 1), node.inputs[2] if len(node.inputs) > 2 else None
        transposed = "transB" in node.attributes and node.attributes["transB"].value
        out = 0 if node.op_type == "Conv" or transposed else 1
        rows = np.moveaxis(_array(weight), out, 0)
        codes, scale, bias_codes = integer_layer(
            torch.from_numpy(rows.copy()), _vector(bias, len(rows)), trained.scale, trained.weight_bits
        )
        codes_as_stored = np.ascontiguousarray(np.moveaxis(codes.numpy(), 0, out))
        node.replace_input_with(0, self.rounded(name, node, trained))
        node.replace_input_with(1, self.dequantized(f"{name}.weight", node, codes_as_stored, scale, out))
        if bias_codes is not None:
            scale = bias_scale(trained.scale, scale)
            node.replace_input_with(2, self.dequantized(f"{name}.bias", node, bias_codes.numpy(), scale, 0))
        return node

    def rounded(self, name: str, node: ir.Node, trained: Range) -> ir.Value:
        """Return the node's first input on its grid."""
        source, bits = _input(node, 0), trained.bits
        key = (source, trained.scale, trained.zero_point, bits)
        if key not in self.inputs:
            scale = self.constant(f"{name}.input:scale", np.float32(trained.scale))
            zero = self.constant(f"{name}.input:zero_point", np.uint8(trained.zero_point))
            codes = self.add(node, "QuantizeLinear", f"{name}.input:int", source, scale, zero)
            if bits < 8:  # clipped as codes: a clip before the rounding would keep a float kernel before it
                top = self.constant(f"top:{bits}", np.uint8(2**bits - 1))
                codes = self.add(node, "Clip", f"{name}.input:clipped", codes, None, top)
            self.inputs[key] = self.add(node, "DequantizeLinear", f"{name}.input:float", codes, scale, zero)
        return self.inputs[key]

    def dequantized(self, name: str, node: ir.Node, codes: np.ndarray, scale: Tensor, axis: int) -> ir.Value:
        """Return stored codes as floats. Zero points that could be left out stay: without them no QGemm is made."""
        stored, step = self.constant(f"{name}:int", codes), self.constant(f"{name}:scale", scale.numpy())
        zero = self.constant(f"zeros:{codes.dtype}x{len(scale)}", np.zeros(len(scale), codes.dtype))
        return self.add(node, "DequantizeLinear", f"{name}:float", stored, step, zero, axis=axis)

    def as_gemm(self, name: str, matmul: ir.Node) -> ir.Node:
        """Return x @ W (+ b) with more than two dimensions as a Gemm between two reshapes.

        ONNX Runtime does so by itself only where no size is open (a dynamic batch), and runs a slower kernel
        otherwise. A node with two open sizes stays as it is.
        """
        source, weight = _input(matmul, 0), _input(matmul, 1)
        sizes = [size if isinstance(size, int) else -1 for size in source.shape or ()][:-1]
        if len(sizes) < 2 or sizes.count(-1) > 1:
            return matmul
        width, units = _array(weight).shape
        last, bias = _bias_add(matmul, units)
        if source not in self.rows:
            self.rows[source] = self.reshaped(matmul, f"{name}.input:rows", source, -1, width)
        product = self.add(last, "Gemm", f"{name}:product", self.rows[source], weight, *bias)
        output = self.reshaped(last, f"{name}:output", product, *sizes, units)
        self.replace(last, output)
        if last is not matmul:
            self.graph.remove(matmul, safe=True)
        return product.producer() or matmul

    def free_of_relu(self, node: ir.Node) -> None:
        """Write a ReLU after the node as Max(x, 0) where its result stays float.

        ONNX Runtime (1.31) makes no integer kernel of a node whose Relu does not end in one code.
        """
        relu = _only_reader(node)
        if relu is None or relu.op_type != "Relu":
            return
        reader = _only_reader(relu)
        while reader is not None and reader.op_type in MOVED_BEHIND_ROUNDING:
            reader = _only_reader(reader)
        if reader is None or reader.op_type != "QuantizeLinear":
            zero = self.constant("relu:zero", np.float32(0))
            self.replace(relu, self.add(relu, "Max", f"{relu.name}:max", _input(relu, 0), zero))

    def replace(self, node: ir.Node, value: ir.Value) -> None:
        """Let `value` take the place, and the name, of the node's output."""
        old = node.outputs[0]
        value.name, value.shape, value.type = old.name, old.shape, old.type
        replace_all_uses_with(old, value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def reshaped(self, before: ir.Node, name: str, source: ir.Value, *sizes: int) -> ir.Value:
        """Return a reshaped value."""
        shape = self.constant(f"shape:{'x'.join(map(str, sizes))}", np.array(sizes, np.int64))
        return self.add(before, "Reshape", name, source, shape)

    def constant(self, name: str, array: np.ndarray | np.generic) -> ir.Value:
        """Return an initializer; the same one for the same name and content."""
        while (known := self.graph.initializers.get(name)) is not None:
            stored = _array(known)
            if stored.dtype == array.dtype and np.array_equal(stored, array):
                return known
            name += "'"
        value = ir.Value(name=name, const_value=ir.tensor(np.asarray(array), name=name))
        self.graph.register_initializer(value)
        return value

    def add(self, before: ir.Node, op: str, name: str, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
        """Insert a node and return its output."""
        while name in self.names:
            name += "'"
        self.names.add(name)
        node = ir.node(op, inputs, attributes, name=name)
        node.outputs[0].name = name
        self.graph.insert_before(before, node)
        return node.outputs[0]


def _bias_add(matmul: ir.Node, units: int) -> tuple[ir.Node, list[ir.Value]]:
    """Return the Add that alone reads the product, and its bias; without one, the node itself."""
    product, uses = matmul.outputs[0], list(matmul.outputs[0].uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add" and not product.is_graph_output():
        addend = uses[0].node.inputs[1 - uses[0].idx]
        if addend is not None and _vector(addend, units) is not None:
            return uses[0].node, [addend]
    return matmul, []


def _only_reader(node: ir.Node) -> ir.Node | None:
    value = node.outputs[0]
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise ValueError(f"expected {node.op_type} '{node.name}' to have an input {index}, got none")
    return value


def _array(value: ir.Value) -> np.ndarray:
    if value.const_value is None:
        raise ValueError(f"expected '{value.name}' to be a constant of the graph")
    return value.const_value.numpy()


def _vector(value: ir.Value | None, size: int) -> Tensor | None:
    """Return a constant of shape (size,), None if the value is anything else."""
    if value is None or value.const_value is None or _array(value).shape != (size,):
        return None
    return torch.from_numpy(_array(value).copy())

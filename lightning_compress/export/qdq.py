"""Turn a float ONNX graph into an int8 one: QuantizeLinear and DequantizeLinear around each layer, on trained grids.

What ONNX Runtime fuses into integer kernels on x86: uint8 inputs per tensor, int8 weights per output channel as
initializers, int32 biases of scale s_x * s_w, Gemm rather than MatMul + Add, and codes on every input and on the output
of convolutions and additions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from lightning_compress.export.clipped import clip_codes
from lightning_compress.export.faster import join_reshapes, pad_channels
from lightning_compress.export.graph import Editor, array_of, input_of, only_reader, scopes_of, vector_of
from lightning_compress.export.grids import MOVED_BEHIND_ROUNDING, Grids
from lightning_compress.export.integer import bias_scale, folded_codes, integer_layer
from lightning_compress.export.lookups import round_lookups
from lightning_compress.export.profiles import Profile
from lightning_compress.quantization.attach import QUANTIZABLE
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.outputs import Ranges, outputs_of
from lightning_compress.quantization.projections import WEIGHTS, projections_in

__all__ = ["insert_qdq"]


def insert_qdq(model: ir.Model, module: nn.Module, ranges: Ranges, profile: Profile) -> None:
    """Quantize, in place, what has a range in an exported graph. Runs once, after the float export.

    Args:
        model: from `torch.onnx.export(module, dynamo=True)`, its metadata not yet stripped.
        module: the exported module; read only.
        ranges: name of a layer of `module` -> its trained range; outputs under `output_key`.
        profile: how codes are stored.

    Raises:
        ValueError: a layer has no Conv, Gemm or MatMul in the graph, or an output is not in it.
    """
    trained, outputs = outputs_of(ranges)
    modules = dict(module.named_modules(remove_duplicate=False))
    tables = {name: each for name, each in trained.items() if isinstance(modules.get(name), nn.Embedding)}
    layers = {name: each for name, each in trained.items() if name not in tables}
    found = list(_find(model.graph, module, layers))
    unused = sorted(set(layers) - {name for name, _ in found})
    if unused:
        raise ValueError(
            f"expected every layer in ranges to run in forward with its weight, but the ONNX graph has no Conv, Gemm "
            f"or MatMul of {unused}; leave these names out of ranges, or call the layer as a module in forward"
        )
    editor = Editor(model.graph)
    round_lookups(editor, module, tables)
    grids = Grids(editor, profile)
    grids.round_outputs(outputs)
    grids.round_joins()
    trained_layers = {**modules, **projections_in(module)}
    weights = {name: trained_layers[name].get_parameter("weight") for name in layers}
    inserter = _Inserter(editor, grids, profile, weights)
    kernels = [inserter.quantize(name, node, layers[name]) for name, node in found]
    for node in kernels:
        if node.op_type != "Conv":
            inserter.free_of_relu(node)
    if profile.rewritten:
        clip_codes(editor, kernels, profile.offset)
        join_reshapes(model.graph)
    editor.drop_unused_constants()


def _find(graph: ir.Graph, module: nn.Module, ranges: Mapping[str, Range]) -> Iterator[tuple[str, ir.Node]]:
    """Yield each node that computes with the weight of a layer in `ranges`, with the layer's name."""
    layers = {**dict(module.named_modules(remove_duplicate=False)), **projections_in(module)}
    names = {id(layers[name]): name for name in ranges}
    for node in graph:
        weight = node.inputs[1] if node.op_type in ("Conv", "Gemm", "MatMul") else None
        if weight is None or weight.const_value is None or not _plain(node):
            continue
        scopes = scopes_of(node)
        owner = layers.get(scopes[-1]) if scopes else None
        if not isinstance(owner, QUANTIZABLE):
            # A convolution that took in a batch norm lies in the norm's scope, but its weight keeps its name.
            named = layers.get(str(weight.name).removesuffix(".weight"))
            owner = _projection(scopes[-1], layers, weight) if isinstance(owner, nn.MultiheadAttention) else named
        name = names.get(id(owner))
        if name is not None and _same_shape(weight, layers[name]):
            yield name, node


def _projection(attention: str, layers: Mapping[str, nn.Module], weight: ir.Value) -> nn.Module | None:
    """Return the projection of an attention that has this weight, which the exporter has transposed and renamed."""
    for own in WEIGHTS:
        layer = layers.get(f"{attention}.{own}")
        if layer is not None:
            known = layer.get_parameter("weight").detach().cpu().numpy()
            if any(np.array_equal(array_of(weight), each) for each in (known, known.T)):
                return layer
    return None


def _plain(node: ir.Node) -> bool:
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    return all(node.attributes[key].value == value for key, value in plain.items() if key in node.attributes)


def _same_shape(weight: ir.Value, layer: nn.Module) -> bool:
    shape, stored = layer.get_parameter("weight").shape, array_of(weight).shape
    return stored == tuple(shape) or (len(shape) == 2 and stored == tuple(shape[::-1]))


@dataclass
class _Inserter:
    """Quantizes layers of one graph; what several layers read is added once."""

    editor: Editor
    grids: Grids
    profile: Profile
    weights: Mapping[str, Tensor]
    rows: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def quantize(self, name: str, node: ir.Node, trained: Range) -> ir.Node:
        """Put one node's input, weight and bias on their grids; return the node that now computes the layer."""
        node = self.as_gemm(name, node) if node.op_type == "MatMul" else node
        if node.op_type == "Conv" and self.profile.rewritten and input_of(node, 0) not in self.grids.known:
            pad_channels(self.editor, node)
        weight, bias = input_of(node, 1), node.inputs[2] if len(node.inputs) > 2 else None
        bias = bias if self.profile.integer_bias else None
        transposed = "transB" in node.attributes and node.attributes["transB"].value
        out = 0 if node.op_type == "Conv" or transposed else 1
        rows = np.moveaxis(array_of(weight), out, 0)
        codes, scale = folded_codes(name, torch.from_numpy(rows.copy()), self.weights[name], trained)
        codes, scale, bias_codes = integer_layer(codes, scale, vector_of(bias, len(rows)), trained.scale)
        codes_as_stored = np.ascontiguousarray(np.moveaxis(codes.numpy(), 0, out))
        self.grids.round_input(name, node, trained)
        node.replace_input_with(1, self.dequantized(f"{name}.weight", node, codes_as_stored, scale, out))
        if bias_codes is not None:
            scale = bias_scale(trained.scale, scale)
            node.replace_input_with(2, self.dequantized(f"{name}.bias", node, bias_codes.numpy(), scale, 0))
        return node

    def dequantized(self, name: str, node: ir.Node, codes: np.ndarray, scale: Tensor, axis: int) -> ir.Value:
        """Return stored codes as floats. Zero points that could be left out stay: without them no QGemm is made.

        No two nodes read one value: where ONNX Runtime (1.31) makes codes unsigned, it takes each to be of one node. So
        what another node has read already goes through a reshape, which is no second copy in the file.
        """
        constant, add = self.editor.constant, self.editor.before(node)
        stored, step = constant(f"{name}:int", codes), constant(f"{name}:scale", scale.numpy())
        zero = constant(f"{name}:zero_point", np.zeros(len(scale), codes.dtype))
        if stored.uses() and self.profile.rewritten:
            stored = add("Reshape", f"{name}:int:again", stored, self.shape(*codes.shape))
            zero = add("Reshape", f"{name}:zero_point:again", zero, self.shape(len(scale)))
        return add("DequantizeLinear", f"{name}:float", stored, step, zero, axis=axis)

    def as_gemm(self, name: str, matmul: ir.Node) -> ir.Node:
        """Return x @ W (+ b) with more than two dimensions as a Gemm between two reshapes.

        ONNX Runtime does so by itself only where no size is open (a dynamic batch), and runs a slower kernel
        otherwise.
        """
        source, weight = input_of(matmul, 0), input_of(matmul, 1)
        sizes = [size if isinstance(size, int) else -1 for size in source.shape or ()][:-1]
        if len(sizes) < 2:
            return matmul
        width, units = array_of(weight).shape
        last, bias = _bias_add(matmul, units)
        if source not in self.rows:
            # Where the source is made, not here: a layer before this one in the list may lie behind it in the graph.
            self.rows[source] = self.editor.behind(source)(
                "Reshape", f"{name}.input:rows", source, self.shape(-1, width)
            )
        add = self.editor.before(last)
        product = add("Gemm", f"{name}:product", self.rows[source], weight, *bias)
        shape = self.shape(*sizes, units) if sizes.count(-1) < 2 else self.shape_like(name, matmul, source, units)
        self.editor.replace(last, add("Reshape", f"{name}:output", product, shape))
        if last is not matmul:
            self.editor.graph.remove(matmul, safe=True)
        return product.producer() or matmul

    def shape_like(self, name: str, before: ir.Node, source: ir.Value, units: int) -> ir.Value:
        """Return the sizes of a value with two open ones, such as batch and sequence, but for the last."""
        add = self.editor.before(before)
        outer = add("Shape", f"{name}.input:sizes", source, start=0, end=-1)
        return add("Concat", f"{name}:shape", outer, self.shape(units), axis=0)

    def shape(self, *sizes: int) -> ir.Value:
        """Return constant sizes."""
        return self.editor.constant(f"shape:{'x'.join(map(str, sizes))}", np.array(sizes, np.int64))

    def codes_begin_at_zero(self, rounding: ir.Node) -> bool:
        """Whether a QuantizeLinear has no code of a negative value."""
        return int(array_of(input_of(rounding, 2))) == -self.profile.offset

    def free_of_relu(self, node: ir.Node) -> None:
        """Write a ReLU after the node as Max(x, 0) where its result stays float, or has codes of negative values.

        ONNX Runtime (1.31) makes no integer kernel of a node whose Relu does not end in one code that clips as it does.
        """
        relu = only_reader(node.outputs[0])
        if relu is None or relu.op_type != "Relu":
            return
        reader = only_reader(relu.outputs[0])
        while reader is not None and reader.op_type in MOVED_BEHIND_ROUNDING:
            reader = only_reader(reader.outputs[0])
        clips = reader is not None and reader.op_type == "QuantizeLinear" and self.codes_begin_at_zero(reader)
        if not clips:
            zero = self.editor.constant("relu:zero", np.float32(0))
            maximum = self.editor.before(relu)("Max", f"{relu.name}:max", input_of(relu, 0), zero)
            self.editor.replace(relu, maximum)


def _bias_add(matmul: ir.Node, units: int) -> tuple[ir.Node, list[ir.Value]]:
    """Return the Add that alone reads the product, and its bias; without one, the node itself."""
    product, uses = matmul.outputs[0], list(matmul.outputs[0].uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add" and not product.is_graph_output():
        addend = uses[0].node.inputs[1 - uses[0].idx]
        if addend is not None and vector_of(addend, units) is not None:
            return uses[0].node, [addend]
    return matmul, []

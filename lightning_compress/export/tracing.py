"""From a module to the exporter's ONNX graph, silently, with the module left as it was."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.errors import CompressError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Inputs", "evaluating", "has_batch", "inputs_beside", "strip", "traced"]

OPSET = 20  # fixed, so that a newer exporter writes the same file
CHATTY = (
    "torch.onnx._internal.exporter._registration",  # "torchvision is not installed", once for each operator
    "onnxscript.optimizer._constant_folding",  # "Evaluation failed", where a node just stays as it is
)
Inputs = tuple[Any, ...] | dict[str, Any]


def inputs_beside(module: nn.Module, inputs: Inputs) -> Inputs:
    """Return the inputs on the device of the module's first parameter, without their gradients."""
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    moved: Inputs = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().to(device), inputs)
    return moved


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set eval mode and no gradients inside the block, and let compiled parts run plain; undo it after.

    `train()` is not called: a module may have overridden it to do more.
    """
    modes = {layer: layer.training for layer in module.modules()}
    try:
        for layer in modes:
            layer.training = False
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for layer, mode in modes.items():
            layer.training = mode


def traced(
    module: nn.Module,
    inputs: Inputs,
    dynamic_batch: bool,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> ir.Model:
    """Return the float32 graph of a module in eval mode, batch norms folded, each node noted with its module.

    Raises:
        ValueError: `dynamic_batch` is asked for inputs of several first sizes.
        CompressError: the exporter cannot trace or translate `forward`.
    """
    shapes = None
    if dynamic_batch:
        inputs = _with_open_batch(inputs)
        batch = torch.export.Dim("batch")
        shapes = pytree.tree_map(lambda leaf: {0: batch} if has_batch(leaf) else None, inputs)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, None)
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                module, args, kwargs=kwargs, dynamo=True, verbose=False, opset_version=OPSET,
                dynamic_shapes=shapes, input_names=input_names, output_names=output_names,
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        cure = "; if forward fixes the batch size, pass dynamic_batch=False" if dynamic_batch else ""
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise CompressError(f"torch.onnx.export cannot export {type(module).__name__}: {reason}{cure}") from error
    if program is None:
        raise CompressError("torch.onnx.export returned no program; it needs torch 2.8 or newer")
    return program.model


def has_batch(leaf: Any) -> bool:
    """Say whether a leaf of the inputs has a first size to leave open."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _with_open_batch(inputs: Inputs) -> Inputs:
    """Check that all inputs have one batch size, and double a batch of one: the tracer would fix the size 1."""
    sizes = {leaf.shape[0] for leaf in pytree.tree_leaves(inputs) if has_batch(leaf)}
    if len(sizes) > 1:
        raise ValueError(
            f"dynamic_batch=True needs inputs of one first size, got {sorted(sizes)}; pass dynamic_batch=False"
        )
    if sizes != {1}:
        return inputs

    def doubled(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if has_batch(leaf) else leaf

    twice: Inputs = pytree.tree_map(doubled, inputs)
    return twice


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep out what the exporter says about itself and not about the module."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        with warnings.catch_warnings():
            # torch 2.13: its own tree specifications copied; one name for the batch of several inputs, which is what
            # we want; inputs that are no tensors, which become constants
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            warnings.filterwarnings("ignore", "# The axis name: batch will not be used", UserWarning)
            warnings.filterwarnings("ignore", "# ONNX model has different number of inputs", UserWarning)
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def strip(model: ir.Model) -> None:
    """Take out what only a debugger reads: stack traces, module scopes, signatures, shapes inside the graph.

    Without the inner shapes ONNX Runtime infers its own, and was not slower for it (a small BERT: 1.15x faster).
    """
    graph = model.graph
    model.metadata_props.clear()
    graph.metadata_props.clear()
    model.doc_string = graph.doc_string = None
    nodes = list(graph.all_nodes())
    for node in nodes:
        node.metadata_props.clear()
        node.doc_string = None
    inner = [*graph.initializers.values(), *(value for node in nodes for value in node.outputs)]
    for value in (*graph.inputs, *inner):
        value.metadata_props.clear()
        value.doc_string = None
    for value in inner:
        if not value.is_graph_output():
            value.shape = value.type = None

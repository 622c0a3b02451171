"""Write a module as an ONNX file, float32 or int8 with trained ranges, checked before it is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_compress.errors import CompressError, NothingToCompress
from lightning_compress.export.integer import check_grids, check_rows
from lightning_compress.export.kernels import int8_report
from lightning_compress.export.profiles import Profile, profile_named
from lightning_compress.export.replacing import written_at_the_end
from lightning_compress.export.runtime import kernel_counts, onnx_session, require, run_onnx
from lightning_compress.export.tracing import Inputs, OpenSizes, evaluating, inputs_beside, strip, traced
from lightning_compress.export.verify import verify_file
from lightning_compress.quantization.attach import QUANTIZABLE, STATE, check_weight
from lightning_compress.quantization.attention import PRODUCTS, is_product_key
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.outputs import OUTPUT_STATE, Ranges, output_key, outputs_of
from lightning_compress.quantization.projections import PROJECTIONS, Projection, projections_in

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["export_onnx", "int8_report", "kernel_counts", "onnx_session", "run_onnx"]

LARGEST_FILE_BYTES = 2**31 - 1  # protobuf's limit of one message


def export_onnx(  # noqa: PLR0913 - all but three have defaults; what a file is told stands in one place
    module: nn.Module,
    path: str | Path,
    example_inputs: Inputs,
    *,
    ranges: Ranges | None = None,
    profile: str = "cpu",
    dynamic_batch: bool = True,
    dynamic_sequence: bool = False,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    verify: bool = True,
) -> Path:
    """Write an ONNX file of a module in eval mode: float32, or int8 where a layer has a range. Runs after `fit`.

    The module is left as it was. `path` appears only once the file has passed its check, which runs it in ONNX Runtime
    on `example_inputs` (`verify_file` says what must agree).

    On x86 ONNX Runtime runs a Linear with a range in int8 wherever it stands, a Conv where its output is rounded too:
    by the next layer with a range, with only a ReLU, maximum pooling or a reshape between, or on an output range of its
    own (`quantization.placement` finds where these belong). `int8_report` says what became of each.

    Args:
        module: any module with float32 parameters, on any device; a LightningModule needs its `forward`.
        path: the file to write; missing folders are made.
        example_inputs: what `module(*inputs)` or, for a dict, `module(**inputs)` takes; real data, for the check.
        ranges: name of a layer -> its range, from `QuantizationAwareTraining.ranges()`; None writes float32.
        profile: who will run it: "cpu", "tensorrt", "mobile" or "openvino"; they differ as `export.profiles` says.
        dynamic_batch: leave the first size of every input open; the inputs must agree in it.
        dynamic_sequence: leave the second size of every input with two or more open; the inputs must agree in it.
        input_names: names in the file; None takes those of `forward`.
        output_names: names in the file; None takes the exporter's.
        verify: run the check.

    Raises:
        ImportError: a package of the `onnx` extra is missing.
        ValueError: a parameter is not float32; a range names no Linear, Conv or Embedding, or one that `forward` does
            not use, or a product, or grids without integer form; inputs differ in an open size; no such profile.
        IncompatibleCallbacks: a layer in `ranges` has a reparametrized weight.
        NothingToCompress: `ranges` is empty.
        CompressError: fake-quantization is still attached; `forward` cannot be exported; the file would pass 2 GiB,
            or does not compute what the module does.
    """
    module = getattr(module, "_orig_mod", module)  # torch.compile wraps
    require("onnx", "onnx_ir", "onnxscript", *(["onnxruntime"] if verify else []))
    _check_module(module)
    chosen = profile_named(profile)
    if ranges is not None:
        _check_ranges(module, ranges)
        ranges = chosen.grids(ranges)
    open_sizes = OpenSizes(dynamic_batch, dynamic_sequence)
    inputs, path = inputs_beside(module, example_inputs), Path(path)
    with evaluating(module):
        model = traced(module, inputs, open_sizes, input_names, output_names)
        _rewrite(model, module, ranges, chosen)
        with written_at_the_end(path) as unfinished:
            unfinished.write_bytes(_serialized(model))
            if verify:
                verify_file(unfinished, module, inputs, ranges, open_sizes)
    return path


def _rewrite(model: ir.Model, module: nn.Module, ranges: Ranges | None, profile: Profile) -> None:
    # These need onnx-ir, an optional package.
    from lightning_compress.export.faster import spread_layer_norms
    from lightning_compress.export.graph import name_folded_weights
    from lightning_compress.export.qdq import insert_qdq

    if profile.rewritten:
        spread_layer_norms(model.graph)
    if ranges is not None:
        insert_qdq(model, module, ranges, profile)
    name_folded_weights(model.graph, dict(module.named_parameters(remove_duplicate=False)))
    strip(model)


def _check_module(module: nn.Module) -> None:
    for name, tensor in module.named_parameters():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(
                f"export_onnx needs float32 parameters, got {tensor.dtype} in '{name}'; call module.float() first"
            )
    states = {STATE, OUTPUT_STATE, PROJECTIONS, PRODUCTS}
    attached = [name for name, layer in module.named_modules() if not states.isdisjoint(layer.__dict__)]
    if attached:
        raise CompressError(
            f"export_onnx needs the plain module, but fake-quantization is attached to {attached[0]!r} and "
            f"{len(attached) - 1} more; export after fit has ended"
        )


def _check_ranges(module: nn.Module, ranges: Ranges) -> None:
    if not isinstance(ranges, Mapping):
        raise TypeError(f"expected ranges by layer name, got {type(ranges).__name__}; pass qat.ranges(), not qat")
    trained_layers, outputs = outputs_of(ranges)
    if not trained_layers:
        raise NothingToCompress(
            "export_onnx got empty ranges; pass QuantizationAwareTraining(...).ranges() after fit, or None for float32"
        )
    products = [key for key in ranges if is_product_key(key)]
    if products:
        raise ValueError(
            f"an int8 file has no place yet for ranges of products of activations, got '{products[0]}' and "
            f"{len(products) - 1} more; pass {{key: r for key, r in ranges.items() if ':product' not in key}}, and the "
            "file multiplies in floating point there"
        )
    layers = {**dict(module.named_modules(remove_duplicate=False)), **projections_in(module)}
    known = (*QUANTIZABLE, Projection, nn.Embedding)
    unknown = sorted(n for n in trained_layers if not isinstance(layers.get(n), known))
    unknown += sorted(output_key(name) for name in outputs if name not in layers)
    if unknown:
        raise ValueError(
            f"expected ranges of Linear, Conv or Embedding layers of {type(module).__name__}, got {unknown}; use the "
            "names of its named_modules() (for a part of the trained module, cut the part's own name off)"
        )
    for name, trained in ranges.items():
        if not (math.isfinite(trained.low) and math.isfinite(trained.high) and trained.low <= trained.high):
            raise ValueError(f"expected finite low <= high in the range of '{name}', got {trained}")
        if not (isinstance(trained, Range) or 1 <= trained.bits <= 8):
            raise ValueError(f"an int8 file holds outputs of 1 to 8 bits, got {trained} for '{name}'")
    for name, trained in trained_layers.items():
        check_weight(name, layers[name])
        check = check_rows if isinstance(layers[name], nn.Embedding) else check_grids
        check(name, layers[name], trained)


def _serialized(model: ir.Model) -> bytes:
    import onnx_ir as ir

    constants = [value.const_value for value in model.graph.initializers.values()]
    size_bytes = sum(constant.nbytes for constant in constants if constant is not None)
    if size_bytes > LARGEST_FILE_BYTES:
        raise CompressError(f"one ONNX file holds less than 2 GiB, got {size_bytes} bytes of weights; export parts")
    serialized: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return serialized

"""Write a module as an OpenVINO IR, float32 or int8 with trained ranges, checked in OpenVINO before it is kept."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from lightning_compress.errors import CompressError
from lightning_compress.export.checked import Checked, File, checked
from lightning_compress.export.onnx import export_onnx
from lightning_compress.export.replacing import written_at_the_end
from lightning_compress.export.tracing import Inputs, OpenSizes, evaluating, inputs_beside
from lightning_compress.export.verify import FLOAT_TOLERANCE, arrays_of
from lightning_compress.quantization.outputs import Ranges

if TYPE_CHECKING:
    import openvino

__all__ = ["export_openvino", "openvino_kernels", "openvino_model", "run_openvino"]

HALF_TOLERANCE = 1e-2  # float16 keeps 11 bits of a weight: 5e-4 of each, more of a sum that cancels
WITH_WEIGHTS = ("Convolution", "FullyConnected", "MatMul")


def export_openvino(
    module: nn.Module,
    path: str | Path,
    example_inputs: Inputs,
    *,
    ranges: Ranges | None = None,
    half: bool = False,
    dynamic_batch: bool = True,
    dynamic_sequence: bool = False,
) -> Checked:
    """Write an OpenVINO IR of a module in eval mode: float, or int8 where a layer has a range. Runs after `fit`.

    Two files: `path`, which ends in .xml, and the weights beside it in .bin. OpenVINO's own converter makes them of the
    ONNX file that `export_onnx(profile="openvino")` writes, so that what it says of layers and output ranges holds here
    too. They appear only once OpenVINO has run them on `example_inputs` and agrees with the module: to 1e-3 of the
    largest output in float32, 1e-2 with `half`, and to 20 dB of signal to noise in int8.

    Args:
        module: any module with float32 parameters; a LightningModule needs its `forward`.
        path: the .xml file to write; missing folders are made.
        example_inputs: a tuple for `module(*inputs)`, or a dict for `module(**inputs)`; real data, for the check.
        ranges: `QuantizationAwareTraining.ranges()`; None writes floats.
        half: store what is left in float as float16; OpenVINO computes with it in the precision of the device.
        dynamic_batch: leave the first size of every input open.
        dynamic_sequence: leave the second size of every input with two or more open.

    Returns:
        The path with what the check found.

    Raises:
        ImportError: openvino, or a package of the `onnx` extra, is missing.
        ValueError: as `export_onnx`; `path` does not end in .xml.
        CompressError: as `export_onnx`; OpenVINO lacks an operator, or the file does not compute what the module does.
    """
    module, path = getattr(module, "_orig_mod", module), Path(path)  # torch.compile wraps
    _require()
    if path.suffix != ".xml":
        raise ValueError(f"an OpenVINO IR is a .xml file with a .bin file beside it, got {path}; end it in .xml")
    open_sizes = OpenSizes(dynamic_batch, dynamic_sequence)
    inputs = inputs_beside(module, example_inputs)
    options: dict[str, Any] = {"dynamic_batch": dynamic_batch, "dynamic_sequence": dynamic_sequence}
    with written_at_the_end(path, ".xml", beside=[".bin"]) as unfinished:
        with tempfile.TemporaryDirectory() as folder:
            onnx = Path(folder) / "model.onnx"
            export_onnx(module, onnx, inputs, ranges=ranges, profile="openvino", verify=False, **options)
            _convert(onnx, unfinished, half)
        size_bytes = unfinished.stat().st_size + unfinished.with_suffix(".bin").stat().st_size
        compiled = openvino_model(unfinished)
        with evaluating(module):
            return checked(
                File("OpenVINO file", path, size_bytes, lambda inputs: _outputs(compiled, arrays_of(inputs))),
                module, inputs, ranges, open_sizes=open_sizes,
                tolerance=HALF_TOLERANCE if half else FLOAT_TOLERANCE, timed_rows=1 if dynamic_batch else None,
            )  # fmt: skip


def _convert(onnx: Path, path: Path, half: bool) -> None:
    import openvino
    from openvino.frontend import OpConversionFailure

    try:
        model = openvino.convert_model(onnx)
    except OpConversionFailure as error:
        raise CompressError(
            f"OpenVINO has no operator for {_lacking(str(error))} of the ONNX graph; write that part of forward with "
            "other operators, or leave it out of the module and compute it behind the file"
        ) from error
    openvino.save_model(model, path, compress_to_fp16=half)


def _lacking(text: str) -> str:
    r"""Return the operators in the converter's report.

    >>> _lacking("Summary:\n-- No conversion rule found for operations: Det-20, com.x.Y-1\n")
    'Det-20, com.x.Y-1'
    """
    named = [line.partition("operations: ")[2] for line in text.splitlines() if "operations: " in line]
    return ", ".join(named) or text


def openvino_model(
    path: str | os.PathLike[str], threads: int = 1, *, sparse_rate: float = 1.0
) -> openvino.CompiledModel:
    """Open an IR (or an ONNX file) for the CPU on `threads` threads, computing what is not int8 in float32.

    Args:
        path: the .xml file.
        threads: threads of one run.
        sparse_rate: OpenVINO's CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE: int8 weights of a Linear of which a larger share
            is zero are kept compressed, where the processor has AMX; at 1.0 none are.

    Raises:
        ImportError: openvino is missing.
        ValueError: `threads` is below 1.
        FileNotFoundError: there is no such file.
        CompressError: OpenVINO cannot make a program of the file for this processor.
    """
    _require()
    import openvino

    if threads < 1:
        raise ValueError(f"openvino_model needs threads of at least 1, got {threads}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected an OpenVINO IR (.xml) or an ONNX file, found none at {os.fspath(path)}")
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": sparse_rate,
    }
    try:
        return openvino.Core().compile_model(os.fspath(path), "CPU", options)
    except RuntimeError as error:
        raise CompressError(
            f"OpenVINO cannot compile {os.fspath(path)} for the CPU: {error}; write the operator that it names in "
            "another way"
        ) from error


def run_openvino(path: str | os.PathLike[str], *arrays: np.ndarray, threads: int = 1) -> list[np.ndarray]:
    """Run an IR once and return all outputs; to run it often, keep an `openvino_model`.

    Args:
        path: the .xml file.
        arrays: its inputs in the file's order, each of the file's dtype.
        threads: threads of one run.

    Raises:
        ValueError: the file has another number of inputs.
    """
    model = openvino_model(path, threads)
    if len(model.inputs) != len(arrays):
        raise ValueError(f"expected {len(model.inputs)} arrays for the inputs of {os.fspath(path)}, got {len(arrays)}")
    return _outputs(model, arrays)


def _outputs(model: openvino.CompiledModel, arrays: Any) -> list[np.ndarray]:
    # Copies: OpenVINO gives views of what the next run writes into.
    return [np.array(value) for value in model(list(arrays)).to_tuple()]


def openvino_kernels(path: str | os.PathLike[str], threads: int = 1) -> dict[str, int]:
    """Count the products that OpenVINO really runs by kind and type, such as `Convolution u8` or `FullyConnected f32`.

    `u8` and `i8` compute on integers.
    """
    nodes: Mapping[Any, Any]
    found: Counter[str] = Counter()
    for node in openvino_model(path, threads).get_runtime_model().get_ops():
        nodes = node.get_rt_info()
        kind, precision = (_word(nodes[key]) for key in ("layerType", "runtimePrecision"))
        if kind in WITH_WEIGHTS:
            found[f"{kind} {precision}"] += 1
    return dict(found.most_common())


def _word(value: Any) -> str:
    return str(value if isinstance(value, str) else value.astype(str))


def _require() -> None:
    if importlib.util.find_spec("openvino") is None:
        raise ImportError("OpenVINO export needs openvino; pip install 'lightning-compress[openvino]'")

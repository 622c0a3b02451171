"""Run ONNX files in ONNX Runtime on the CPU: outputs, sessions to time, and which kernels really run."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["kernel_counts", "onnx_session", "products_overflow", "require", "run_onnx"]

ERRORS_ONLY = 3  # ONNX Runtime's severity; its warnings go past Python's
# On x86 without VNNI, products of unsigned and signed codes are added in 16 bits, which overflow; this makes both
# unsigned, which do not, and are as fast. With VNNI nothing overflows, and this would cost two thirds of the speed.
EXACT_PRODUCTS = "session.x64quantprecision"


def require(*packages: str) -> None:
    """Raise if a package of the `onnx` extra is missing. Runs before any work.

    Raises:
        ImportError: names what is missing, and the cure.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"ONNX export and its check need {', '.join(missing)}; pip install 'lightning-compress[onnx]'"
        )


def onnx_session(
    path: str | Path, threads: int = 1, *, optimized: Path | None = None, layouts: bool = True
) -> onnxruntime.InferenceSession:
    """Open an ONNX file for the CPU, on `threads` threads, with integer sums that never overflow.

    A session of your own needs `add_session_config_entry("session.x64quantprecision", "1")` for that where
    `products_overflow()`, and must not have it elsewhere: it makes int8 files about three times slower there.

    Args:
        path: the file.
        threads: threads within one operator; operators run one after the other.
        optimized: where to write the graph that ONNX Runtime makes of it, None to keep it in memory.
        layouts: reorder weights and activations as the processor likes them; without, weights keep their names.

    Raises:
        ImportError: onnxruntime is missing.
        ValueError: `threads` is below 1.
    """
    require("onnxruntime")
    import onnxruntime

    if threads < 1:
        raise ValueError(f"onnx_session needs threads of at least 1, got {threads}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = ERRORS_ONLY
    if products_overflow():
        options.add_session_config_entry(EXACT_PRODUCTS, "1")
    if not layouts:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@functools.cache
def products_overflow() -> bool:
    """Say whether ONNX Runtime's int8 sums overflow on this processor unless told otherwise. Runs once, some ms.

    They do on x86 without VNNI (before Intel's Ice Lake and AMD's Zen 4). Asked is a product of the largest codes.

    Raises:
        ImportError: onnx or onnxruntime is missing.
    """
    require("onnx", "onnxruntime")
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    inputs, weights = np.full((8, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["inputs", "weights"], ["sums"])],
        "largest codes",
        [helper.make_tensor_value_info("inputs", TensorProto.UINT8, inputs.shape)],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, (8, 16))],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"inputs": inputs})
    return not np.array_equal(sums, inputs.astype(np.int32) @ weights.astype(np.int32))


def run_onnx(path: str | Path, *arrays: np.ndarray, threads: int = 1) -> list[np.ndarray]:
    """Run an ONNX file once and return all outputs; to run it often, keep an `onnx_session`.

    Args:
        path: the file.
        arrays: its inputs in the file's order, each of the file's dtype.
        threads: threads within one operator.

    Raises:
        ValueError: the file has another number of inputs.
    """
    session = onnx_session(path, threads)
    names = [each.name for each in session.get_inputs()]
    if len(names) != len(arrays):
        raise ValueError(f"expected {len(names)} arrays for the inputs {names} of {path}, got {len(arrays)}")
    return [np.asarray(output) for output in session.run(None, dict(zip(names, arrays, strict=True)))]


def kernel_counts(path: str | Path, threads: int = 1) -> dict[str, int]:
    """Count the operators of the graph that ONNX Runtime really runs, most frequent first.

    `QLinearConv`, `QGemm`, `QLinearMatMul` and `MatMulIntegerToFloat` compute on integers; a `Conv`,
    `FusedConv`, `Gemm`, `FusedGemm` or `MatMul` computes in float.

    Raises:
        ImportError: onnx or onnxruntime is missing.
    """
    require("onnx", "onnxruntime")
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        onnx_session(path, threads, optimized=optimized)
        return dict(Counter(node.op_type for node in onnx.load(str(optimized)).graph.node).most_common())

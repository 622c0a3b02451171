"""int8 ONNX files against float32 ones in ONNX Runtime, and the same integers through Inductor.

    python benchmarks/int8.py                          # all four networks, about 10 minutes of one core
    python benchmarks/int8.py --network BERT-mini
    TORCHINDUCTOR_FREEZING=1 python benchmarks/int8.py --inductor --network ResNet-18

Random weights, ranges of one batch of 20; batch 1, one thread, the files in turn (A B A B). Results are merged into
`results/int8.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from int8_models import NETWORKS, Network, calibrated, run, settle
from onnx import numpy_helper
from torch import nn

from lightning_compress.export.kernels import int8_report
from lightning_compress.export.onnx import export_onnx, kernel_counts, onnx_session
from lightning_compress.export.program import reference_module
from lightning_compress.export.verify import sqnr_db
from lightning_compress.measure.latency import compare_latency
from lightning_compress.quantization.outputs import Ranges, outputs_of, rounded_as_trained

RESULTS = Path(__file__).parent / "results" / "int8.json"


def prepared(network: Network) -> tuple[nn.Module, Ranges]:
    torch.manual_seed(0)
    module, inputs = network.make(), network.inputs(20)
    settle(module, network.head, inputs)
    return module, calibrated(module, network.head, inputs)[0]


def arrays(inputs: Any) -> list[np.ndarray]:
    return [value.numpy() for value in (inputs.values() if isinstance(inputs, dict) else inputs)]


def layer_bytes(path: Path, layers: list[str]) -> int:
    """Bytes of what a file stores of these layers: weights, biases, scales and zero points."""
    owned = onnx.load(path).graph.initializer
    prefixes = tuple(f"{name}." for name in layers)
    return sum(numpy_helper.to_array(each).nbytes for each in owned if each.name.startswith(prefixes))


def agreement(module: nn.Module, ranges: Ranges, network: Network, path: Path, count: int) -> dict[str, float]:
    """Compare fresh examples, one by one as the file takes them, with the module inside `rounded_as_trained`."""
    session = onnx_session(path)
    names = [each.name for each in session.get_inputs()]
    inputs = network.inputs(count, seed=1)
    rows = zip(*([value[i : i + 1] for i in range(count)] for value in arrays(inputs)), strict=True)
    got = [session.run(None, dict(zip(names, row, strict=True)))[0] for row in rows]
    with torch.no_grad(), rounded_as_trained(module, ranges):
        reference = run(module, inputs)[:, :10].numpy()
    output = np.concatenate(got)[:, :10]
    return {
        "examples": count,
        "argmax_agreement": float((reference.argmax(1) == output.argmax(1)).mean()),
        "classes_predicted": len(np.unique(reference.argmax(1))),
        "sqnr_db": round(sqnr_db(reference - reference.mean(0), output - reference.mean(0)), 1),
    }


def measured(network: Network, runs: int, count: int) -> dict[str, Any]:
    module, ranges = prepared(network)
    one = network.inputs(1)
    layers = list(outputs_of(ranges)[0])
    with tempfile.TemporaryDirectory() as folder:
        paths = {"float32": Path(folder) / "float.onnx", "int8": Path(folder) / "int8.onnx"}
        export_onnx(module, paths["float32"], one, dynamic_batch=False)
        export_onnx(module, paths["int8"], one, ranges=ranges, dynamic_batch=False)
        plain = Path(folder) / "plain.onnx"  # as the exporter writes it, layer norms left whole
        export_onnx(module, plain, one, dynamic_batch=False, profile="tensorrt")
        calls = {}
        for name, path in {**paths, "float32 as exported": plain}.items():
            session = onnx_session(path)
            feed = dict(zip([each.name for each in session.get_inputs()], arrays(one), strict=True))
            calls[name] = lambda session=session, feed=feed: session.run(None, feed)
        latency = compare_latency(calls, runs=runs, threads=1)
        floats = int8_report(paths["int8"]).floats
        weights = [module.get_parameter(f"{name}.weight") for name in layers]
        float_bytes = sum(4 * (weight.numel() + len(weight)) for weight in weights)  # and biases, norms folded in
        return {
            **{name: {"median_ms": each.median_ms, "p10_ms": each.p10_ms, "p90_ms": each.p90_ms, "min_ms": each.min_ms}
               for name, each in latency.items()},
            "speedup": latency["int8"].speedup,
            "speedup_of_fastest_runs": latency["float32"].min_ms / latency["int8"].min_ms,
            "speedup_against_as_exported": latency["int8"].speedup / latency["float32 as exported"].speedup,
            "asked": network.least_speedup,
            "runs": runs,
            "kernels": kernel_counts(paths["int8"]),
            "float_products": dict(Counter(each.reason for each in floats)),
            "file_bytes": {name: path.stat().st_size for name, path in paths.items()},
            "layers_bytes_ratio": layer_bytes(paths["int8"], layers) / float_bytes,
            **agreement(module, ranges, network, paths["int8"], count),
        }  # fmt: skip


def through_inductor(network: Network, runs: int) -> dict[str, Any]:
    """Time the reference module, compiled, against eager float32. Needs TORCHINDUCTOR_FREEZING=1 from the start."""
    torch.set_num_threads(1)
    module, ranges = prepared(network)
    one = network.inputs(1)
    reference = torch.compile(reference_module(module, ranges, one))
    compiled = torch.compile(module)
    with torch.no_grad():
        start = time.perf_counter()
        run(reference, one)
        seconds = time.perf_counter() - start
        run(compiled, one)
        calls = {"eager float32": lambda: run(module, one), "inductor int8": lambda: run(reference, one),
                 "inductor float32": lambda: run(compiled, one)}  # fmt: skip
        latency = compare_latency(calls, runs=runs, threads=1)
    return {
        "compile_s": round(seconds, 1),
        "speedup": latency["inductor int8"].speedup,
        "speedup_float32": latency["inductor float32"].speedup,
        **{name: each.median_ms for name, each in latency.items()},
    }


def save(section: str, name: str, result: dict[str, Any]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["about"] = {
        "machine": processor(),
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "onnx", "transformers")},
    }
    result |= {"date": datetime.date.today().isoformat(), "load_average": os.getloadavg()[0]}
    results.setdefault(section, {})[name] = result
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    sets = ", ".join(flag for flag in ("avx512_vnni", "avx_vnni", "amx_int8") if flag in flags)
    return f"{names[0] if names else platform.machine()}, {len(names)} cores seen, {sets}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(NETWORKS), action="append")
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--inductor", action="store_true")
    options = parser.parse_args()
    for name in options.network or list(NETWORKS):
        if options.inductor:
            result = through_inductor(NETWORKS[name], options.runs)
        else:
            result = measured(NETWORKS[name], options.runs, options.examples)
        save("inductor" if options.inductor else "onnx", name, result)
        print(name, json.dumps(result, indent=1), flush=True)


if __name__ == "__main__":
    main()

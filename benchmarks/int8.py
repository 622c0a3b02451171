"""int8 ONNX files against float32 ones in ONNX Runtime, and the same integers through Inductor.

    python benchmarks/int8.py                          # all four networks, about 10 minutes of one core
    python benchmarks/int8.py --network BERT-mini
    TORCHINDUCTOR_FREEZING=1 python benchmarks/int8.py --inductor --network ResNet-18

Random weights, ranges of one batch of 20; batch 1, one thread, CPU time, the files in turn
(A B A B). Results are merged into `results/int8.json`.
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
from collections.abc import Callable
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
        times, cold = cpu_times(calls, runs, warm=2), cpu_times(calls, runs, warm=0)
        floats = int8_report(paths["int8"]).floats
        weights = [module.get_parameter(f"{name}.weight") for name in layers]
        float_bytes = sum(4 * (weight.numel() + len(weight)) for weight in weights)  # and biases, norms folded in
        return {
            **{name: spread(each) for name, each in times.items()},
            "speedup": spread(times["float32"] / times["int8"]),
            "speedup_with_cold_caches": spread(cold["float32"] / cold["int8"]),
            "speedup_against_as_exported": spread(times["float32 as exported"] / times["int8"]),
            "asked": network.least_speedup,
            "runs": runs,
            "kernels": kernel_counts(paths["int8"]),
            "float_products": dict(Counter(each.reason for each in floats)),
            "file_bytes": {name: path.stat().st_size for name, path in paths.items()},
            "layers_bytes_ratio": layer_bytes(paths["int8"], layers) / float_bytes,
            **agreement(module, ranges, network, paths["int8"], count),
        }  # fmt: skip


def cpu_times(calls: dict[str, Callable[[], object]], runs: int, warm: int) -> dict[str, np.ndarray]:
    """Milliseconds of CPU time of each run, the calls in turn, each in this thread alone.

    CPU time, because waiting for a core that other work holds says nothing of the file. Before each timed call `warm`
    more of the same: with none, each call finds the caches full of another file's weights.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(3 + runs):
        for name, call in calls.items():
            for _ in range(warm):
                call()
            start = time.thread_time_ns()
            call()
            taken[name].append((time.thread_time_ns() - start) / 1e6)
    return {name: np.array(values[3:]) for name, values in taken.items()}


def spread(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, (25, 50, 75))
    return {"median": round(median, 3), "quartile_1": round(low, 3), "quartile_3": round(high, 3)}


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
        with rounded_as_trained(module, ranges):
            expected = run(module, one)
        difference = float((run(reference, one) - expected).abs().max() / expected[:, :10].std())
        calls = {"eager float32": lambda: run(module, one), "inductor int8": lambda: run(reference, one),
                 "inductor float32": lambda: run(compiled, one)}  # fmt: skip
        times = cpu_times(calls, runs, warm=2)
    eager = times["eager float32"]
    return {
        "compile_s": round(seconds, 1),
        "runs": runs,
        "cpu_ms": {name: spread(each) for name, each in times.items()},
        "speedup": {name: spread(eager / each) for name, each in times.items()},
        "largest_difference_of_fake_quant": difference,
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

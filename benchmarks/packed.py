"""Packed files against what else a model can be kept in, their speed, and the memory that reading takes.

    OMP_NUM_THREADS=1 python benchmarks/packed.py          # about five minutes of one core

The weights of all-MiniLM-L6-v2: dense, and its encoder at 90 % zeros (magnitude), at 8 and 4 bits (each output's own
scale), both, and shared among 16 values a layer. Nothing is trained: sizes are those of such weights, not of a good
model. Bytes are those of files; the bound is that of `entropy_bound_bytes`. MB/s are of dense float32 weights, by the
process's CPU time, which other processes disturb least; the best of three. Memory is the process's peak above what
it had, in a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import zstandard
from int8 import processor
from torch import Tensor, nn
from transformers import AutoModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from finetune_text import encoder_weights

from lightning_compress import pack, unpack
from lightning_compress.measure.entropy import entropy_bound_bytes
from lightning_compress.packing.reading import packed_tensors
from lightning_compress.quantization.grid import FLOAT_BITS, Range
from lightning_compress.quantization.weights import Symmetric

RESULTS = Path(__file__).resolve().parent / "results" / "packed.json"
CASES = ("dense", "90 % zeros", "8 bits", "90 % zeros, 8 bits", "90 % zeros, 4 bits", "16 values a layer")


def model(case: str) -> tuple[nn.Module, dict[str, Range]]:
    """MiniLM's encoder layers and embeddings, its Linear layers compressed in the case's way."""
    torch.manual_seed(0)
    found = AutoModel.from_pretrained(encoder_weights(), add_pooling_layer=False).requires_grad_(False)
    linears = {name: layer for name, layer in found.encoder.named_modules() if isinstance(layer, nn.Linear)}
    ranges = {}
    for name, layer in linears.items():
        if "zeros" in case:
            layer.weight *= (
                layer.weight.abs() > layer.weight.abs().flatten().kthvalue(int(0.9 * layer.weight.numel()))[0]
            )
        if "bits" in case:
            bits = 8 if "8 bits" in case else 4
            ranges[f"encoder.{name}"] = Range(0.0, 0.0, FLOAT_BITS, bits, Symmetric(bits))
        if "values" in case:
            places = torch.linspace(float(layer.weight.min()), float(layer.weight.max()), 16)
            layer.weight.copy_(places[torch.bucketize(layer.weight, (places[1:] + places[:-1]) / 2)])
    return found, ranges


def best_of_three(work: Any) -> float:
    times = []
    for _ in range(3):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def stored(state: dict[str, Tensor], path: Path) -> dict[str, int]:
    """Bytes of what else there is: torch.save, the same zipped, and by zstandard."""
    torch.save({name: tensor + 0 for name, tensor in state.items()}, path)
    data = path.read_bytes()
    with zipfile.ZipFile(path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("state", data)
    compressor = zstandard.ZstdCompressor(level=19)
    return {
        "torch_bytes": len(data),
        "zipped_bytes": path.with_suffix(".zip").stat().st_size,
        "zstd_19_bytes": len(compressor.compress(data)),
    }


def row(case: str, folder: Path) -> dict[str, Any]:
    module, ranges = model(case)
    path = folder / "model.packed"
    dense = sum(4 * parameter.numel() for parameter in module.parameters())
    packing = best_of_three(lambda: pack(module, path, ranges=ranges))
    reading = best_of_three(lambda: unpack(path))
    state = unpack(path)
    matrices = [told for told in packed_tensors(path) if told.name.startswith("encoder.") and len(told.shape) == 2]
    codes = {told.name: _integers(state[told.name], case) for told in matrices}
    scales = 4 * sum(told.shape[0] for told in matrices) if ranges else 0
    return {
        "case": case,
        "dense_bytes": dense,
        "packed_bytes": path.stat().st_size,
        **stored(state, folder / "state.pt"),
        "encoder_matrices_bytes": sum(told.size_bytes for told in matrices),
        "encoder_matrices_bound_bytes": round(entropy_bound_bytes(codes)) + scales,
        "pack_mb_per_s": round(dense / 1e6 / packing, 1),
        "unpack_mb_per_s": round(dense / 1e6 / reading, 1),
        "unpack_peak_over_state": round(_peak_of(path) / sum(t.numel() * t.element_size() for t in state.values()), 3),
    }


def _integers(tensor: Tensor, case: str) -> Tensor:
    """Codes of rounded weights, whose scales differ by output; the weights themselves elsewhere."""
    if "bits" not in case:
        return tensor
    bits = 8 if "8 bits" in case else 4
    scale = tensor.abs().amax(1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
    return (tensor / scale).round().to(torch.int8)


def _peak_of(path: Path) -> int:
    """Bytes of memory that unpacking takes at its highest, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--peak", path], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def _highest() -> int:
    """The process's largest resident memory so far, bytes; since exec, which getrusage's is not."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def peak(path: Path) -> int:
    unpack(pack({"w": torch.randn(99, 99)}, path.with_name("small.packed")))  # imports are not counted
    before = _highest()
    kept = unpack(path)
    return _highest() - before + 0 * len(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        print(peak(options.peak))
        return
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{processor()}, 1 thread",
        "versions": {name: version(name) for name in ("torch", "constriction", "zstandard")},
        "rows": [],
    }
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            record["rows"].append(row(case, Path(folder)))
        print(json.dumps(record["rows"][-1]), flush=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

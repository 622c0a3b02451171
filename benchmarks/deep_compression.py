"""Deep Compression as files: prune, share, code (Han et al. 2016). `python benchmarks/deep_compression.py`, `--table`.

    OMP_NUM_THREADS=1 python benchmarks/deep_compression.py --data digits
    OMP_NUM_THREADS=1 python benchmarks/deep_compression.py --data fashion
    OMP_NUM_THREADS=1 python benchmarks/deep_compression.py --data digits --trained

LeNet-300-100 and LeNet-5-Caffe on 5000 real digits (4000 to train on, 1000 to test) and on all of Fashion-MNIST. A
dense net is trained; it is trained on under GradualPruning over all layers, the head too, by one threshold; its weights
share values (`share_weights`), its biases lose all but 16 bits; `pack` writes the file. Errors are those of the net
that `load_packed` reads from the file, in percent of the test images. Every cell is added to the json, and what is
there is not run again. With `--trained` values are shared at 70 % of the same run, by `WeightSharing`, and trained in
its rest.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from cells import Cells, load, save
from images import Data, batches, digits, fashion_mnist
from int8 import processor
from networks import Tuned, lenet5_caffe, lenet_300_100
from torch import nn
from training import kept, quiet_trainer

from lightning_compress import GradualPruning, WeightSharing, load_packed, pack
from lightning_compress.measure.entropy import entropy_bound_bytes
from lightning_compress.packing.reading import packed_tensors
from lightning_compress.weight_sharing.sharing import share_weights

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "deep_compression.json"
RESULTS_TRAINED = HERE / "results" / "deep_compression_trained.json"
NETS = {"LeNet-300-100": lenet_300_100, "LeNet-5-Caffe": lenet5_caffe}
STEPS = {"digits": (1500, 4000), "fashion": (5000, 8000)}  # dense, and under pruning
SPARSITIES = (0.9, 0.96, 0.98, 0.99)
ENTRIES = (32, 8)
RATE, RATE_AFTER = 1e-3, 1e-3
WINDOW = (0.0, 0.5)
SHARED_AT = 0.7


def data_of(name: str, seed: int, options: argparse.Namespace) -> Data:
    return digits(seed) if name == "digits" else fashion_mnist(options.data_dir)


def train(
    net: nn.Module, data: Data, seed: int, steps: int, rate: float, sparsity: float = 0.0, entries: int = 0
) -> nn.Module:
    """Train a copy; with a sparsity, prune all its Linear and Conv layers on the way; with entries, share values."""
    torch.manual_seed(seed)
    module = Tuned(copy.deepcopy(net), rate)
    pruning = [GradualPruning(sparsity, WINDOW, 0.01, include=layers(module))] if sparsity else []
    sharing = [WeightSharing(entries, SHARED_AT, include=layers(module))] if entries else []
    quiet_trainer([*pruning, *sharing], max_steps=steps).fit(module, batches(data, seed))
    return module.net.eval()


def layers(module: nn.Module) -> list[str]:
    """Names of all Linear and Conv layers, the head too."""
    return [name for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]


@torch.no_grad()
def error(net: nn.Module, data: Data) -> float:
    images, labels = data.test.tensors
    told = torch.cat([net(part).argmax(1) for part in images.split(1000)])
    return round(100.0 * float((told != labels).double().mean()), 3)


def file_of(net: nn.Module, fresh: nn.Module, data: Data) -> dict[str, Any]:
    """Pack a net and measure what comes back."""
    with tempfile.TemporaryDirectory() as folder:
        path = pack(net, Path(folder) / "net.packed")
        read = load_packed(fresh, path).eval()
        if not all(torch.equal(a, b) for a, b in zip(read.parameters(), net.parameters(), strict=True)):
            raise RuntimeError("the file gives other weights")
        told = packed_tensors(path)
        return {
            "bytes": path.stat().st_size,
            "tensor_bytes": sum(each.size_bytes for each in told),
            "bound_bytes": round(entropy_bound_bytes(dict(net.state_dict()))),
            "error": error(read, data),
        }


def run(name: str, data_name: str, seed: int, options: argparse.Namespace) -> None:
    """Measure all cells of one net and seed that are not there yet."""
    data, (first, second) = data_of(data_name, seed, options), STEPS[data_name]
    torch.manual_seed(seed)
    fresh = NETS[name]()
    raw = sum(4 * parameter.numel() for parameter in fresh.parameters())
    key = {"net": name, "data": data_name, "seed": seed}
    path = options.cache / f"{name}-{data_name}-{seed}.pt"
    dense = kept(path, copy.deepcopy(fresh), lambda net: train(net, data, seed, first, RATE))
    add({**key, "sparsity": 0.0, "entries": 0}, {**file_of(dense, fresh, data), "raw_bytes": raw}, options)
    measure = run_trained if options.trained else run_shared_after
    for sparsity in options.sparsity:
        measure(dense, fresh, data, {**key, "sparsity": sparsity, "raw_bytes": raw}, second, options)


def run_shared_after(
    dense: nn.Module, fresh: nn.Module, data: Data, cell: dict[str, Any], steps: int, options: argparse.Namespace
) -> None:
    """Prune in training, share values after it."""
    if all(there({**cell, "entries": entries}, options) for entries in (0, *ENTRIES)):
        return
    started = time.process_time()
    pruned = train(dense, data, cell["seed"] + 1000, steps, RATE_AFTER, cell["sparsity"])
    seconds = round(time.process_time() - started)
    for entries in (0, *ENTRIES):
        net = copy.deepcopy(pruned)
        if entries:
            share_weights(net, entries, include=layers(net))
        add({**cell, "entries": entries}, {**rounded_file(net, fresh, data), "cpu_seconds": seconds}, options)


def run_trained(
    dense: nn.Module, fresh: nn.Module, data: Data, cell: dict[str, Any], steps: int, options: argparse.Namespace
) -> None:
    """Prune and share values in one training."""
    for entries in options.entries:
        if not there({**cell, "entries": entries}, options):
            started = time.process_time()
            net = train(dense, data, cell["seed"] + 1000, steps, RATE_AFTER, cell["sparsity"], entries)
            seconds = round(time.process_time() - started)
            add({**cell, "entries": entries}, {**rounded_file(net, fresh, data), "cpu_seconds": seconds}, options)


def rounded_file(net: nn.Module, fresh: nn.Module, data: Data) -> dict[str, Any]:
    """Round the biases to 16 bits, pack and measure."""
    for parameter in net.parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data.bfloat16().float()
    return file_of(net, fresh, data)


def there(key: dict[str, Any], options: argparse.Namespace) -> bool:
    return any(all(cell[name] == value for name, value in key.items()) for cell in load(options.out))


def add(key: dict[str, Any], found: dict[str, Any], options: argparse.Namespace) -> None:
    if not there(key, options):
        save(options.out, [*load(options.out), {**key, **found, "machine": processor()}])
        print(key, found, flush=True)


def table(cells: Cells) -> Iterator[str]:
    yield "| net, data | zeros | values a layer | bytes of the file | times smaller | error, % (each seed) | seeds |"
    yield "| --- | ---: | ---: | ---: | ---: | --- | ---: |"
    names = ("net", "data", "sparsity", "entries")
    for key in dict.fromkeys(tuple(cell[name] for name in names) for cell in cells):
        of = [cell for cell in cells if tuple(cell[name] for name in names) == key]
        errors = ", ".join(f"{cell['error']:.2f}" for cell in of)
        size, raw = mean(cell["bytes"] for cell in of), of[0]["raw_bytes"]
        values = key[3] or "all"
        yield (
            f"| {key[0]}, {key[1]} | {key[2]:.0%} | {values} | {size:,.0f} | {raw / size:.0f} | "
            f"{mean(cell['error'] for cell in of):.2f} ({errors}) | {len(of)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=STEPS, default="digits")
    parser.add_argument("--net", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sparsity", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--data-dir", default="/usr/share/datasets/fashion-mnist", help="Fashion-MNIST's IDX files")
    parser.add_argument("--cache", type=Path, default=HERE.parent / "outputs" / "deep_compression", help="dense nets")
    parser.add_argument("--trained", action="store_true", help="share values in training")
    parser.add_argument("--entries", nargs="+", type=int, default=[8], help="values a layer, with --trained")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", action="store_true", help="only print the table in Markdown")
    options = parser.parse_args()
    options.out = options.out or (RESULTS_TRAINED if options.trained else RESULTS)
    if not options.table:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")  # lightning's advice on workers and loggers
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        for name in options.net:
            for seed in options.seeds:
                run(name, options.data, seed, options)
    print(*table(load(options.out)), sep="\n")


if __name__ == "__main__":
    main()

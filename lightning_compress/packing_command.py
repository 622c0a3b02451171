"""`python -m lightning_compress pack`, `unpack`, `inspect`: checkpoints to packed files, back, and what is in one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_compress.errors import CompressError
from lightning_compress.export.replacing import written_at_the_end
from lightning_compress.measure.stored import stored_tensors
from lightning_compress.packing.reading import packed_tensors, unpack
from lightning_compress.packing.writing import pack

__all__ = ["main"]

PROGRAM = "python -m lightning_compress"
SAFETENSORS = ".safetensors"


def main(command: str, arguments: Sequence[str]) -> int:
    """Run one of the three commands; return the exit status."""
    run, parser = COMMANDS[command]
    options = parser(argparse.ArgumentParser(prog=f"{PROGRAM} {command}", description=run.__doc__)).parse_args(
        list(arguments)
    )
    try:
        sys.stdout.write(run(options))
    except (CompressError, ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"{PROGRAM} {command}: {error}\n")
        return 1
    return 0


def _pack(options: argparse.Namespace) -> str:
    """Pack the tensors of a checkpoint, its state_dict alone, into one file."""
    state = stored_tensors(options.checkpoint)
    path = pack(state, options.packed, signed_zeros=options.signed_zeros)
    dense = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    size = path.stat().st_size
    return f"{path}: {size:,} bytes, {dense / size:.2f}x smaller than its tensors ({dense:,} bytes)\n"


def _unpack(options: argparse.Namespace) -> str:
    """Write the tensors of a packed file as a checkpoint of torch or, by its name, as safetensors."""
    state = unpack(options.packed, options.level, options.most_bytes)
    path = Path(options.checkpoint)
    with written_at_the_end(path, path.suffix) as unfinished:
        _save(state, unfinished)
    return f"{path}: {path.stat().st_size:,} bytes, {len(state)} tensors\n"


def _save(state: Mapping[str, Tensor], path: Path) -> None:
    if path.suffix != SAFETENSORS:
        torch.save(dict(state), path)
        return
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("safetensors files need safetensors: pip install safetensors") from error
    # One of two tied tensors is a copy there: the format has no ties.
    save_file({name: tensor.clone() for name, tensor in state.items()}, path)


def _inspect(options: argparse.Namespace) -> str:
    """Say how each tensor of a packed file is kept, in how many bytes, and what the entropy of its values is."""
    rows = [("tensor", "dtype", "shape", "kept as", "bytes", "bits a value", "entropy")]
    found = packed_tensors(options.packed, options.level)
    for told in found:
        count = max(1, torch.Size(told.shape).numel())
        shape = " x ".join(map(str, told.shape)) or "one value"
        bits = f"{8 * told.size_bytes / count:.3f}", f"{8 * told.bound_bytes / count:.3f}"
        rows.append((told.name, told.dtype, shape, told.way, f"{told.size_bytes:,}", *bits))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(cell.ljust(width) if column < 4 else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )  # fmt: skip
    whole, tensors = Path(options.packed).stat().st_size, sum(told.size_bytes for told in found)
    return "\n".join(lines) + f"\n{whole:,} bytes, of which {whole - tensors:,} are names, shapes and checksums\n"


def _of_pack(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("checkpoint", help="a .ckpt, .pt, .pth, .bin or .safetensors file")
    parser.add_argument("packed", help="the file to write, such as model.packed")
    parser.add_argument("--signed-zeros", action="store_true", help="keep -0.0 apart from 0.0")
    return parser


def _of_unpack(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("packed", help="what `pack` wrote")
    parser.add_argument("checkpoint", help="the file to write: .pt, or .safetensors")
    _level(parser)
    parser.add_argument("--most-bytes", type=int, help="what its tensors may take (default: 1 GiB + 1000 x the file)")
    return parser


def _of_inspect(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("packed", help="what `pack` wrote")
    _level(parser)
    return parser


def _level(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--level", type=int, help="of a file of several versions, 0 the coarsest (default: the finest)")


Run = Callable[[argparse.Namespace], str]
COMMANDS: Mapping[str, tuple[Run, Callable[[argparse.ArgumentParser], argparse.ArgumentParser]]] = {
    "pack": (_pack, _of_pack),
    "unpack": (_unpack, _of_unpack),
    "inspect": (_inspect, _of_inspect),
}

"""Makes the Fashion-MNIST subset that ships with the package from the official IDX files.

    python tools/make_fashion_mnist_subset.py --data-dir DIR [--seed 0] [--out FILE]

DIR holds the four official ``*-ubyte.gz`` files. The same files and seed give the same arrays.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

CLASSES = 10
DEFAULT_OUT = Path(__file__).parents[1] / "lightning_compress" / "_data" / "fashion_mnist_subset.npz"


def read_idx(path: Path) -> Bytes:
    """Reads a gzipped IDX file of unsigned bytes.

    The header is two zero bytes, the type (8 = uint8), the number of dimensions, then each
    dimension as a big-endian 32-bit integer.

    Raises:
        ValueError: If the file is of another type or its length disagrees with its header.
    """
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"expected an IDX file of uint8 (magic 000008), got {raw[:3].hex()} in {path}")
    start = 4 + 4 * raw[3]
    shape = tuple(int(n) for n in np.frombuffer(raw[4:start], dtype=">u4"))
    values = np.frombuffer(raw, dtype=np.uint8, offset=start)
    if values.size != np.prod(shape):
        raise ValueError(f"expected {shape} values as the header says, got {values.size} in {path}")
    return values.reshape(shape)


def stratified(labels: Bytes, per_class: int, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """Draws `per_class` positions of every class, without replacement, in shuffled order."""
    drawn = [rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in range(CLASSES)]
    return rng.permutation(np.concatenate(drawn))


def subset(data_dir: Path, seed: int) -> dict[str, Bytes]:
    """Takes 200 training and 100 test images of every class."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, Bytes] = {}
    for name, prefix, per_class in (("train", "train", 200), ("test", "t10k", 100)):
        labels = read_idx(data_dir / f"{prefix}-labels-idx1-ubyte.gz")
        images = read_idx(data_dir / f"{prefix}-images-idx3-ubyte.gz")
        rows = stratified(labels, per_class, rng)
        arrays |= {f"{name}_images": images[rows], f"{name}_labels": labels[rows]}
    return arrays


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the official .gz files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    args = parser.parse_args()
    arrays = subset(args.data_dir, args.seed)
    np.savez_compressed(args.out, **arrays)
    print(f"{args.out}: {args.out.stat().st_size} bytes, { ({k: v.shape for k, v in arrays.items()}) }")


if __name__ == "__main__":
    main()

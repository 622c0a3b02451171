"""Fashion-MNIST for the demo: the embedded 2000 + 1000 images, or the full set from its IDX files."""

from __future__ import annotations

import gzip
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

__all__ = ["load_fashion_mnist"]

MEAN, DEVIATION = 0.286, 0.353  # of the 60 000 training images, pixels in [0, 1]
IDX_FILES = {
    "train_images": ("train-images-idx3-ubyte", 16),
    "train_labels": ("train-labels-idx1-ubyte", 8),
    "test_images": ("t10k-images-idx3-ubyte", 16),
    "test_labels": ("t10k-labels-idx1-ubyte", 8),
}


def load_fashion_mnist(data_dir: str | None = None) -> tuple[TensorDataset, TensorDataset]:
    """Return the training and test images, (1, 28, 28) float32 and normalized, with their labels.

    Args:
        data_dir: folder of the four IDX files, gzipped or not; None is the embedded subset (200 + 100 a class).

    Raises:
        FileNotFoundError: `data_dir` lacks one of the files.
    """
    arrays = _embedded() if data_dir is None else {name: _read_idx(Path(data_dir), name) for name in IDX_FILES}
    return _dataset(arrays, "train"), _dataset(arrays, "test")


def _embedded() -> dict[str, np.ndarray]:
    with files("lightning_compress").joinpath("_data/fashion_mnist_subset.npz").open("rb") as stream:
        return dict(np.load(stream))


def _read_idx(folder: Path, name: str) -> np.ndarray:
    stem, header_bytes = IDX_FILES[name]
    for path, reader in ((folder / f"{stem}.gz", gzip.open), (folder / stem, Path.open)):
        if path.is_file():
            with reader(path, "rb") as stream:
                return np.frombuffer(stream.read(), np.uint8, offset=header_bytes)
    raise FileNotFoundError(
        f"expected Fashion-MNIST's {stem}.gz (or unzipped) in {str(folder)!r}; give the folder of its four IDX files, "
        f"or leave out --data-dir for the embedded subset"
    )


def _dataset(arrays: dict[str, np.ndarray], part: str) -> TensorDataset:
    images = torch.from_numpy(arrays[f"{part}_images"].reshape(-1, 1, 28, 28).astype(np.float32) / 255.0)
    labels = torch.from_numpy(arrays[f"{part}_labels"].astype(np.int64))
    return TensorDataset((images - MEAN) / DEVIATION, labels)

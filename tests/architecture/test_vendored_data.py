"""The embedded images are the ones described beside them."""

from __future__ import annotations

import hashlib
from importlib.resources import files

import numpy as np
import pytest

DATA = files("lightning_compress") / "_data"
SHA256 = {
    "train_images": "c1032f7b1ea79f0efbede378d415d28c2b738ae3d8372330e531a4bf498f0116",
    "train_labels": "7182103e24583c5a02e84d114dd1458f1495d5db75b31b539f4b9df89b644409",
    "test_images": "424b557db8ccd41df33c56d8769edb060addbba6ee7966e37e3ac61e12e5381a",
    "test_labels": "60e46ceaa0f95b90d0c5d10e98e3e58d6c5bca8f10e04c46bfc0e18e11922950",
}


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with (DATA / "fashion_mnist_subset.npz").open("rb") as file, np.load(file) as archive:
        return dict(archive)


@pytest.mark.parametrize("key", sorted(SHA256))
def test_arrays_are_the_published_ones(arrays: dict[str, np.ndarray], key: str) -> None:
    assert arrays[key].dtype == np.uint8
    assert hashlib.sha256(arrays[key].tobytes()).hexdigest() == SHA256[key]


@pytest.mark.parametrize(("part", "per_class"), [("train", 200), ("test", 100)])
def test_classes_are_balanced(arrays: dict[str, np.ndarray], part: str, per_class: int) -> None:
    assert arrays[f"{part}_images"].shape == (10 * per_class, 28, 28)
    assert np.bincount(arrays[f"{part}_labels"]).tolist() == [per_class] * 10


def test_no_image_is_in_both_parts(arrays: dict[str, np.ndarray]) -> None:
    train, test = ({a.tobytes() for a in arrays[f"{part}_images"]} for part in ("train", "test"))
    assert train.isdisjoint(test)


def test_the_notice_goes_with_the_data() -> None:
    assert "2017 Zalando SE" in (DATA / "LICENSE-fashion-mnist").read_text(encoding="utf-8")

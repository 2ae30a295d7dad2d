"""Small packed datasets of synthetic images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from mmlong.datamodules.pack import pack_images
from mmlong.datamodules.packed import PackedDataset
from mmlong.datamodules.sources import ImageSource, Item
from PIL import Image


def picture(seed: int, height: int = 8, width: int = 8, channels: int = 1) -> Image.Image:
    """Random pixels."""
    shape = (height, width) if channels == 1 else (height, width, channels)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def synthetic(count: int, classes: int = 3, **options: int) -> ImageSource:
    """A source of ``count`` random images, labelled in turn."""
    items = [
        Item(f"made/{number}.png", {"label": number % classes}, partial(picture, number, **options))
        for number in range(count)
    ]
    names = tuple(f"class {number}" for number in range(classes))
    return ImageSource("synthetic", "made up", "none needed", {"label": names}, "label", items)


@pytest.fixture
def make_packed(tmp_path: Path) -> Callable[..., PackedDataset]:
    """Pack a synthetic dataset: ``make_packed(count, val=.., test=.., shard_bytes=..)``."""

    def make(count: int = 23, val: int = 5, test: int = 7, shard_bytes: int = 6000, **options: int) -> PackedDataset:
        out = tmp_path / "packed"
        return pack_images(synthetic(count, **options), out, splits={"val": val, "test": test}, shard_bytes=shard_bytes)

    return make

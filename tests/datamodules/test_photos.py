"""Photographs: what is held out stays apart, every photograph is everywhere, and crops are a function of seed and side."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmlong.datamodules import photos
from mmlong.datamodules.errors import DataError
from mmlong.datamodules.images import ImageDataModule, pack_known
from mmlong.datamodules.known_images import KNOWN
from mmlong.datamodules.photos import LARGEST, PHOTOS, held_out, load, places
from mmlong.experiments.floors import lossless_images
from PIL import Image

needs_photos = pytest.mark.skipif(find_spec("skimage") is None, reason=f"needs scikit-image: {photos.INSTALL}")


@settings(deadline=None, max_examples=12)
@given(st.sampled_from(sorted(PHOTOS)), st.integers(8, LARGEST), st.integers(0, 9))
def test_no_pixel_is_in_training_and_held_out(name: str, side: int, seed: int) -> None:
    (width, height), edge = PHOTOS[name].size, held_out(name, side)
    found = places(name, side, seed)
    held = np.zeros((height, width), np.int64)
    for split, left, top in found:
        assert left >= 0
        assert top >= 0
        assert left + side <= width
        assert top + side <= height
        assert (left + side <= edge) if split == "train" else (left >= edge)
        if split != "train":
            held[top : top + side, left : left + side] += 1
    assert held.max() == 1, "held-out crops do not overlap"
    assert {"train", "test"} <= {split for split, *_ in found}
    assert len({(left, top) for _, left, top in found}) == len(found)
    assert found == places(name, side, seed), "a function of seed, photograph and side"


COFFEE_64 = [("test", 450, 0), ("val", 514, 0), ("test", 450, 64), ("train", 157, 5)]


def test_places_never_change() -> None:
    """Results compare only on the same crops."""
    assert places("coffee", 64)[:3] == COFFEE_64[:3]
    assert places("coffee", 64)[-1] == COFFEE_64[-1]
    assert places("coffee", 64, seed=1)[-1] != COFFEE_64[-1]
    counts = {name: len([p for p in places(name, 256) if p[0] == "train"]) for name in PHOTOS}
    assert set(counts.values()) == {64}


@pytest.mark.parametrize("side", [0, 257])
def test_other_sides_are_refused(side: int) -> None:
    with pytest.raises(ValueError, match=f"side of 1 to 256, got {side}"):
        load(side)
    with pytest.raises(ValueError, match="square, got 64x32"):
        KNOWN["photos"].load((64, 32))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two photographs of noise in place of the six, with a colour profile."""
    import hashlib

    made = {}
    for name, size in (("astronaut", (40, 30)), ("coffee", (50, 24))):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (*size[::-1], 3), np.uint8)
        file = tmp_path / f"{name}.png"
        Image.fromarray(pixels).save(file, icc_profile=bytes(3000))
        made[name] = photos.Photo(file.name, size, hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(photos, "PHOTOS", made)
    monkeypatch.setattr(photos, "TRAIN_PIXELS", 8 * 64)
    monkeypatch.setattr(photos, "package_folder", lambda *named: tmp_path)
    (tmp_path / "data").symlink_to(tmp_path)
    return tmp_path


def test_crops_are_what_the_photograph_has_there(small: Path) -> None:
    source = load(8, small)
    assert sorted({item.split for item in source.items}) == ["test", "train", "val"]
    for item in source.items:
        name, left, top = source.labels["photograph"][item.labels["photograph"]], item.extra["left"], item.extra["top"]
        whole = np.asarray(Image.open(small / f"{name}.png"))
        assert np.array_equal(np.asarray(item.open()), whole[top : top + 8, left : left + 8])


def test_floors_count_pixels_only(small: Path) -> None:
    """Noise cannot be compressed, and a colour profile is no pixel."""
    found = lossless_images.bits_per_dimension(8)
    assert set(found["PNG"]) == {"all", "astronaut", "coffee"}
    raw, header = 8 * 8 * 3, 100
    assert 8 < found["PNG"]["all"] < 8 * (raw + header) / raw


def test_another_file_is_refused(small: Path) -> None:
    with (small / "coffee.png").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"coffee.png: is not the published file .*pip install --no-deps scikit-image"):
        load(8, small)
    (small / "coffee.png").unlink()
    with pytest.raises(DataError, match=r"coffee.png: is missing; install scikit-image again"):
        load(8, small)


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmlong.datamodules.sources.find_spec", lambda name: None)
    with pytest.raises(DataError, match="scikit-image: .*not installed: pip install --no-deps scikit-image"):
        load(64)


def test_packed_and_read(small: Path, tmp_path: Path) -> None:
    dataset = pack_known("photos", tmp_path / "out", 8)
    assert dataset.manifest["image"]["channels"] == 3
    module = ImageDataModule(str(tmp_path / "out"), batch_size=4)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert batch["raw"].shape == (4, 3, 8, 8)
    assert sum(1 for _ in module.test_dataloader()) > 0
    packed = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*.tar"))
    assert b"iCCP" not in packed, "a colour profile is in every crop"


@needs_photos
def test_the_published_photographs() -> None:
    source = load(64)
    for name, photo in PHOTOS.items():
        item = next(i for i in source.items if i.name.startswith(name))
        assert item.open().size == (64, 64)
        assert (
            photos._photograph(photos.package_folder("skimage", "scikit-image") / "data" / photo.file).size
            == photo.size
        )
    assert {split: sum(i.split == split for i in source.items) for split in ("test", "val")} == {"test": 36, "val": 36}

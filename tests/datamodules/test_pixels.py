"""The conversion rule, each row of its table."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from mmlong.datamodules.errors import BadSampleError
from mmlong.datamodules.pixels import encode_png, fit_image, open_image, to_pixels
from PIL import Image


def through(image: Image.Image, kind: str = "PNG", **options: object) -> Image.Image:
    """Save and open again."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return open_image(file)


def pixels(image: Image.Image, channels: int) -> np.ndarray:
    return np.asarray(to_pixels(image, channels, "x.png"))


def test_grey_and_rgb_are_kept() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(pixels(through(Image.fromarray(grey)), 1), grey)
    rgb = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    assert np.array_equal(pixels(through(Image.fromarray(rgb)), 3), rgb)
    assert np.array_equal(pixels(through(Image.fromarray(grey)), 3)[..., 2], grey)


def test_one_bit() -> None:
    assert pixels(through(Image.fromarray(np.array([[True, False]]))), 1).tolist() == [[255, 0]]


def test_sixteen_bits_are_scaled_by_their_full_range() -> None:
    wide = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    image = through(Image.fromarray(wide))
    assert image.mode.startswith("I;16")
    assert pixels(image, 1).tolist() == [[0, 0, 1, 1, 128, 255]]
    assert pixels(through(Image.fromarray(wide), "TIFF"), 1).tolist() == [[0, 0, 1, 1, 128, 255]]


def test_palette_is_looked_up() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert pixels(through(image), 3).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    clear = through(image, transparency=1)
    assert pixels(clear, 3).tolist() == [[[10, 20, 30], [0, 0, 0]]]


def test_alpha_is_composited_over_black() -> None:
    rgba = np.array([[[100, 200, 50, 255], [100, 200, 50, 0], [100, 200, 50, 51]]], np.uint8)
    assert pixels(through(Image.fromarray(rgba)), 3).tolist() == [[[100, 200, 50], [0, 0, 0], [20, 40, 10]]]
    la = np.array([[[100, 255], [100, 0]]], np.uint8)
    assert pixels(through(Image.fromarray(la, "LA") if False else Image.merge("LA", [Image.fromarray(la[..., 0]), Image.fromarray(la[..., 1])])), 1).tolist() == [[100, 0]]  # fmt: skip


def test_orientation_is_applied() -> None:
    image = Image.fromarray(np.array([[1, 2]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    assert pixels(through(image, "TIFF", exif=exif), 1).shape == (2, 1)


@pytest.mark.parametrize("mode", ["CMYK", "F", "I", "LAB"])
def test_refused_modes(mode: str) -> None:
    image = through(Image.new(mode, (3, 2)), "TIFF")
    with pytest.raises(BadSampleError, match=rf"x.png: is of mode {mode}, which is refused"):
        to_pixels(image, 3, "x.png")


def test_several_frames_are_refused() -> None:
    frames = [Image.new("L", (2, 2), shade) for shade in (0, 255)]
    image = through(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(BadSampleError, match="has 2 frames"):
        to_pixels(image, 1, "x.png")


@pytest.mark.parametrize("cut", [60, 200, -200])
def test_damage_is_refused(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "x.png"
    data = encode_png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)))
    file.write_bytes(data[:cut])
    with open_image(file) as image, pytest.raises(BadSampleError, match=r"x.png: cannot be decoded"):
        to_pixels(image, 1, file)


def test_fits() -> None:
    image = Image.fromarray(np.repeat(np.arange(0, 240, 10, dtype=np.uint8)[None], 8, 0))  # 24 wide, 8 high
    assert {fit_image(image, 8, 8, fit).size for fit in ("crop", "pad", "stretch")} == {(8, 8)}
    assert np.asarray(fit_image(image, 8, 8, "crop")).tolist() == np.asarray(image)[:, 8:16].tolist()
    padded = np.asarray(fit_image(image, 24, 24, "pad"))
    assert np.array_equal(padded[8:16], np.asarray(image))
    assert padded[:8].max() == padded[16:].max() == 0
    assert fit_image(image, 8, 24, "crop") is image


def test_downsizing_is_antialiased() -> None:
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32)))  # 1-pixel stripes: grey from afar
    small = np.asarray(fit_image(stripes, 16, 16, "stretch"))[:, 2:-2]
    assert np.abs(small.astype(int) - 127).max() < 12

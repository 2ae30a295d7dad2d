"""One rule for turning any image file into the 8-bit grey or RGB square (or rectangle) that is packed.

========================== =====================================================================================
what it is                 what happens
========================== =====================================================================================
8-bit grey, RGB            kept
1 bit                      0 and 255
16-bit grey                the full range is scaled to 8 bits: ``round(value / 257)``
16-bit colour              the high byte (as Pillow reads it)
palette                    looked up: RGB
alpha (or a palette's      composited over black
transparent entry)
EXIF orientation           applied
CMYK, YCCK, Lab, 32-bit    refused: what they look like depends on a profile or a range the file may not tell
integer or float
several frames             refused
========================== =====================================================================================

Grey from colour is ITU-R 601-2 luma. Resizing is bicubic with antialiasing, once, at packing.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import BadSampleError

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".gif"})
FITS = ("crop", "stretch", "pad")
GREY_MODES = frozenset({"1", "L", "LA", "La", "I;16", "I;16B", "I;16L"})
_ALPHA = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
# What Pillow raises on a damaged file, by experience and by its source.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    zlib.error,
    struct.error,
    Image.DecompressionBombError,
)


def open_image(file: Path | io.BytesIO) -> Image.Image:
    """Open an image file of one of `FORMATS`; only its header is read yet."""
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        if isinstance(file, Path) and not file.stat().st_size:
            raise UnidentifiedImageError("it is an empty file") from error
        raise UnidentifiedImageError(f"it is in no format that is read ({', '.join(FORMATS)})") from error


def to_pixels(image: Image.Image, channels: int, name: str | Path) -> Image.Image:
    """An image as mode ``L`` (1 channel) or ``RGB`` (3) by the module's rule.

    Args:
        image: as opened; decoded here.
        channels: 1 or 3.
        name: the file, for errors.

    Raises:
        BadSampleError: it is damaged, or of a kind that is refused.
    """
    try:
        if getattr(image, "n_frames", 1) > 1:
            raise BadSampleError(name, f"has {image.n_frames} frames; give one image a file")  # type: ignore[attr-defined]
        image.load()
        image = ImageOps.exif_transpose(image)
    except DECODE_ERRORS as error:
        if isinstance(error, BadSampleError):
            raise
        raise BadSampleError(name, f"cannot be decoded: {error}") from error
    mode = image.mode
    if mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    elif mode in _ALPHA or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    elif mode not in {"1", "L", "P", "RGB"}:
        raise BadSampleError(name, f"is of mode {mode}, which is refused; convert it to 8-bit grey or RGB first")
    if image.mode == "P":
        image = image.convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")


def fit_image(image: Image.Image, height: int, width: int, fit: str) -> Image.Image:
    """Resize to ``width`` x ``height``, antialiased.

    ``fit`` says what to do where the shape differs: ``crop`` fills the frame and cuts what stands over on both sides,
    ``pad`` shows everything on black, ``stretch`` changes the shape.
    """
    if image.size == (width, height):
        return image
    method = Image.Resampling.BICUBIC
    if fit == "crop":
        return ImageOps.fit(image, (width, height), method)
    if fit == "pad":
        return ImageOps.pad(image, (width, height), method)
    return image.resize((width, height), method)


def encode_png(image: Image.Image) -> bytes:
    """PNG bytes: the same for the same pixels with the same Pillow."""
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=6, icc_profile=None)  # it is not applied, so it is not kept
    return out.getvalue()

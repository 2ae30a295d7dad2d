"""The floor of ``image/photo_ar``: bits per dimension of lossless image files, on the very crops that the recipe is tested on.

    python -m mmlong.experiments.floors.lossless_images --size 64
    python -m mmlong.experiments.floors.lossless_images --size 256

One file a crop, all of its bytes counted, as a person would store it: PNG by Pillow with ``optimize`` (all filters are tried row by row, zlib at its highest level), and WebP
lossless at its greatest effort. A dimension is one byte of one channel of one pixel.
"""

from __future__ import annotations

import argparse
import io
from collections import defaultdict
from collections.abc import Callable

from mmlong.datamodules.photos import load
from PIL import Image


def _file(image: Image.Image, **options: object) -> int:
    out = io.BytesIO()
    image.save(out, **options)  # type: ignore[arg-type]
    return out.tell()


FORMATS: dict[str, Callable[[Image.Image], int]] = {
    "PNG": lambda image: _file(image, format="PNG", optimize=True),
    "WebP lossless": lambda image: _file(image, format="WEBP", lossless=True, quality=100, method=6, exact=True),
}


def bits_per_dimension(side: int, split: str = "test") -> dict[str, dict[str, float]]:
    """By format, the bits per dimension of all crops of a split together (``all``), and of those of each photograph."""
    source = load(side)
    names = source.labels["photograph"]
    size: dict[str, dict[str, int]] = {name: defaultdict(int) for name in FORMATS}
    count: dict[str, int] = defaultdict(int)
    for item in source.items:
        if item.split != split:
            continue
        image = item.open()
        for group in ("all", names[item.labels["photograph"]]):
            count[group] += image.width * image.height * len(image.getbands())
            for name, measure in FORMATS.items():
                size[name][group] += measure(image)
    return {name: {group: 8 * total / count[group] for group, total in sizes.items()} for name, sizes in size.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=64, help="side of a crop")
    parser.add_argument("--split", default="test", choices=("test", "val"))
    args = parser.parse_args()
    found = bits_per_dimension(args.size, args.split)
    groups = list(next(iter(found.values())))
    print(f"bits per dimension, {args.split} crops of {args.size} px")
    print(f"{'':14}" + "".join(f"{group:>12}" for group in groups))
    for name, values in found.items():
        print(f"{name:14}" + "".join(f"{values[group]:12.3f}" for group in groups))


if __name__ == "__main__":
    main()

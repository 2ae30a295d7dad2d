"""Packing a source of images: split, convert, resize, write."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .errors import BadSampleError, DataError, PackError, Skipped
from .packed import PackedDataset
from .pixels import DECODE_ERRORS, FITS, GREY_MODES, encode_png, fit_image, to_pixels
from .shards import DatasetWriter
from .sources import ImageSource, Item
from .splits import DEFAULT_SPLITS, check_items, class_counts, sample_json, split_items

Progress = Callable[[int, int], None]


def pack_images(
    source: ImageSource,
    out: str | Path,
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    fit: str = "crop",
    splits: Mapping[str, float] | None = None,
    seed: int = 0,
    shard_bytes: int = 32 << 20,
    overwrite: bool = False,
    on_bad: str = "stop",
    progress: Progress | None = None,
) -> PackedDataset:
    """Pack a source of images into ``out``.

    Args:
        source: the images.
        out: the folder to make; see `DatasetWriter`.
        size: side, or (height, width), to resize to. Without it all images must have one size already.
        channels: 1 or 3. Without it 1 if every image is grey, else 3.
        fit: ``crop``, ``pad`` or ``stretch``, where the shape differs.
        splits: see `split_items`; a tenth each for ``val`` and ``test`` if not given.
        seed: of the splits and of the order in shards.
        shard_bytes, overwrite: see `DatasetWriter`.
        on_bad: an image that cannot be listed or decoded: ``"stop"`` with its error, or ``"skip"`` it: it is named in the log,
            and counted and named in ``dataset.json``.
        progress: called with (done, in all).

    Returns:
        The packed dataset, opened.

    Raises:
        BadSampleError: an image is damaged, refused, or of another size and no ``size`` was given.
        DataError: an unknown label.
        PackError: there is nothing to pack, or it cannot be written.
        ValueError: an argument makes no sense.
    """
    if fit not in FITS:
        raise ValueError(f"fit is {fit!r}; it can be {', '.join(FITS)}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels is {channels}; it can be 1 (grey) or 3 (RGB)")
    skipped = Skipped(on_bad)
    skipped.met(source.faults)
    if not source.items:
        raise PackError(out, skipped.nothing_left() if skipped.said else f"no images in {source.source}")
    check_items(source.source, source.items, source.labels)
    if size is None or channels is None:
        found_size, found_channels = _survey(source.items, size is not None, skipped.stops)
        size, channels = size or found_size, channels or found_channels
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size is {size}; it must be at least 1")
    parts = split_items(source.items, DEFAULT_SPLITS if splits is None else splits, seed)
    if not parts.get("train"):
        raise PackError(out, skipped.nothing_left())
    about = _about(source, height, width, channels, fit, seed)
    packed: dict[str, list[Item]] = {split: [] for split in parts}
    total = sum(len(part) for part in parts.values())
    jobs = ((split, item) for split, part in parts.items() for item in part)
    with DatasetWriter(out, about, shard_bytes, overwrite) as writer:
        for done, (split, item, png) in enumerate(_encoded(jobs, height, width, channels, fit)):
            if isinstance(png, DataError):
                skipped.met([png])
            else:
                writer.add(split, f"{done:06d}", {"png": png, "json": sample_json(item, source.labels)}, item.labels)
                packed[split].append(item)
            if progress is not None:
                progress(done + 1, total)
        if not packed["train"]:
            raise PackError(out, skipped.nothing_left())
        writer.about |= {"counts": class_counts(packed, source.labels), **skipped.about()}
    return PackedDataset(out)


def _survey(items: Sequence[Item], any_size: bool, stops: bool) -> tuple[tuple[int, int], int]:
    """(height, width) and channels of images that must agree, from their headers alone; images that have none are met again."""
    first: tuple[tuple[int, int], str] | None = None
    grey = True
    for item in items:
        try:
            with item.open() as image:
                shape, mode = (image.height, image.width), image.mode
        except DECODE_ERRORS as error:
            if not stops:
                continue
            raise BadSampleError(item.name, f"cannot be opened as an image: {error}") from error
        grey &= mode in GREY_MODES
        first = first or (shape, item.name)
        if shape != first[0] and not any_size:
            raise BadSampleError(
                item.name, f"is {shape[1]}x{shape[0]} and {first[1]} is {first[0][1]}x{first[0][0]}; "
                "give a --size to resize all of them to"
            )  # fmt: skip
    if first is None:
        raise BadSampleError(items[0].name, "cannot be opened as an image, and neither can any other")
    return first[0], 1 if grey else 3


def _about(
    source: ImageSource, height: int, width: int, channels: int, fit: str, seed: int
) -> dict[str, Any]:  # fmt: skip
    return {
        "name": source.name, "modality": "image", "source": source.source, "licence": source.licence,
        "default_label": source.default_label, "labels": {field: list(names) for field, names in source.labels.items()},
        "seed": seed,
        "image": {"channels": channels, "height": height, "width": width, "fit": fit, "filter": "bicubic, antialiased"},
    }  # fmt: skip


def _encode(item: Item, height: int, width: int, channels: int, fit: str) -> bytes | DataError:
    try:
        image = item.open()
        return encode_png(fit_image(to_pixels(image, channels, item.name), height, width, fit))
    except DataError as error:
        return error
    except DECODE_ERRORS as error:
        return BadSampleError(item.name, f"cannot be opened as an image: {error}")


def _encoded(
    jobs: Iterable[tuple[str, Item]], height: int, width: int, channels: int, fit: str
) -> Iterator[tuple[str, Item, bytes | DataError]]:  # fmt: skip
    """Images as PNG bytes, or what is wrong with them, in order, encoded by a few threads (Pillow lets go of the interpreter while it works)."""
    threads = min(8, os.cpu_count() or 1)
    waiting: deque[tuple[str, Item, Future[bytes | DataError]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for split, item in jobs:
                waiting.append((split, item, pool.submit(_encode, item, height, width, channels, fit)))
                if len(waiting) > 4 * threads:
                    split, item, future = waiting.popleft()
                    yield split, item, future.result()
            while waiting:
                split, item, future = waiting.popleft()
                yield split, item, future.result()
        finally:
            for *_, future in waiting:
                future.cancel()

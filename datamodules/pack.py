"""Packing a source of images: split, convert, resize, write. The whole of ``mmlong pack`` but its command line.

Splits are stratified by all labels together and are a pure function of the seed and the items' names and labels, so
packing again gives the same test set. Within a split samples are shuffled, so that a shard is a fair part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .errors import BadSampleError, DataError, PackError
from .packed import PackedDataset
from .pixels import DECODE_ERRORS, FITS, GREY_MODES, encode_png, fit_image, to_pixels
from .shards import DatasetWriter
from .sources import ImageSource, Item

Progress = Callable[[int, int], None]


def split_items(items: Sequence[Item], splits: Mapping[str, float], seed: int) -> dict[str, list[Item]]:
    """Divide items into splits.

    Args:
        items: with a ``split`` of their own, they go there; the others are divided.
        splits: by name, how many samples (1 or more) or which share of them (below 1); ``train`` takes the rest. A
            split that items name themselves is left to them.
        seed: of the division.

    Returns:
        By split, the items in packing order. ``train`` comes first.

    Raises:
        ValueError: more is asked for than there is.
    """
    own = {item.split for item in items if item.split is not None}
    loose = [item for item in items if item.split is None]
    chosen: dict[str, list[Item]] = {"train": []}
    for name in own:
        chosen.setdefault(name, []).extend(item for item in items if item.split == name)
    asked = {
        name: round(share * len(loose)) if share < 1 else int(share)
        for name, share in splits.items()
        if name != "train" and name not in own
    }
    if sum(asked.values()) > len(loose):
        raise ValueError(f"the splits {dict(splits)} ask for {sum(asked.values())} of {len(loose)} samples")
    left = sorted(loose, key=lambda item: _lot(seed, "split", item.name))
    for name, count in asked.items():
        taken = _stratified(left, count)
        chosen[name] = [item for place, item in enumerate(left) if place in taken]
        left = [item for place, item in enumerate(left) if place not in taken]
    chosen["train"].extend(left)
    return {
        name: sorted(part, key=lambda item: _lot(seed, "order", item.name)) for name, part in chosen.items() if part
    }  # fmt: skip


def _lot(seed: int, what: str, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{what}/{name}".encode()).digest()


def _stratified(items: Sequence[Item], count: int) -> set[int]:
    """Places of ``count`` items, each combination of labels in proportion (largest remainders)."""
    strata: dict[tuple[tuple[str, int], ...], list[int]] = defaultdict(list)
    for place, item in enumerate(items):
        strata[tuple(sorted(item.labels.items()))].append(place)
    exact = {labels: count * len(places) / len(items) for labels, places in strata.items()} if items else {}
    shares = {labels: int(share) for labels, share in exact.items()}
    by_remainder = sorted(exact, key=lambda labels: (shares[labels] - exact[labels], labels))
    for labels in by_remainder[: count - sum(shares.values())]:
        shares[labels] += 1
    return {place for labels, share in shares.items() for place in strata[labels][:share]}


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
    if not source.items:
        raise PackError(out, f"no images in {source.source}")
    _check_labels(source)
    if size is None or channels is None:
        found_size, found_channels = _survey(source.items, size is not None)
        size, channels = size or found_size, channels or found_channels
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size is {size}; it must be at least 1")
    parts = split_items(source.items, splits if splits is not None else {"val": 0.1, "test": 0.1}, seed)
    if not parts.get("train"):
        raise PackError(out, "nothing is left for training; ask for smaller splits")
    about = _about(source, parts, height, width, channels, fit, seed)
    total = sum(len(part) for part in parts.values())
    jobs = ((split, item) for split, part in parts.items() for item in part)
    with DatasetWriter(out, about, shard_bytes, overwrite) as writer:
        for done, (split, item, png) in enumerate(_encoded(jobs, height, width, channels, fit)):
            names = {f"{field}_name": source.labels[field][value] for field, value in item.labels.items()}
            record = {"file": item.name, **item.labels, **names, **item.extra, **item.labels}
            data = json.dumps(record, separators=(",", ":")).encode()
            writer.add(split, f"{done:06d}", {"png": png, "json": data}, item.labels)
            if progress is not None:
                progress(done + 1, total)
    return PackedDataset(out)


def _check_labels(source: ImageSource) -> None:
    names: set[str] = set()
    for item in source.items:
        if item.name in names:
            raise DataError(source.source, "comes twice", item.name)
        names.add(item.name)
        for label, classes in source.labels.items():
            value = item.labels.get(label)
            if value is None:
                raise DataError(source.source, f"the label {label!r} is missing", item.name)
            if not 0 <= value < len(classes):
                raise DataError(
                    source.source, f"unknown label {label} = {value}; there are {len(classes)} classes", item.name
                )


def _survey(items: Sequence[Item], any_size: bool) -> tuple[tuple[int, int], int]:
    """(height, width) and channels of images that must agree, from their headers alone."""
    first: tuple[tuple[int, int], str] | None = None
    grey = True
    for item in items:
        try:
            with item.open() as image:
                shape, mode = (image.height, image.width), image.mode
        except DECODE_ERRORS as error:
            raise BadSampleError(item.name, f"cannot be opened as an image: {error}") from error
        grey &= mode in GREY_MODES
        first = first or (shape, item.name)
        if shape != first[0] and not any_size:
            raise BadSampleError(
                item.name, f"is {shape[1]}x{shape[0]} and {first[1]} is {first[0][1]}x{first[0][0]}; "
                "give a --size to resize all of them to"
            )  # fmt: skip
    if first is None:
        raise ValueError("no items")
    return first[0], 1 if grey else 3


def _about(
    source: ImageSource, parts: Mapping[str, Sequence[Item]], height: int, width: int, channels: int, fit: str, seed: int
) -> dict[str, Any]:  # fmt: skip
    counts = {
        field: {
            split: [sum(item.labels[field] == number for item in part) for number in range(len(classes))]
            for split, part in parts.items()
        }
        for field, classes in source.labels.items()
    }
    return {
        "name": source.name, "modality": "image", "source": source.source, "licence": source.licence,
        "default_label": source.default_label, "labels": {field: list(names) for field, names in source.labels.items()},
        "counts": counts, "seed": seed,
        "image": {"channels": channels, "height": height, "width": width, "fit": fit, "filter": "bicubic, antialiased"},
    }  # fmt: skip


def _encode(item: Item, height: int, width: int, channels: int, fit: str) -> bytes:
    try:
        image = item.open()
    except DECODE_ERRORS as error:
        raise BadSampleError(item.name, f"cannot be opened as an image: {error}") from error
    return encode_png(fit_image(to_pixels(image, channels, item.name), height, width, fit))


def _encoded(
    jobs: Iterable[tuple[str, Item]], height: int, width: int, channels: int, fit: str
) -> Iterator[tuple[str, Item, bytes]]:  # fmt: skip
    """Images as PNG bytes, in order, encoded by a few threads (Pillow lets go of the interpreter while it works)."""
    threads = min(8, os.cpu_count() or 1)
    waiting: deque[tuple[str, Item, Future[bytes]]] = deque()
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

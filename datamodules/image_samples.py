"""Packed images to batches: decode, augment, stack.

A batch is a dict, so that Lightning can move it to a device::

    raw     uint8   (B, C, H, W)   raw values; scaling is the modality's business
    label   int64   (B,)           class id of the chosen label field, where there is one
    index   int64   (B,)           sample id within the split
    weight  float32 (B,)           1, or 0 for a filler of evaluation and for a skipped sample: not to be counted
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .augment import Augment
from .cache import SharedCache
from .errors import BadSampleError, DataError
from .indexed import IndexedReader
from .loader import Batch, Place
from .packed import PackedDataset
from .pixels import DECODE_ERRORS


def decode_png(data: bytes, shape: tuple[int, int, int], shard: Path | str, member: str) -> np.ndarray:
    """A packed PNG as ``(C, H, W)`` uint8.

    Raises:
        BadSampleError: it cannot be decoded, or is not 8-bit grey or RGB of the dataset's size.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            mode, size = image.mode, image.size
            pixels = np.asarray(image) if mode in ("L", "RGB") else None
    except DECODE_ERRORS as error:
        raise BadSampleError(shard, f"cannot be decoded as PNG: {error}", member) from error
    channels, height, width = shape
    if pixels is None or size != (width, height) or (mode == "L") != (channels == 1):
        raise BadSampleError(
            shard, f"is {size[0]}x{size[1]} of mode {mode}; the dataset holds {width}x{height} of mode "
            f"{'L' if channels == 1 else 'RGB'}", member,
        )  # fmt: skip
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


class ImageSamples:
    """The images of one split.

    Args:
        dataset: the packed dataset.
        split: which split.
        label: which label field; ``None``: no labels.
        augment: changes to make, or ``None``.
        on_bad: ``"stop"`` or ``"skip"``.
        cache: keep decoded images in memory.
    """

    def __init__(
        self, dataset: PackedDataset, split: str, label: str | None, augment: Augment | None, on_bad: str, cache: bool
    ) -> None:
        self.split = dataset.split(split)
        self.reader = IndexedReader(self.split)
        self.label = label
        self.classes = 0 if label is None else len(dataset.classes(label))
        self.labels = None if label is None else self.split.labels[label]
        image = dataset.manifest["image"]
        self.shape = (image["channels"], image["height"], image["width"])
        self.augment = augment
        self.on_bad = on_bad
        self.cache = SharedCache([int(np.prod(self.shape))] * len(self.split)) if cache else None
        self._ids: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self.split)

    def image(self, sample: int, epoch: int = 0) -> np.ndarray:
        """One image as packed, in every epoch the same: ``(C, H, W)`` uint8, not to be written to.

        Raises:
            BadSampleError: it is damaged.
        """
        if self.cache is not None and (kept := self.cache.get(sample)) is not None:
            return kept.reshape(self.shape)
        pixels = decode_png(self.reader.read(sample, "png"), self.shape, *self.reader.place(sample, "png"))
        if self.cache is not None:
            self.cache.put(sample, pixels)
        return pixels

    def fetch(self, places: list[Place]) -> tuple[Batch, list[DataError]]:
        """The batch at ``places`` and what was skipped in it. See `mmlong.datamodules.loader`."""
        rows: list[tuple[np.ndarray | None, int, int, float]] = []
        problems: list[DataError] = []
        for epoch, sample, weight in places:
            try:
                pixels: np.ndarray | None = self._augmented(self.image(sample, epoch), epoch, sample)
            except BadSampleError as error:
                problems.append(self._skip(error))
                pixels, weight = None, 0.0
            rows.append((pixels, 0 if self.labels is None else int(self.labels[sample]), sample, weight))
        return self._stack(rows), problems

    def fetch_members(self, epoch: int, raw: Sequence[dict[str, Any]]) -> tuple[Batch, list[DataError]]:
        """A batch from samples as webdataset yields them (``__key__``, ``__url__``, members by extension)."""
        if self._ids is None:
            self._ids = {key: place for place, key in enumerate(self.split.keys)}
        rows: list[tuple[np.ndarray | None, int, int, float]] = []
        problems: list[DataError] = []
        for members in raw:
            key, shard = members["__key__"], members["__url__"]
            sample, label = self._ids.get(key, -1), 0
            try:
                if sample < 0:
                    raise BadSampleError(shard, "is not in the index; it is stale", key)
                label = self._streamed_label(members, shard, key)
                decoded = decode_png(self._member(members, "png"), self.shape, shard, f"{key}.png")
                pixels: np.ndarray | None = self._augmented(decoded, epoch, sample)
                weight = 1.0
            except BadSampleError as error:
                problems.append(self._skip(error))
                pixels, weight = None, 0.0
            rows.append((pixels, label, max(sample, 0), weight))
        return self._stack(rows), problems

    @staticmethod
    def _member(members: dict[str, Any], extension: str) -> bytes:
        if extension not in members:
            raise BadSampleError(members["__url__"], "is missing from the shard", f"{members['__key__']}.{extension}")
        return members[extension]

    def _streamed_label(self, members: dict[str, Any], shard: str, key: str) -> int:
        if self.label is None:
            return 0
        try:
            label = json.loads(self._member(members, "json"))[self.label]
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, BadSampleError):
                raise
            raise BadSampleError(shard, f"the label {self.label!r} is missing", f"{key}.json") from error
        if not isinstance(label, int) or not 0 <= label < self.classes:
            raise BadSampleError(shard, f"unknown label {self.label} = {label!r}", f"{key}.json")
        return label

    def _augmented(self, pixels: np.ndarray, epoch: int, sample: int) -> np.ndarray:
        return pixels if self.augment is None else self.augment(pixels, epoch, sample)

    def _skip(self, error: BadSampleError) -> BadSampleError:
        if self.on_bad == "stop":
            raise error
        return error

    def _stack(self, rows: list[tuple[np.ndarray | None, int, int, float]]) -> Batch:
        images = np.zeros((len(rows), *self.shape), np.uint8)
        for row, (pixels, *_) in zip(images, rows, strict=True):
            if pixels is not None:
                row[...] = pixels
        batch = {
            "raw": torch.from_numpy(images),
            "label": torch.tensor([label for _, label, _, _ in rows], dtype=torch.int64),
            "index": torch.tensor([sample for _, _, sample, _ in rows], dtype=torch.int64),
            "weight": torch.tensor([weight for *_, weight in rows], dtype=torch.float32),
        }
        if self.label is None:
            del batch["label"]
        return batch

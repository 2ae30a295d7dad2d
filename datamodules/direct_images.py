"""`DirectImageDataModule`: labelled images that are drawn, or read from their own files, one by one; nothing is packed.

For generated pictures, and for files that are their benchmark's own format. What a subclass gives is a `DirectImages`; everything else, order, resuming, augmentation, caching, is what packed images have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .augment import Augment
from .base import PackedDataModule, Progress
from .cache import SharedCache
from .errors import DataError
from .image_samples import ImageSamples


@dataclass(frozen=True)
class Facts:
    """What is true of such images before any is read.

    Attributes:
        labels: class names by label field.
        source, licence: for people to read.
    """

    labels: Mapping[str, tuple[str, ...]]
    source: str
    licence: str


@dataclass(frozen=True)
class DirectSplit:
    """The labels of a split.

    Attributes:
        labels: by field, int64 ``(N,)``.
    """

    labels: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.labels.values())))

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """One part."""
        return (len(self),)


class DirectImages:
    """Images by split and place. A subclass gives `split` and `image`.

    Args:
        shape: (channels, height, width) of all.
        splits: their names.
        fingerprint: names exactly these images: what is resumed must be the same.
    """

    def __init__(self, shape: tuple[int, int, int], splits: Sequence[str], fingerprint: str) -> None:
        self.shape, self.splits, self.fingerprint = shape, tuple(splits), fingerprint

    def split(self, name: str) -> DirectSplit:
        """The labels of a split."""
        raise TypeError(f"{type(self).__name__} does not define split(name)")

    def image(self, split: str, place: int, variant: int = 0) -> np.ndarray:
        """uint8 ``shape``. Raises ``BadSampleError`` where it cannot be read."""
        raise TypeError(f"{type(self).__name__} does not define image(split, place)")

    def variants(self, split: str) -> int:
        """How many images a place has, of which an epoch shows one."""
        return 1

    def variant(self, split: str, epoch: int, place: int) -> int:
        """Which image of a place an epoch shows: a pure function."""
        return 0


class DirectSamples(ImageSamples):
    """The images of one split.

    Args:
        images: of all splits.
        split: which.
        label: which field.
        augment: changes to make, or ``None``.
        on_bad: ``"stop"`` or ``"skip"``.
        cache: keep the images in memory.
    """

    def __init__(
        self, images: DirectImages, split: str, label: str, augment: Augment | None, on_bad: str, cache: bool
    ) -> None:
        self.images, self.name, self.label = images, split, label
        self.shape, self.augment, self.on_bad = images.shape, augment, on_bad
        self.labels = images.split(split).labels[label]
        kept = images.variants(split) * len(self.labels)
        self.cache = SharedCache([int(np.prod(self.shape))] * kept) if cache else None

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, sample: int, epoch: int = 0) -> np.ndarray:
        """One image: ``(C, H, W)`` uint8, not to be written to."""
        variant = self.images.variant(self.name, epoch, sample)
        place = variant * len(self) + sample
        if self.cache is not None and (kept := self.cache.get(place)) is not None:
            return kept.reshape(self.shape)
        pixels = self.images.image(self.name, sample, variant)
        if self.cache is not None:
            self.cache.put(place, pixels)
        return pixels


class DirectImageDataModule(PackedDataModule):
    """Base of the datamodules of such images.

    Args:
        name: of the data.
        facts: of the data.
        shape: (channels, height, width).
        source_path: the user's files, if there are any.
        augment, cache, batch_size, num_workers, seed, on_bad, eval_batch_size: see `mmlong.datamodules.images.ImageDataModule`.
    """

    modality = "image"

    def __init__(
        self,
        name: str,
        facts: Facts,
        shape: tuple[int, int, int],
        source_path: str | None,
        augment: Sequence[str],
        cache: bool,
        batch_size: int,
        num_workers: int,
        seed: int,
        on_bad: str,
        eval_batch_size: int | None,
    ) -> None:
        folder = Path(name if source_path is None else source_path)
        super().__init__(name, folder, facts, None, batch_size, num_workers, seed, "indexed", on_bad, eval_batch_size)
        self.shape = shape
        self.augment = Augment(augment, seed)
        self.cache = cache
        self._images: DirectImages | None = None

    def open(self) -> DirectImages:
        """The images; a subclass gives it.

        Raises:
            DataError: their files are missing or wrong.
        """
        raise TypeError(f"{type(self).__name__} does not define open()")

    def prepare_data(self) -> None:
        """Nothing is packed."""

    def pack(self, progress: Progress) -> None:
        """Never asked for."""
        raise DataError(self.folder, "is read as it is, not packed")

    @property
    def dataset(self) -> Any:
        """The images, opened when first asked for."""
        if self._images is None:
            self._images = self.open()
        return self._images

    def modality_options(self) -> dict[str, Any]:
        """Size and channels."""
        return {"size": list(self.shape[1:]), "channels": self.shape[0]}

    def samples(self, split: str, train: bool) -> DirectSamples:
        """The images of a split, one at a time or as batches."""
        assert self.label is not None
        return DirectSamples(
            self.dataset, split, self.label, self.augment if train else None, self.on_bad, self.cache
        )  # fmt: skip

"""`ImageDataModule`: packed images to batches of uint8, with packing of the known datasets on first use."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .augment import Augment
from .base import PackedDataModule
from .errors import DataError
from .image_samples import ImageSamples
from .pack import pack_images
from .packed import PackedDataset
from .shards import MANIFEST
from .sources import KNOWN, Known

log = logging.getLogger(__name__)


def data_root() -> Path:
    """Where packed datasets are kept unless told: ``$MMLONG_DATA``, else ``.data`` in the current folder."""
    return Path(os.environ.get("MMLONG_DATA") or ".data")


class ImageDataModule(PackedDataModule):
    """Images and one label.

    Args:
        dataset: ``"elpv"`` or ``"mnist5k"`` (packed on first use into ``root``), or the folder of a packed dataset.
        root: where known datasets are packed; `data_root` if not given.
        size: pack a known dataset at this side instead of its own (each size has its own folder).
        label: which label field; the dataset's default if not given.
        augment: changes to training images, see `mmlong.datamodules.augment`.
        cache: keep decoded images in memory, shared by the workers (one byte a pixel and channel).
        batch_size, num_workers, seed, reader, on_bad, eval_batch_size: see `PackedDataModule`.

    Batches are dicts, see `mmlong.datamodules.image_samples`. In evaluation on several ranks a few samples of weight 0
    fill the last batch: leave them out of every metric.

    Raises:
        DataError: at use, if the dataset is neither known nor packed, or is not of images.
        ValueError: an argument makes no sense.
    """

    def __init__(
        self,
        dataset: str = "elpv",
        root: str | None = None,
        size: int | None = None,
        label: str | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        augment: Sequence[str] = (),
        reader: str = "indexed",
        on_bad: str = "stop",
        cache: bool = False,
        eval_batch_size: int | None = None,
    ) -> None:
        self.known: Known | None = KNOWN.get(dataset)
        if self.known is not None:
            if label is not None and label not in self.known.labels:
                raise ValueError(f"{dataset} has labels {', '.join(self.known.labels)}, not {label!r}")
            self.side = size or self.known.size
            folder = Path(root if root is not None else data_root()) / f"{dataset}-{self.side}"
        else:
            if size is not None:
                raise ValueError(
                    f"size can only be given for {', '.join(KNOWN)}; {dataset!r} has the size it was packed at"
                )
            folder = Path(dataset)
        super().__init__(folder, batch_size, num_workers, seed, reader, on_bad, eval_batch_size)
        self.dataset_name = dataset
        self._label = label
        self.augment = Augment(augment, seed)
        self.cache = cache

    def prepare_data(self) -> None:
        """Pack a known dataset if it is not there, saying where it comes from and under which licence."""
        if (self.folder / MANIFEST).is_file():
            return
        if self.known is None:
            raise DataError(
                self.folder, f"is not a packed dataset (no {MANIFEST}); make one with `mmlong pack image IN {self.folder}`, "
                f"or name one of {', '.join(KNOWN)}"
            )  # fmt: skip
        from .progress import packing

        print(f"{self.dataset_name}: {self.known.source}\n  licence: {self.known.licence}")
        with packing(f"packing {self.dataset_name} at {self.side}x{self.side} into {self.folder}") as progress:
            pack_known(self.dataset_name, self.folder, self.side, progress=progress)
        self._dataset = None

    @property
    def dataset(self) -> PackedDataset:
        """The packed dataset, opened when first asked for."""
        dataset = super().dataset
        if dataset.manifest["modality"] != "image":
            raise DataError(self.folder, f"holds {dataset.manifest['modality']}, not images")
        return dataset

    def info(self) -> dict[str, Any]:
        """Size, channels and classes; see `PackedDataModule.info`."""
        return {
            "modality": {"size": list(self.size), "channels": self.channels},
            "num_classes": self.num_classes, "class_names": list(self.class_names),
        }  # fmt: skip

    def samples(self, split: str, train: bool) -> ImageSamples:
        """The images of a split, one at a time or as batches."""
        return ImageSamples(self.dataset, split, self.label, self.augment if train else None, self.on_bad, self.cache)

    @property
    def label(self) -> str:
        """The label field in use."""
        if self._label is not None:
            return self._label
        return next(iter(self.known.labels)) if self.known is not None else self.dataset.fields[0]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by class id. Needs no packed data if the dataset is a known one."""
        if self.known is not None and self.label in self.known.labels:
            return self.known.labels[self.label]
        return self.dataset.classes(self.label)

    @property
    def num_classes(self) -> int:
        """How many classes."""
        return len(self.class_names)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        if self.known is not None:
            return (self.side, self.side)
        image = self.dataset.manifest["image"]
        return (image["height"], image["width"])

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return self.known.channels if self.known is not None else int(self.dataset.manifest["image"]["channels"])

    @property
    def source(self) -> str:
        """Where the images come from."""
        return self.known.source if self.known is not None else str(self.dataset.manifest["source"])

    @property
    def licence(self) -> str:
        """Under which terms."""
        return self.known.licence if self.known is not None else str(self.dataset.manifest["licence"])

    @property
    def class_counts(self) -> torch.Tensor:
        """``(num_classes,)`` int64: training samples of each class. Needs the packed data."""
        labels = torch.from_numpy(self.dataset.split("train").labels[self.label])
        return torch.bincount(labels, minlength=self.num_classes)

    @property
    def class_weights(self) -> torch.Tensor:
        """``(num_classes,)`` float32: inverse frequency in training, 1 on average over its samples. Needs the packed data."""
        counts = self.class_counts
        return (counts.sum() / (len(counts) * counts.clamp(min=1))).float()


def pack_known(name: str, out: str | Path, size: int | None = None, **options: object) -> PackedDataset:
    """Pack a known dataset at its own size (or another), channels and splits. Options as in `pack_images`."""
    known = KNOWN[name]
    settings: dict[str, object] = {"channels": known.channels, "splits": known.splits, **options}
    return pack_images(known.load(), out, size=size or known.size, **settings)  # type: ignore[arg-type]

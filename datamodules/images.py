"""`ImageDataModule`: packed images to batches of uint8, with packing of the known datasets on first use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .augment import Augment
from .base import PackedDataModule, Progress
from .image_samples import ImageSamples
from .known import data_root, is_known
from .known_images import KNOWN
from .pack import pack_images
from .packed import PackedDataset
from .sources import Known


class ImageDataModule(PackedDataModule):
    """Images, with one label where they have any.

    Args:
        dataset: a known one, packed on first use into ``root`` (``"elpv"``, ``"mnist5k"``, ``"photos"``, ``"photos-grey"``, ``"cifar10"``, ``"cifar10-grey"``), or the folder of a packed dataset.
        root: where known datasets are packed; `data_root` if not given.
        source_path: the folder of a known dataset that comes in no package.
        size: pack a known dataset at this side instead of its own (each size has its own folder); of photos, the side of a crop.
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

    modality = "image"
    of_dataset = ("label", "size")
    known: Known | None

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
        source_path: str | None = None,
    ) -> None:
        known = KNOWN[dataset] if is_known(dataset, KNOWN) else None
        if known is not None:
            self.side = size or known.size
            folder = Path(root if root is not None else data_root()) / f"{dataset}-{self.side}"
        else:
            if size is not None:
                raise ValueError(
                    f"size can only be given for {', '.join(KNOWN)}; {dataset!r} has the size it was packed at"
                )
            folder = Path(dataset)
        super().__init__(dataset, folder, known, label, batch_size, num_workers, seed, reader, on_bad, eval_batch_size)
        self.source_path = source_path
        self.augment = Augment(augment, seed)
        self.cache = cache

    def pack(self, progress: Progress) -> None:
        """Pack the known dataset at `side`."""
        pack_known(self.dataset_name, self.folder, self.side, self.source_path, progress=progress)

    def known_names(self) -> tuple[str, ...]:
        """Names of the image sources."""
        return tuple(KNOWN)

    def modality_options(self) -> dict[str, Any]:
        """Size and channels."""
        return {"size": list(self.size), "channels": self.channels}

    def sample_name(self, split: str, sample: int) -> str:
        """The file or record that a sample was packed from."""
        return self.packed_name(split, sample)

    def samples(self, split: str, train: bool) -> ImageSamples:
        """The images of a split, one at a time or as batches."""
        return ImageSamples(self.dataset, split, self.label, self.augment if train else None, self.on_bad, self.cache)

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


def pack_known(
    name: str, out: str | Path, size: int | None = None, source_path: str | None = None, **options: object
) -> PackedDataset:
    """Pack a known dataset at its own size (or another), channels and splits. Options as in `pack_images`."""
    known = KNOWN[name]
    settings: dict[str, object] = {"channels": known.channels, "splits": known.splits, **options}
    side = size or known.size
    return pack_images(known.read(name, side, source_path), out, size=side, **settings)  # type: ignore[arg-type]

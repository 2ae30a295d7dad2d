"""The datamodule of a dataset, by the dataset: for those that are made of several."""

from __future__ import annotations

import inspect
from typing import Any

from .audio import AudioDataModule
from .base import PackedDataModule
from .genome import GenomeDataModule
from .images import ImageDataModule
from .known import MODULES, known_sequences
from .known_images import KNOWN
from .packed import load_manifest
from .text import TextDataModule

CLASSES: dict[str, type[PackedDataModule]] = {
    each.modality: each for each in (ImageDataModule, AudioDataModule, GenomeDataModule, TextDataModule)
}


def open_data(dataset: str, **options: Any) -> PackedDataModule:
    """The datamodule of a known source or of a packed dataset's folder.

    Args:
        dataset: name or folder.
        options: of the datamodule; ``source_path`` is left out where the source comes in a package.

    Raises:
        DataError: neither known nor packed, or of a modality that has no datamodule.
        ValueError: an option that the datamodule does not take.
    """
    own_files = False
    if dataset in KNOWN:
        modality, own_files = "image", KNOWN[dataset].load_files is not None
    elif dataset in MODULES:
        known = known_sequences(dataset)
        modality, own_files = known.modality, bool(known.files)
    else:
        modality = str(load_manifest(dataset)["modality"])
    cls = CLASSES.get(modality)
    if cls is None:
        raise ValueError(f"{dataset} holds {modality}, which has no datamodule; there are {', '.join(CLASSES)}")
    taken = inspect.signature(cls).parameters
    if not own_files:
        options.pop("source_path", None)
    if unknown := [name for name in options if name not in taken]:
        raise ValueError(f"{cls.__name__} takes no {', '.join(unknown)}; it takes {', '.join(taken)}")
    return cls(dataset, **options)

"""`DocumentPairDataModule`: pairs of texts with one label, as the `retrieval` task of the Long Range Arena has them.

A row holds both texts, one behind the other; a batch is a dict::

    raw       uint8   (B, T)    first text, then the second; 0 beyond both
    lengths   int64   (B,)      of both together
    second_at int64   (B,)      where the second begins
    label     int64   (B,)
    index     int64   (B,)      sample id within the split
    weight    float32 (B,)      1, or 0 for a filler of evaluation

Pairs come from the benchmark's own files (``aan``), or, where these are not at hand, from a stand-in of the same shape that is named as such (``stdlib-pairs``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .aan import AAN
from .aan import FACTS as AAN_FACTS
from .base import PackedDataModule, Progress
from .direct_images import Facts
from .document_source import DocumentSource
from .errors import DataError
from .loader import Batch, Place
from .stdlib_pairs import FACTS as STDLIB_FACTS
from .stdlib_pairs import StdlibPairs

SOURCES: Mapping[str, tuple[Facts, Callable[..., DocumentSource]]] = {
    "aan": (AAN_FACTS, AAN),
    "stdlib-pairs": (STDLIB_FACTS, StdlibPairs),
}


class DocumentPairSamples:
    """The pairs of one split.

    Args:
        source: of all splits.
        split: which.
        length: bytes that are read of each text.
    """

    def __init__(self, source: DocumentSource, split: str, length: int) -> None:
        self.source, self.name, self.length = source, split, length
        self.labels = source.split(split).labels["related"]

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, places: list[Place]) -> tuple[Batch, list[DataError]]:
        """The batch at ``places``."""
        pairs = [[text[: self.length] for text in self.source.pair(self.name, sample)] for _, sample, _ in places]
        lengths = [len(first) + len(second) for first, second in pairs]
        raw = np.zeros((len(pairs), max(lengths)), np.uint8)
        for row, pair in zip(raw, pairs, strict=True):
            both = b"".join(pair)
            row[: len(both)] = np.frombuffer(both, np.uint8)
        batch = {
            "raw": torch.from_numpy(raw),
            "lengths": torch.tensor(lengths, dtype=torch.int64),
            "second_at": torch.tensor([len(first) for first, _ in pairs], dtype=torch.int64),
            "label": torch.tensor([int(self.labels[sample]) for _, sample, _ in places], dtype=torch.int64),
            "index": torch.tensor([sample for _, sample, _ in places], dtype=torch.int64),
            "weight": torch.tensor([weight for *_, weight in places], dtype=torch.float32),
        }
        return batch, []


class DocumentPairDataModule(PackedDataModule):
    """Pairs of texts; see `mmlong.tasks.MatchTask`.

    Args:
        dataset: ``"aan"``, which needs ``source_path``, or ``"stdlib-pairs"``.
        source_path: the benchmark's release, or its folder of the AAN's ``.tsv`` files.
        length: bytes of each text that are read, from its beginning; the benchmark reads 4,000.
        options: of ``stdlib-pairs``, see `mmlong.datamodules.stdlib_pairs.StdlibPairs`.
        batch_size: in pairs.
        num_workers, seed, on_bad, eval_batch_size: see `PackedDataModule`.

    Raises:
        DataError: at use, if files are missing or wrong.
        ValueError: an argument makes no sense.
    """

    modality = "text"

    def __init__(
        self,
        dataset: str = "stdlib-pairs",
        source_path: str | None = None,
        length: int = 4000,
        options: dict[str, Any] | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        on_bad: str = "stop",
        eval_batch_size: int | None = None,
    ) -> None:
        if dataset not in SOURCES:
            raise ValueError(f"there are no document pairs {dataset!r}; there are {', '.join(SOURCES)}")
        if (source_path is None) == (dataset == "aan"):
            raise ValueError("dataset: aan needs source_path, the folder of its files" if source_path is None else f"{dataset} takes no source_path; for the benchmark's pairs set dataset: aan")  # fmt: skip
        if dataset == "aan" and options:
            raise ValueError("options are of pairs that are drawn, and dataset: aan has its own")
        if length < 1:
            raise ValueError(f"length is {length}; at least a byte of each text is read")
        self.length, self.source_path = length, source_path
        self.options = {"seed": 0, "length": length, **(options or {})} if dataset != "aan" else {}
        self._source: DocumentSource | None = None
        super().__init__(
            dataset, Path(source_path or dataset), SOURCES[dataset][0], None, batch_size, num_workers, seed, "indexed",
            on_bad, eval_batch_size,
        )  # fmt: skip

    def prepare_data(self) -> None:
        """Nothing is packed."""

    def pack(self, progress: Progress) -> None:
        """Never asked for."""
        raise DataError(self.folder, "is read as it is, not packed")

    @property
    def dataset(self) -> Any:
        """The pairs, opened when first asked for."""
        if self._source is None:
            make = SOURCES[self.dataset_name][1]
            self._source = make(self.source_path) if self.dataset_name == "aan" else make(**self.options)
        return self._source

    def samples(self, split: str, train: bool) -> DocumentPairSamples:
        """The pairs of a split."""
        return DocumentPairSamples(self.dataset, split, self.length)

    def fixed_settings(self) -> dict[str, str]:
        """How much is read of each text."""
        return {"length": str(self.length)}

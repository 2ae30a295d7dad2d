"""`SequenceDataModule`: packed documents of one modality to batches; what audio, genome and text share.

A modality's datamodule says how bytes become an array (`codec`), what of the data its modality must know
(`modality_options`), and which changes there are (`changes`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .augment import Augment, Change
from .base import PackedDataModule, Progress
from .codecs import Codec
from .known import MODULES, data_root, is_known, known_names, known_sequences
from .loader import Batch
from .order import like_lengths
from .pack_sequences import pack_known_sequences
from .records import KnownSequences
from .sequence_samples import SequenceSamples, document_lengths
from .windows import Stream, Whole, Windows

WINDOWS = ("whole", "stream")
TYPICAL = 12
"""Batches that stand for all where they are uneven."""
TRAIN_CROPS = ("random", "same")


class SequenceDataModule(PackedDataModule):
    """Documents, whole or as one stream. Base of the datamodules of audio, genome and text.

    Args:
        dataset: a known source (packed on first use into ``root``), or the folder of a packed dataset.
        root: where known datasets are packed; `data_root` if not given.
        source_path: the folder or file of a known source that comes in no package, if it does not lie in ``root``.
        windows: ``"whole"``: a sample is a document; ``"stream"``: a row out of all documents one behind another. See
            `mmlong.datamodules.windows`.
        length: tokens of a row; of whole documents the longest sample, of longer ones a crop is taken.
        eval_length: ``length`` of evaluation, if that is another.
        crop: which crop evaluation takes, ``"head"`` or ``"middle"``.
        train_crop: which crop training takes: ``"random"``, another each epoch, or ``"same"`` as evaluation (of sounds that begin with what tells them apart).
        carry: rows of a stream come so that place b of a batch goes on where place b of the batch before it ended, and batches say where that is so (``continues``): for
            training that carries the model's state (``model.carry``). Evaluation is as without.
        alike: documents of like length share a training batch, so that little is padded: so many batches at a time are sorted by their lengths (`mmlong.datamodules.order.like_lengths`); 0: as they come.
        short_first: in so many first epochs documents come by length, the shortest first: a model meets what is easy, and cheap, before what is long.
        label: which label field; the dataset's default if not given.
        augment: changes to training samples.
        cache: keep decoded documents in memory, shared by the workers.
        batch_size, num_workers, seed, reader, on_bad, eval_batch_size: see `PackedDataModule`. The reader ``"streaming"`` gives
            whole documents only.

    Batches are dicts, see `mmlong.datamodules.sequence_samples`. In evaluation on several ranks a few samples of weight
    0 fill the last batch: leave them out of every metric.

    Raises:
        DataError: at use, if the dataset is neither known nor packed, or is of another modality.
        ValueError: an argument makes no sense.
    """

    of_dataset = ("label", "source_path")
    known: KnownSequences | None
    changes: Mapping[str, tuple[Change, float]] = {}

    def __init__(
        self,
        dataset: str,
        root: str | None = None,
        source_path: str | None = None,
        windows: str = "whole",
        length: int | None = None,
        eval_length: int | None = None,
        crop: str = "head",
        train_crop: str = "random",
        label: str | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        augment: Sequence[str] = (),
        reader: str = "indexed",
        on_bad: str = "stop",
        cache: bool = False,
        eval_batch_size: int | None = None,
        carry: bool = False,
        alike: int = 0,
        short_first: int = 0,
    ) -> None:
        if windows not in WINDOWS:
            raise ValueError(f"windows is {windows!r}; it can be {' or '.join(WINDOWS)}")
        if train_crop not in TRAIN_CROPS:
            raise ValueError(f"train_crop is {train_crop!r}; it can be {' or '.join(TRAIN_CROPS)}")
        if windows == "stream" and length is None:
            raise ValueError("a stream is cut into rows: give their length")
        if windows == "stream" and reader == "streaming":
            raise ValueError("the reader 'streaming' gives whole documents; for windows: stream take reader: indexed")
        if carry and windows != "stream":
            raise ValueError("carry: true is for rows that go on, one behind another: set windows: stream")
        for name, value, of in (("alike", alike, "batches"), ("short_first", short_first, "epochs")):
            if value < 0:
                raise ValueError(f"{name} is {value}; it is a number of {of}, or 0")
            if value and (windows == "stream" or reader == "streaming"):
                raise ValueError(
                    f"{name} is for whole documents of the indexed reader: rows of a stream are of one length, and the reader 'streaming' takes documents as they come"
                )
        known = known_sequences(dataset) if is_known(dataset, MODULES) else None
        if known is not None and known.modality != self.modality:
            raise ValueError(f"{dataset} is {known.modality}; {type(self).__name__} reads {self.modality}")
        folder = Path(dataset)
        if known is not None:
            folder = Path(root if root is not None else data_root()) / dataset
        super().__init__(dataset, folder, known, label, batch_size, num_workers, seed, reader, on_bad, eval_batch_size)
        self.root, self.source_path = root, source_path
        self.windows, self.length, self.eval_length, self.crop = windows, length, eval_length or length, crop
        self.train_crop, self.carry, self.alike, self.short_first = train_crop, carry, alike, short_first
        for train in (True, False):
            self._windows([1], train)  # refuses a length or crop that makes no sense, now
        self.augment = Augment(augment, seed, self.changes)
        self.cache = cache

    def pack(self, progress: Progress) -> None:
        """Pack the known source with its own splits."""
        pack_known_sequences(
            self.dataset_name, self.folder, self.source_path, self.root, on_bad=self.on_bad, progress=progress
        )

    @property
    def codec(self) -> Codec:
        """How a member becomes an array."""
        raise TypeError(f"{type(self).__name__} does not say how a member becomes an array")

    def known_names(self) -> tuple[str, ...]:
        """Names of this modality's sources."""
        return known_names(self.modality)

    def about(self) -> Mapping[str, Any]:
        """What the modality must know of all documents together. Needs no packed data if the dataset is a known one."""
        return self.known.about if self.known is not None else self.dataset.manifest[self.modality]

    @property
    def label(self) -> str | None:
        """The label field in use; ``None`` for data without labels, and for a stream."""
        return None if self.windows == "stream" else super().label

    def _windows(self, lengths: Sequence[int] | np.ndarray, train: bool, slots: int | None = None) -> Windows:
        length = self.length if train else self.eval_length
        if self.windows == "stream" and length is not None:
            return Stream(lengths, length, train, self.seed, slots)
        return Whole(lengths, length, train and self.train_crop == "random", self.seed, self.crop)

    def lengths(self, split: str) -> np.ndarray:
        """``(N,)`` tokens of each document of a split, as the codec makes them."""
        return document_lengths(self.dataset.split(split))

    def sample_name(self, split: str, sample: int) -> str:
        """The file or record that a sample was packed from; empty of rows of a stream, which have something of several."""
        return self.packed_name(split, sample) if self.windows == "whole" else ""

    def samples(self, split: str, train: bool) -> SequenceSamples:
        """The samples of a split, one at a time or as batches."""
        slots = self.batch_size * self._ranks()[1] if self.carry and train else None
        lengths = self.lengths(split)
        windows = self._windows(lengths, train, slots)
        return SequenceSamples(
            self.dataset, split, self.codec, windows, self.label, self.augment if train and self.augment.names else None,
            self.on_bad, self.cache, lengths,
        )  # fmt: skip

    def train_order(self, batch: int) -> Callable[[int], np.ndarray]:
        """As the base's, documents of like length together or the short ones first if that is asked for; where the state is carried, the slots' order."""
        if self.carry:
            return self._cached_samples("train", True).windows.slot_order  # type: ignore[attr-defined, no-any-return]
        plain, lengths = super().train_order(batch), self._row_lengths()

        def order(epoch: int) -> np.ndarray:
            ids = plain(epoch)
            if epoch < self.short_first:
                return ids[np.argsort(lengths[ids], kind="stable")]
            return like_lengths(ids, lengths, batch, self.alike, self.seed, epoch) if self.alike else ids

        return order

    def _row_lengths(self) -> np.ndarray:
        """Tokens of each training document that a model is given, before any augmentation."""
        return np.minimum(self.lengths("train"), self.length or np.iinfo(np.int64).max)

    def typical_batches(self) -> list[Batch] | None:
        """Of whole documents: batches from the shortest to the longest of the first epoch, each standing for as many."""
        if self.windows == "stream" or self.reader == "streaming":
            return None
        ids = self.train_order(self.batch_size)(0).reshape(-1, self.batch_size)
        longest = self._row_lengths()[ids].max(1)
        if longest.min() == longest.max():
            return None
        places = np.argsort(longest, kind="stable")[((np.arange(TYPICAL) + 0.5) / TYPICAL * len(longest)).astype(int)]
        samples = self._cached_samples("train", True)
        return [samples.fetch([(0, int(sample), 1.0) for sample in ids[place]])[0] for place in places]

    def train_sizes(self) -> tuple[int, ...]:
        """Documents of each shard; a stream's rows are read from anywhere."""
        if self.windows == "stream":
            return (len(self._cached_samples("train", True)),)
        return super().train_sizes()

    def fixed_settings(self) -> dict[str, str]:
        """Windows, their length and crop."""
        return {
            "windows": self.windows + (", carried" if self.carry else ""),
            "length": str(self.length),
            "train_crop": self.train_crop,
            **{name: str(value) for name, value in (("alike", self.alike), ("short_first", self.short_first)) if value},
        }

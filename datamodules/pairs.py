"""`PairDataModule`: samples of one dataset, each with a partner of its class: a picture with a sound, a sound with its word, or a picture with a sentence of what is known of it.

The first dataset leads: an epoch is each of its samples once, in the order of `mmlong.datamodules.order`, and a position in it is resumed to the bit as anywhere. Its partner is a pure function of seed, epoch and sample: in
training another of the same class each epoch, in evaluation always the same, from the split of the same name.

A batch is a dict of what each of the two has (`mmlong.datamodules.image_samples`, `mmlong.datamodules.sequence_samples`)::

    parts    {name: {raw, lengths}}
    label    int64   (B,)             the class that both are of, in the leading dataset's numbers; where the leading dataset has labels
    index    int64   (B,)             sample id of the leading dataset
    weight   float32 (B,)             1, or 0 for a filler of evaluation and where one of the two was skipped
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .base import PackedDataModule, Progress
from .by_name import open_data
from .errors import DataError
from .loader import Batch, Place, Samples
from .order import random_words
from .packed import PackedDataset
from .sentences import END, Sentences, check_template, text_rows

WORDS = "words"
_PAIRING = 11  # this file's stream of random words


class LabelWords:
    """The word of each sample's class, as bytes that end with a newline: how long a word is, is part of it.

    Args:
        words: by class id.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.rows = [np.frombuffer(word.encode() + END, np.uint8) for word in words]

    def of(self, labels: Sequence[int]) -> dict[str, torch.Tensor]:
        """``raw`` uint8 ``(B, T)`` and ``lengths``."""
        return text_rows([self.rows[label] for label in labels])


class PairSamples:
    """Samples with their partners.

    Args:
        lead: the leading samples, labelled.
        names: what the two are called.
        partner: the partner's samples, the words of the classes, or sentences about the leading samples.
        members: by class of the leading dataset, ids of the partner's samples; not for words and sentences.
        seed: of the pairing.
    """

    def __init__(
        self,
        lead: Samples,
        names: tuple[str, str],
        partner: Samples | LabelWords | Sentences,
        members: Sequence[np.ndarray] = (),
        seed: int = 0,
    ) -> None:
        self.lead, self.names, self.partner, self.members, self.seed = lead, names, partner, members, seed

    def __len__(self) -> int:
        return len(self.lead)

    def partner_of(self, epoch: int, sample: int, label: int) -> int:
        """Which of the partner's samples."""
        there = self.members[label]
        return int(there[int(random_words(1, self.seed, _PAIRING, epoch, sample)[0] % len(there))])

    def fetch(self, places: list[Place]) -> tuple[Batch, list[DataError]]:
        """The batch at ``places`` and what was skipped in it."""
        first, problems = self.lead.fetch(places)
        labels, weight = first.get("label"), first["weight"]
        if isinstance(self.partner, Sentences):
            second, more = self.partner.fetch(first["index"].tolist())
            problems = [*problems, *more]
            weight = weight * second["weight"]
        elif labels is None:
            raise ValueError("the samples have no labels, and a pair is of one class")
        elif isinstance(self.partner, LabelWords):
            second = self.partner.of(labels.tolist())
        else:
            theirs = [
                (epoch, self.partner_of(epoch, sample, label), 1.0)
                for (epoch, sample, _), label in zip(places, labels.tolist(), strict=True)
            ]
            second, more = self.partner.fetch(theirs)
            problems = [*problems, *more]
            weight = weight * second["weight"]
        parts = {name: _raw_of(batch) for name, batch in zip(self.names, (first, second), strict=True)}
        labelled = {} if labels is None else {"label": labels}
        return {"parts": parts, **labelled, "index": first["index"], "weight": weight}, problems


def _raw_of(batch: Batch) -> Batch:
    return {key: batch[key] for key in ("raw", "lengths") if key in batch}


class PairDataModule(PackedDataModule):
    """Pairs of two datasets.

    Args:
        dataset: leads: a known source or the folder of a packed dataset, of labelled samples.
        partner: another, whose classes have the same names; or ``"words"``, the class in words.
        name, partner_name: what the model calls the two; their modality, unless given.
        options, partner_options: of the datamodule of each: ``length``, ``size``, ``cache``, ``augment``, ...
        words: the word of each class, in the order of the classes; their names, unless given.
        sentence: in place of words, a template that is filled from what is packed beside each sample; see `mmlong.datamodules.sentences`.
        root: where known datasets are packed.
        source_path: the folder or file of a known source that comes in no package.
        batch_size, num_workers, seed, on_bad, eval_batch_size: see `PackedDataModule`.

    Raises:
        DataError: at use, if a dataset is neither known nor packed.
        ValueError: an argument makes no sense, or classes have no partner.
    """

    def __init__(
        self,
        dataset: str,
        partner: str = WORDS,
        name: str | None = None,
        partner_name: str | None = None,
        options: dict[str, Any] | None = None,
        partner_options: dict[str, Any] | None = None,
        words: list[str] | None = None,
        sentence: str | None = None,
        root: str | None = None,
        source_path: str | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        on_bad: str = "stop",
        eval_batch_size: int | None = None,
    ) -> None:
        shared = {"root": root, "source_path": source_path, "seed": seed, "on_bad": on_bad, "batch_size": batch_size}
        self.lead = open_data(dataset, **shared, **(options or {}))
        self.partner = None if partner == WORDS else open_data(partner, **shared, **(partner_options or {}))
        if self.partner is None and partner_options:
            raise ValueError("partner_options are of a dataset, and the partner is the class in words")
        if self.partner is not None and words is not None:
            raise ValueError(f"words are for partner: {WORDS}, and the partner is {partner}")
        if sentence is not None:
            if self.partner is not None or words is not None:
                raise ValueError(f"sentence is for partner: {WORDS}, in place of words")
            check_template(sentence)
        self.words, self.sentence = words, sentence
        self.modality = self.lead.modality
        names = (name or self.modality, partner_name or ("text" if self.partner is None else self.partner.modality))
        if names[0] == names[1]:
            raise ValueError(f"both are called {names[0]}: give name and partner_name")
        self.names = names
        self.settings = f"{partner} {options or {}} {partner_options or {}} {words}" + (
            f" {sentence}" if sentence else ""
        )
        super().__init__(
            dataset, self.lead.folder, self.lead.known, self.lead._label, batch_size, num_workers, seed, "indexed", on_bad,
            eval_batch_size,
        )  # fmt: skip

    def pack(self, progress: Progress) -> None:
        """Pack the leading source; the partner's is packed by its own datamodule."""
        self.lead.pack(progress)

    def known_names(self) -> Sequence[str]:
        """Names of the sources of the leading modality."""
        return self.lead.known_names()

    def prepare_data(self) -> None:
        """Pack what is known and not there."""
        self.lead.prepare_data()
        if self.partner is not None:
            self.partner.prepare_data()

    def info(self) -> dict[str, Any]:
        """``modalities``: by name, options that the data fixes."""
        second = {} if self.partner is None else self.partner.modality_options()
        return {"modalities": dict(zip(self.names, (self.lead.modality_options(), second), strict=True))}

    def setup(self, stage: str | None = None) -> None:
        """Open what the stage needs of both."""
        self.lead.setup(stage)
        if self.partner is not None:
            self.partner.setup(stage)

    @property
    def dataset(self) -> PackedDataset:
        """The leading dataset."""
        return self.lead.dataset

    def samples(self, split: str, train: bool) -> PairSamples:
        """The pairs of a split."""
        if self.sentence is not None:
            lead, packed = self.lead.samples(split, train), self.lead.dataset.split(split)
            if len(lead) != len(packed):
                raise DataError(self.folder, "is read as a stream, and a sentence is of a whole sample")
            return PairSamples(lead, self.names, Sentences(self.sentence, packed, self.on_bad))
        classes = self.lead.class_names
        if not classes:
            raise DataError(self.folder, "has no labels (or is read as a stream), and a pair is of one class")
        lead = self.lead.samples(split, train)
        if self.partner is None:
            words = list(classes) if self.words is None else self.words
            if len(words) != len(classes):
                raise ValueError(f"there are {len(words)} words for {len(classes)} classes: {', '.join(classes)}")
            return PairSamples(lead, self.names, LabelWords(words))
        label, theirs = self.partner.label, list(self.partner.class_names)
        if label is None or (missing := [name for name in classes if name not in theirs]):
            raise ValueError(f"{self.partner.dataset_name} has no class {', '.join(missing if label else classes)}; it has {', '.join(theirs) or 'none'}")  # fmt: skip
        labels = self.partner.dataset.split(split).labels[label]
        members = [np.flatnonzero(labels == theirs.index(name)) for name in classes]
        present = set(self.lead.dataset.split(split).labels[str(self.lead.label)].tolist())
        if empty := [classes[k] for k in sorted(present) if len(members[k]) == 0]:
            raise ValueError(f"split {split!r} of {self.partner.dataset_name} has nothing of class {', '.join(empty)}")
        return PairSamples(lead, self.names, self.partner.samples(split, train), members, self.seed)

    def train_sizes(self) -> tuple[int, ...]:
        """Those of the leading dataset."""
        return self.lead.train_sizes()

    def fixed_settings(self) -> dict[str, str]:
        """The partner, its bytes, and the options of both."""
        bytes_of = "" if self.partner is None else f" {self.partner.dataset.fingerprint}"
        return {"partner": self.settings + bytes_of}

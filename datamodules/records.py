"""Sequences before they are packed: `Record`, `SequenceSource`, and `KnownSequences`, what is true of a named source before it is read.

The counterpart of `mmlong.datamodules.sources` for everything that is one long array: sounds, genomes, texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import DataError


@dataclass(frozen=True)
class Record:
    """One document: a recording, a chromosome, a text.

    Attributes:
        name: where it is, relative to the source; unique in it.
        load: gives the member's bytes as they are packed (see the modality's own codec).
        labels: class id by label field; empty for unlabelled data.
        extra: further facts for its JSON.
        split: the split it must be in, if the source says so.
        group: records of one group never part (a speaker, a duplicate); ``None``: its own.
    """

    name: str
    load: Callable[[], bytes]
    labels: Mapping[str, int] = field(default_factory=dict)
    extra: Mapping[str, str | int | float] = field(default_factory=dict)
    split: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class SequenceSource:
    """A collection of documents of one modality.

    Attributes:
        name: of the dataset.
        modality: ``audio``, ``genome`` or ``text``.
        extension: of the member that holds a document: ``wav``, ``seq`` (one ASCII letter a nucleotide) or ``txt`` (bytes as they are).
        about: what the modality must know of all documents together, kept in ``dataset.json`` under the modality's name (sample rate, channels, ...).
        source, licence: for people to read.
        records: the documents.
        labels: class names by label field; empty for unlabelled data.
        default_label: the field a task uses unless told.
        length: of a member's bytes, in tokens of the raw (samples, letters, bytes).
        faults: what could not become a record (a line of a table, say). Packing stops at the first, or skips and counts them.
    """

    name: str
    modality: str
    extension: str
    about: Mapping[str, Any]
    source: str
    licence: str
    records: Sequence[Record]
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    default_label: str | None = None
    length: Callable[[bytes], int] = len
    faults: Sequence[DataError] = ()


@dataclass(frozen=True)
class KnownSequences:
    """What is true of a named source before it is read, so that a model can be built while nothing is packed yet.

    Attributes:
        load: reads it; called with the folder or file the user gave or that was found, else with ``None``.
        modality: see `SequenceSource`.
        about: see `SequenceSource`.
        labels: class names by label field, the default one first.
        splits: how many documents (or which share) go to each split but ``train``, which takes the rest.
        source, licence: for people to read.
        files: of a source that comes in no package: under which names its folder or file is looked for beside the packed data.
    """

    load: Callable[[str | None], SequenceSource]
    modality: str
    about: Mapping[str, Any]
    labels: Mapping[str, tuple[str, ...]]
    splits: Mapping[str, float]
    source: str
    licence: str
    files: Sequence[str] = ()

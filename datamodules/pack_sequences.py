"""Packing a source of sequences: split, read, write. See `mmlong.datamodules.pack` for images.

Each document becomes one sample: a member with its bytes, as the source gives them, and a JSON with its name, labels and
length. The length stands in the index too, so that windows can be laid without reading a document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import BadSampleError, DataError, PackError, Skipped
from .known import find_source, known_sequences
from .pack import Progress
from .packed import PackedDataset
from .records import Record, SequenceSource
from .shards import DatasetWriter
from .splits import DEFAULT_SPLITS, check_items, class_counts, sample_json, split_items


def pack_sequences(
    source: SequenceSource,
    out: str | Path,
    *,
    splits: Mapping[str, float] | None = None,
    seed: int = 0,
    shard_bytes: int = 32 << 20,
    overwrite: bool = False,
    on_bad: str = "stop",
    progress: Progress | None = None,
) -> PackedDataset:
    """Pack a source of sequences into ``out``.

    Args:
        source: the documents.
        out: the folder to make; see `DatasetWriter`.
        splits: see `split_items`; a tenth each for ``val`` and ``test`` if not given.
        seed: of the splits and of the order in shards.
        shard_bytes, overwrite: see `DatasetWriter`.
        on_bad: a document that cannot be listed or read, or is empty: ``"stop"`` with its error, or ``"skip"`` it: it is named in
            the log, and counted and named in ``dataset.json``.
        progress: called with (done, in all).

    Returns:
        The packed dataset, opened.

    Raises:
        DataError: a document is damaged, refused or empty; an unknown label; a group in two splits.
        PackError: there is nothing to pack, or it cannot be written.
        ValueError: an argument makes no sense.
    """
    skipped = Skipped(on_bad)
    skipped.met(source.faults)
    if not source.records:
        raise PackError(out, skipped.nothing_left() if skipped.said else f"no documents in {source.source}")
    check_items(source.source, source.records, source.labels)
    parts = split_items(source.records, DEFAULT_SPLITS if splits is None else splits, seed)
    total = sum(len(part) for part in parts.values())
    packed: dict[str, list[Record]] = {split: [] for split in parts}
    tokens = dict.fromkeys(parts, 0)
    about = {
        "name": source.name, "modality": source.modality, "extension": source.extension, "source": source.source,
        "licence": source.licence, "default_label": source.default_label,
        "labels": {field: list(names) for field, names in source.labels.items()}, "seed": seed,
        source.modality: dict(source.about),
    }  # fmt: skip
    with DatasetWriter(out, about, shard_bytes, overwrite) as writer:
        for done, (split, record) in enumerate(_in_order(parts)):
            try:
                data, length = _read(source, record)
            except DataError as error:
                skipped.met([error])
            else:
                numbers = {"length": length}
                members = {source.extension: data, "json": sample_json(record, source.labels, numbers)}
                writer.add(split, f"{done:06d}", members, record.labels, numbers)
                packed[split].append(record)
                tokens[split] += length
            if progress is not None:
                progress(done + 1, total)
        if not packed.get("train"):
            raise PackError(out, skipped.nothing_left())
        writer.about |= {"counts": class_counts(packed, source.labels), "tokens": tokens, **skipped.about()}
    return PackedDataset(out)


def pack_known_sequences(
    name: str, out: str | Path, given: str | None = None, root: str | Path | None = None, **options: Any
) -> PackedDataset:
    """Pack a known source with its own splits. ``given`` and ``root``: see `find_source`; options as in `pack_sequences`."""
    known = known_sequences(name)
    return pack_sequences(known.load(find_source(known, given, root)), out, **{"splits": known.splits, **options})


def _in_order(parts: Mapping[str, list[Record]]) -> Iterator[tuple[str, Record]]:
    return ((split, record) for split, part in parts.items() for record in part)


def _read(source: SequenceSource, record: Record) -> tuple[bytes, int]:
    data = record.load()
    length = source.length(data)
    if length < 1:
        raise BadSampleError(source.source, "is empty", record.name)
    return data, length

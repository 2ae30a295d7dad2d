"""Two collections of DNA classification tasks, from folders that the user gives: GenomicBenchmarks and the Nucleotide Transformer's.

    gb-NAME   GenomicBenchmarks (Gresova et al. 2023, BMC Genomic Data 24:25): ``NAME/{train,test}/{class}/*.txt``, a sequence a file, as its package
              ``genomic-benchmarks`` lays them out when it downloads or makes them (usually under ``~/.genomic_benchmarks``)
    nt-NAME   the downstream tasks of Dalla-Torre et al. 2023 (bioRxiv 2023.01.11.523679): ``NAME/{train,test}.fna`` whose headers end in ``|LABEL``, or one table of the
              revised set, ``NAME/{train,test}.csv`` with columns sequence and label

Their own test sets are the test sets. Validation is taken from training, and sequences that are one another's copy or reverse complement stay together; one that is in both of the published parts is left in both, as published, and counted in ``dataset.json`` (``in_both``).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from .bed import Interval
from .errors import BadSampleError, DataError
from .fasta import NUCLEOTIDES, Fasta
from .genome_files import read_interval
from .genome_tasks import GENOMIC_BENCHMARKS, NUCLEOTIDE_TRANSFORMER
from .records import KnownSequences, Record, SequenceSource
from .relatives import strand_key

PARTS = {"train": None, "test": "test"}
Found = tuple[str, Callable[[], bytes], str]
"""Name, what reads the letters, and the class."""


def load(kind: str, name: str, given: str | Path | None) -> SequenceSource:
    """One task.

    Args:
        kind: ``gb`` or ``nt``.
        name: of the task.
        given: its folder, or one that holds it under its name.

    Raises:
        DataError: nothing was given, a part is missing or empty, or there is a class that the task has not.
    """
    known, read = KNOWN[f"{kind}-{name}"], _READERS[kind]
    classes = known.labels["label"]
    if given is None:
        raise DataError(f"{kind}-{name}", f"is in no package: {known.source}; say where its folder is (--source-path FOLDER, --data.source_path=FOLDER)")  # fmt: skip
    folder = Path(given)
    folder = folder / name if (folder / name).is_dir() else folder
    found = [(split, one) for part, split in PARTS.items() for one in read(folder, part)]
    keys: dict[str, set[str | None]] = {}
    own = []
    for split, (_, letters, _) in found:
        try:
            own.append(strand_key(letters()))
        except BadSampleError:
            own.append("")  # packing reads it again, and stops or skips it as it is told to
        keys.setdefault(own[-1], set()).add(split)
    twice = {key for key, splits in keys.items() if key and len(splits) > 1}
    records = []
    for (split, (record, letters, label)), key in zip(found, own, strict=True):
        if label not in classes:
            raise DataError(folder, f"has a class {label!r}; {name} has {', '.join(classes)}", record)
        group = f"{key} {split}" if key else None
        records.append(Record(record, letters, {"label": classes.index(label)}, split=split, group=group))
    about = {"in_both": sum(key in twice for key in own)}
    return SequenceSource(
        f"{kind}-{name}", "genome", "seq", about, known.source, known.licence, records, known.labels, "label"
    )


def _text_files(folder: Path, part: str) -> Iterator[Found]:
    files = sorted((folder / part).glob("*/*.txt"))
    if not files:
        raise DataError(folder / part, "holds no CLASS/*.txt; let the package genomic-benchmarks lay the sequences out (download_dataset or loc2seq)")  # fmt: skip
    for file in files:
        yield f"{part}/{file.parent.name}/{file.name}", partial(_letters, file), file.parent.name


def _letters(file: Path) -> bytes:
    return _checked(file.read_bytes().strip(), file)


def _checked(letters: bytes, file: Path, member: str | None = None) -> bytes:
    if not letters:
        raise BadSampleError(file, "is empty", member)
    codes = np.frombuffer(letters, np.uint8)
    if not NUCLEOTIDES[codes].all():
        wrong = chr(int(codes[~NUCLEOTIDES[codes]][0]))
        raise BadSampleError(file, f"{wrong!r} is no nucleotide", member)
    return letters


def _tables(folder: Path, part: str) -> Iterator[Found]:
    fna, table = folder / f"{part}.fna", folder / f"{part}.csv"
    if fna.is_file():
        fasta = Fasta(fna)
        for name, length in fasta.lengths.items():
            label = fasta.header(name).rpartition("|")[2].strip()
            yield f"{part} {name}", partial(read_interval, fasta, Interval(name, 0, length)), label
        return
    if not table.is_file():
        raise DataError(folder, f"holds neither {fna.name} nor {table.name}; a parquet file of the revised set is to be written as a CSV first (pandas: read_parquet(..).to_csv(..))")  # fmt: skip
    with open(table, newline="", encoding="utf-8-sig") as stream:
        rows = csv.DictReader(stream)
        if not {"sequence", "label"} <= set(rows.fieldnames or ()):
            raise DataError(table, f"needs columns sequence and label; it has {', '.join(rows.fieldnames or ())}")
        for row in rows:
            letters, place = (row["sequence"] or "").strip().encode(), f"row {rows.line_num}"
            yield f"{part} {place}", partial(_checked, letters, table, place), (row["label"] or "").strip()


_READERS = {"gb": _text_files, "nt": _tables}


def _known(kind: str, name: str, classes: tuple[str, ...]) -> KnownSequences:
    source, licence = {
        "gb": (f"GenomicBenchmarks {name} (Gresova et al. 2023; package genomic-benchmarks)", "Apache-2.0"),
        "nt": (
            f"Nucleotide Transformer downstream task {name} (Dalla-Torre et al. 2023)",
            "see the dataset's own page",
        ),
    }[kind]
    return KnownSequences(
        load=partial(load, kind, name), modality="genome", about={}, labels={"label": classes}, splits={"val": 0.1},
        source=source, licence=licence, files=(name, *((".genomic_benchmarks",) if kind == "gb" else ())),
    )  # fmt: skip


KNOWN = {
    f"{kind}-{name}": _known(kind, name, classes)
    for kind, tasks in (("gb", GENOMIC_BENCHMARKS), ("nt", NUCLEOTIDE_TRANSFORMER))
    for name, classes in tasks.items()
}

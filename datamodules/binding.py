"""Which protein binds here: 200 bases around peaks of two transcription factors, Oct4 or MafK, from the installed package janggu's files.

Four FASTA files of 200-base records named by their place in hg19: 3,897 and 3,900 to train on, and 100 of each factor to test on, which overlap none of those. Validation is
taken from training; peaks that overlap stay together.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from .bed import Interval
from .errors import DataError
from .fasta import Fasta
from .genome_files import read_interval
from .records import KnownSequences, Record, SequenceSource
from .relatives import overlap_groups
from .sources import package_folder

LABELS = {"factor": ("Oct4", "MafK")}
FILES = (  # name, class, split, records, SHA-256
    ("sample.fa", 0, None, 3897, "effef1417ad2ca12514d5a4fe72741aaada7b29c16553655c4ed84ad83640e82"),
    ("sample2.fa", 1, None, 3900, "0228f9e016bd91c642526136270b4efef75dc2916f906d47785fbe11c0fb94f8"),
    ("sample_test.fa", 0, "test", 100, "8972da4ec4dd2de58f52da113eb2d5c79d1584fb2662aa3a43349e78b0b23724"),
    ("sample2_test.fa", 1, "test", 100, "014cdfc16a3b57fc98f4bf8a7885dbbdf8f9e4a6b03a381365a8ddb415f27f5f"),
)
INSTALL = "pip install --no-deps janggu==0.10.2"  # what it would bring along is not needed: it is never imported
SOURCE = "Binding peaks of Oct4 and MafK, 7,997 stretches of 200 bases of hg19 (Kopp et al. 2020; package janggu)"
LICENCE = "GPL-3.0 (janggu)"


def load(given: str | Path | None = None) -> SequenceSource:
    """List the peaks.

    Args:
        given: the folder of the four files; that of the installed package if not given.

    Raises:
        DataError: the package is missing, or a file is not the one it published.
    """
    folder = Path(given) if given is not None else package_folder("janggu", "janggu", INSTALL) / "resources"
    records: list[Record] = []
    peaks: list[Interval] = []
    for name, label, split, count, sha256 in FILES:
        file = folder / name
        if not file.is_file():
            raise DataError(file, "is missing; install janggu again")
        if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != sha256:
            raise DataError(file, f"is not the published file (SHA-256 {found}); install janggu again")
        fasta = Fasta(file)
        if len(fasta.lengths) != count or set(fasta.lengths.values()) != {200}:
            raise DataError(file, f"holds {len(fasta.lengths)} records, should hold {count} of 200 bases")
        for peak in fasta.lengths:
            chromosome, _, place = peak.partition(":")
            start, _, end = place.partition("-")
            peaks.append(Interval(chromosome, int(start), int(end)))
            whole = Interval(peak, 0, 200)
            records.append(
                Record(
                    f"{LABELS['factor'][label]} {peak}",
                    partial(read_interval, fasta, whole),
                    {"factor": label},
                    split=split,
                )
            )
    groups = overlap_groups(peaks)
    records = [
        Record(each.name, each.load, each.labels, split=each.split, group=group)
        for each, group in zip(records, groups, strict=True)
    ]
    return SequenceSource("binding", "genome", "seq", {}, SOURCE, LICENCE, records, LABELS, "factor")


KNOWN = KnownSequences(
    load=load, modality="genome", about={}, labels=LABELS, splits={"val": 600}, source=SOURCE, licence=LICENCE
)  # fmt: skip

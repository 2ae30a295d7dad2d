"""A whole bacterial chromosome, 2,463,666 bases in one record, from the installed package pyrodigal's files.

Corynebacterium diphtheriae NCTC11397 (RefSeq GCF_001457455.1, NZ_LN831026.1). Held out by position, in whole stretches: a twentieth of the circle for validation
and one for the test, one from each half of it (they are copied in opposite directions, and differ in composition). They lie where little is repeated elsewhere: 5 percent of the
twentieth at the record's end are copies of training (a ribosomal RNA operon among them), of these two 0.1 and 0.4 percent are (64 bases in a row, on either strand).
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
from .sources import package_folder

BASES = 2_463_666
SHA256 = "e9f88cc1a5c1f0e10f372df91852e44630cbeb1d424a34566ed159e5e94850b3"
STRETCHES = (
    ("train", 0, 862_283),
    ("val", 862_283, 985_466),
    ("train", 985_466, 2_217_300),
    ("test", 2_217_300, 2_340_483),
    ("train", 2_340_483, BASES),
)
SOURCE = "Corynebacterium diphtheriae NCTC11397, complete chromosome of 2,463,666 bases (RefSeq NZ_LN831026.1; as carried by package pyrodigal)"
LICENCE = "RefSeq: public domain; GPL-3.0-or-later (pyrodigal)"


def load(given: str | Path | None = None) -> SequenceSource:
    """List the stretches.

    Args:
        given: the ``.fna.gz``; that of the installed package if not given.

    Raises:
        DataError: the package is missing, or the file is not the one it published.
    """
    if given is None:
        folder = package_folder("pyrodigal", "pyrodigal")
        file = folder / "tests" / "data" / "GCF_001457455.1_NCTC11397_genomic.fna.gz"
    else:
        file = Path(given)
    if not file.is_file():
        raise DataError(file, "is missing; install pyrodigal again")
    if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != SHA256:
        raise DataError(file, f"is not the published file (SHA-256 {found}); install pyrodigal again")
    fasta = Fasta(file)
    if list(fasta.lengths.values()) != [BASES]:
        raise DataError(file, f"holds records of {list(fasta.lengths.values())} bases, should hold one of {BASES}")
    (name,) = fasta.lengths
    records = [
        Record(str(each := Interval(name, start, stop)), partial(read_interval, fasta, each), split=split)
        for split, start, stop in STRETCHES
    ]
    return SequenceSource("chromosome", "genome", "seq", {}, SOURCE, LICENCE, records)


KNOWN = KnownSequences(load=load, modality="genome", about={}, labels={}, splits={}, source=SOURCE, licence=LICENCE)

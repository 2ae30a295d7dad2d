"""The text corpora that language models are compared on: enwik8, text8 and PG-19, from files that the user gives.

    enwik8   the first 10^8 bytes of a Wikipedia dump, XML and all (Mahoney, "About the test data", 2006)
    text8    the same cleaned to 10^8 letters a to z and blanks
    pg19     28,752 books from before 1919 (Rae et al. 2020, arXiv 1911.05507): a folder with ``train``, ``validation`` and ``test``, a file a book

The first two are one stretch each, cut where everybody cuts it: 90, 5 and 5 million bytes; what is counted is bits a byte. They may be given as the file or the published zip of it. PG-19's own measure is perplexity a word, so its
books' JSON has ``words``, counted by blanks: bits a byte of ours times bytes over words are bits a word.
"""

from __future__ import annotations

import hashlib
import zipfile
from functools import lru_cache, partial
from pathlib import Path

from .errors import DataError
from .records import KnownSequences, Record, SequenceSource

BYTES = 100_000_000
STRETCHES = {"train": (0, 90_000_000), "val": (90_000_000, 95_000_000), "test": (95_000_000, BYTES)}
MD5 = {"enwik8": "a1fa5ffddb56f4953e226637dabbb36a", "text8": "3bea1919949baf155f99411df5fada7e"}
"""Of the files, as their author publishes them."""
FOLDERS = {"train": "train", "validation": "val", "test": "test"}
BOOKS = 28_752


def load_stretch(name: str, given: str | Path | None) -> SequenceSource:
    """enwik8 or text8.

    Args:
        name: which.
        given: the file, its zip, or a folder that holds either under the published name.

    Raises:
        DataError: nothing was given, or it is not the published file.
    """
    if given is None:
        raise DataError(name, f"is in no package: get {name}.zip from its author's page and say where it is (--source-path FILE, --data.source_path=FILE)")  # fmt: skip
    file = Path(given)
    if file.is_dir():
        file = next((file / each for each in (name, f"{name}.zip") if (file / each).is_file()), file / name)
    if not file.is_file():
        raise DataError(file, f"is missing; give {name} or {name}.zip")
    data = _whole(file, name)
    if (found := hashlib.md5(data, usedforsecurity=False).hexdigest()) != MD5[name]:
        raise DataError(file, f"is not the published {name}: {len(data):,} bytes with MD5 {found}, should be {BYTES:,} with {MD5[name]}")  # fmt: skip
    records = [
        Record(f"{name} {a}-{b}", partial(_stretch, file, name, a, b), split=split)
        for split, (a, b) in STRETCHES.items()
    ]
    return SequenceSource(name, "text", "txt", {}, KNOWN[name].source, KNOWN[name].licence, records)


@lru_cache(maxsize=1)
def _whole(file: Path, name: str) -> bytes:
    if not zipfile.is_zipfile(file):
        return file.read_bytes()
    try:
        with zipfile.ZipFile(file) as archive:
            if name not in archive.namelist():
                raise DataError(file, f"holds no {name}, but {', '.join(archive.namelist()[:3])}")
            return archive.read(name)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise DataError(file, f"is no whole zip file: {error}") from error


def _stretch(file: Path, name: str, start: int, stop: int) -> bytes:
    return _whole(file, name)[start:stop]


def load_books(given: str | Path | None) -> SequenceSource:
    """PG-19.

    Args:
        given: the folder.

    Raises:
        DataError: nothing was given, a split is missing or empty.
    """
    if given is None:
        raise DataError("pg19", "is in no package: get its folder (train, validation, test) and say where it is (--source-path FOLDER, --data.source_path=FOLDER)")  # fmt: skip
    folder = Path(given)
    records = []
    for name, split in FOLDERS.items():
        books = sorted((folder / name).glob("*.txt"))
        if not books:
            raise DataError(folder / name, "holds no .txt; PG-19 is a folder with train, validation and test, a file a book")  # fmt: skip
        for book in books:
            words = {"words": len(book.read_bytes().split())}
            records.append(Record(f"{name}/{book.name}", book.read_bytes, extra=words, split=split))
    about = {"published_books": BOOKS, "books": len(records)}
    return SequenceSource("pg19", "text", "txt", about, KNOWN["pg19"].source, KNOWN["pg19"].licence, records)


def _known(name: str) -> KnownSequences:
    return KnownSequences(
        load=partial(load_stretch, name), modality="text", about={}, labels={}, splits={}, files=(name, f"{name}.zip"),
        source=f"{name}: {BYTES:,} bytes of Wikipedia of 2006, cut at 90 and 95 million (M. Mahoney)",
        licence="CC BY-SA 3.0 and GFDL (Wikipedia)",
    )  # fmt: skip


KNOWN = {
    "enwik8": _known("enwik8"),
    "text8": _known("text8"),
    "pg19": KnownSequences(
        load=load_books, modality="text", about={}, labels={}, splits={}, files=("pg19", "deepmind-gutenberg"),
        source="PG-19: books of Project Gutenberg from before 1919 (Rae et al. 2020)", licence="Apache-2.0; the books are in the public domain in the United States",
    ),
}  # fmt: skip

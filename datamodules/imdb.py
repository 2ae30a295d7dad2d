"""IMDb film reviews (Maas et al. 2011): 50,000 reviews, positive or negative; the `text` task of the Long Range Arena reads them as bytes.

In no package. What the user gives is the folder ``aclImdb`` as its authors pack it: ``{train,test}/{pos,neg}/NUMBER_STARS.txt``; ``unsup`` is left alone. A review is its file's bytes as they are, line breaks (``<br />``) included; how many bytes are read of it is the recipe's ``length`` (the benchmark's: the first 4,096).

The official 25,000 are the test. The benchmark validates on the *test* split, since there is no other, and so do papers after it that pick their best epoch; here 1,000 training reviews are held out for that, and 24,000 train.
"""

from __future__ import annotations

import re
from pathlib import Path

from .errors import DataError
from .records import KnownSequences, Record, SequenceSource

CLASSES = {"neg": 0, "pos": 1}
NAME = re.compile(r"\d+_\d+\.txt")


def find_folder(given: str | Path | None) -> Path:
    """The folder with ``train`` and ``test``, given itself or the one above it.

    Raises:
        DataError: none is given, or it is not there.
    """
    if given is None:
        raise DataError("imdb", "the reviews come in no package: fetch aclImdb (Maas et al. 2011) and give its folder, --data.source_path aclImdb")  # fmt: skip
    for folder in (Path(given), Path(given, "aclImdb")):
        if all((folder / split / kind).is_dir() for split in ("train", "test") for kind in CLASSES):
            return folder
    raise DataError(given, "has no train/pos, train/neg, test/pos and test/neg: give the folder aclImdb")


def load(given: str | None = None) -> SequenceSource:
    """List the reviews.

    Args:
        given: the folder ``aclImdb``, or the one it is in.

    Raises:
        DataError: see :func:`find_folder`; or a class has no reviews.
    """
    folder = find_folder(given)
    records = []
    for split in ("train", "test"):
        for kind, label in CLASSES.items():
            files = sorted(file for file in (folder / split / kind).iterdir() if NAME.fullmatch(file.name))
            if not files:
                raise DataError(folder / split / kind, "holds no reviews (NUMBER_STARS.txt)")
            records += [
                Record(f"{split}/{kind}/{file.name}", file.read_bytes, {"sentiment": label}, split="test" if split == "test" else None)
                for file in files
            ]  # fmt: skip
    return SequenceSource(
        name="imdb", modality="text", extension="txt", about={}, source=KNOWN.source, licence=KNOWN.licence,
        records=records, labels=KNOWN.labels, default_label="sentiment",
    )  # fmt: skip


KNOWN = KnownSequences(
    load=load,
    modality="text",
    about={},
    labels={"sentiment": ("negative", "positive")},
    splits={"val": 1000},
    source="IMDb film reviews (Maas et al. 2011), the user's copy",
    licence="not stated; the reviews are their authors'",
    files=("aclImdb",),
)

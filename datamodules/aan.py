"""The `retrieval` task of the Long Range Arena: pairs of papers of the ACL Anthology Network (Radev et al. 2013). Does one cite the other?

Read from the release's own files, ``new_aan_pairs.{train,eval,test}.tsv`` (147,086, 18,090 and 17,437 pairs in ``lra_release/tsv_data``): label, two ids and two texts, by tabs, a line a pair, without quotes. Lines are found once, and read when they are needed; nothing is packed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from .direct_images import DirectSplit, Facts
from .document_source import DocumentSource
from .errors import BadSampleError, DataError

FILES = {"train": "new_aan_pairs.train.tsv", "val": "new_aan_pairs.eval.tsv", "test": "new_aan_pairs.test.tsv"}
LABELS = {b"0": 0, b"0.0": 0, b"1": 1, b"1.0": 1}
FACTS = Facts(
    {"related": ("unrelated", "related")},
    "pairs of papers of the ACL Anthology Network, as the Long Range Arena released them (Radev et al. 2013; Tay et al. 2021)",
    "CC BY-NC-SA (AAN); the papers are their authors'",
)


def find_folder(given: str | Path) -> Path:
    """The folder of the three files, given itself or a folder of the release above it.

    Raises:
        DataError: it is not there.
    """
    tried = [Path(given, *more) for more in ((), ("tsv_data",), ("lra_release", "tsv_data"), ("aan",))]
    for folder in tried:
        if (folder / FILES["train"]).is_file():
            return folder
    raise DataError(given, f"holds no {FILES['train']} (looked in {', '.join(map(str, tried))})")


class AAN(DocumentSource):
    """The pairs of the release.

    Args:
        given: the release, or the folder of its files.

    Raises:
        DataError: a file is missing, or a line does not begin with a label.
    """

    def __init__(self, given: str | Path) -> None:
        folder = find_folder(given)
        self.files = {split: folder / name for split, name in FILES.items()}
        self.starts: dict[str, np.ndarray] = {}
        self.labels: dict[str, np.ndarray] = {}
        told = hashlib.sha256()
        for split, file in self.files.items():
            self.starts[split], self.labels[split] = _lines(file)
            told.update(self.starts[split].tobytes() + self.labels[split].tobytes())
        super().__init__(tuple(FILES), told.hexdigest())

    def split(self, name: str) -> DirectSplit:
        """Labels as listed."""
        if name not in self.labels:
            raise DataError(FILES["train"], f"has splits {', '.join(self.splits)}", f"split {name!r}")
        return DirectSplit({"related": self.labels[name]})

    def pair(self, split: str, place: int) -> tuple[bytes, bytes]:
        """Both papers."""
        file = self.files[split]
        with open(file, "rb") as opened:
            opened.seek(int(self.starts[split][place]))
            fields = opened.readline().rstrip(b"\r\n").split(b"\t")
        if len(fields) != 5 or not fields[3] or not fields[4]:
            raise BadSampleError(file, f"should have a label, two ids and two texts, has {len(fields)} fields (or an empty text)", f"line {place + 1}")  # fmt: skip
        return fields[3], fields[4]


def _lines(file: Path) -> tuple[np.ndarray, np.ndarray]:
    starts, labels, at = [], [], 0
    try:
        with open(file, "rb") as opened:
            for number, line in enumerate(opened, 1):
                label = LABELS.get(line.partition(b"\t")[0])
                if label is None:
                    raise DataError(
                        file, f"should begin with a label 0 or 1, begins with {line[:20]!r}", f"line {number}"
                    )
                starts.append(at)
                labels.append(label)
                at += len(line)
    except OSError as error:
        raise DataError(file, f"cannot be read: {error.strerror or error}") from error
    if not starts:
        raise DataError(file, "is empty")
    return np.array(starts, np.int64), np.array(labels, np.int64)

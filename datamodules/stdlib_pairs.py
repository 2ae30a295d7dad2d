"""A stand-in for the `retrieval` task of the Long Range Arena: two stretches of Python's standard library. Are they of one file?

Of the shape of the AAN's pairs (two texts of the same length, one label, halves even) from data that is on every machine, and another task: no number of it compares with a published one.

A pair is a pure function of the source files, ``seed``, split and place: label 1, two stretches of one file that do not overlap, in either order; label 0, stretches of two files. Only files as long as two stretches take part, each as likely as any other. Splits divide files, as
`mmlong.datamodules.stdlib` does, so no file that is tested on was trained on.
"""

from __future__ import annotations

import hashlib

from .direct_images import DirectSplit, Facts
from .document_source import DocumentSource
from .draws import Draw, labels_of
from .errors import DataError
from .stdlib import load

FACTS = Facts(
    {"related": ("of two files", "of one file")},
    "stand-in for the AAN's pairs: two stretches of the standard library of the Python that runs, of one file or of two",
    "PSF License Version 2",
)
COUNTS = {"train": 20_000, "val": 1_000, "test": 2_000}


class StdlibPairs(DocumentSource):
    """Drawn pairs.

    Args:
        length: bytes of a stretch.
        seed: of all pairs.
        train_count, val_count, test_count: how many.
        folder: another folder of Python files than the running interpreter's library.

    Raises:
        DataError: a split has fewer than two files that are long enough.
        ValueError: counts or length below 1.
    """

    def __init__(
        self,
        length: int = 4000,
        seed: int = 0,
        train_count: int = COUNTS["train"],
        val_count: int = COUNTS["val"],
        test_count: int = COUNTS["test"],
        folder: str | None = None,
    ) -> None:
        self.length, self.seed = length, seed
        self.counts = {"train": train_count, "val": val_count, "test": test_count}
        if min(length, *self.counts.values()) < 1 or seed < 0:
            raise ValueError("stdlib-pairs: length and counts are at least 1, seed at least 0")
        source = load(folder)
        self.files: dict[str, list[bytes]] = {split: [] for split in COUNTS}
        for record in source.records:
            data = record.load()
            if len(data) >= 2 * length:
                self.files[record.split or "train"].append(data)
        for split, files in self.files.items():
            if len(files) < 2:
                raise DataError(folder or "the standard library", f"has {len(files)} files of at least {2 * length} bytes for {split}; two are needed: take a smaller length")  # fmt: skip
        told = f"1 {source.about['sha256']} {length} {seed} {self.counts}"
        super().__init__(tuple(COUNTS), hashlib.sha256(told.encode()).hexdigest())
        self.labels = {
            split: labels_of(count, seed, number) for number, (split, count) in enumerate(self.counts.items())
        }

    def split(self, name: str) -> DirectSplit:
        """Labels, half of each."""
        if name not in self.labels:
            raise DataError("stdlib-pairs", f"has splits {', '.join(self.splits)}", f"split {name!r}")
        return DirectSplit({"related": self.labels[name]})

    def pair(self, split: str, place: int) -> tuple[bytes, bytes]:
        """Two stretches."""
        draw = Draw(self.seed, self.splits.index(split), 0, place)
        files = self.files[split]
        first = draw.below(len(files))
        if self.labels[split][place]:
            data = files[first]
            free = len(data) - 2 * self.length
            # Two places in the room that is left, in order, leave every way to lay both equally likely.
            low, high = sorted((draw.below(free + 1), draw.below(free + 1)))
            both = [data[low : low + self.length], data[high + self.length : high + 2 * self.length]]
            return (both[1], both[0]) if draw.below(2) else (both[0], both[1])
        second = (first + 1 + draw.below(len(files) - 1)) % len(files)
        return self._stretch(files[first], draw), self._stretch(files[second], draw)

    def _stretch(self, data: bytes, draw: Draw) -> bytes:
        at = draw.below(len(data) - self.length + 1)
        return data[at : at + self.length]

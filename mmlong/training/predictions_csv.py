"""``predictions.csv``: what a model says of each test sample, one row a sample; written by a test of a classifier and by ``mmlong predict``."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any


def namer(data: Any) -> Callable[[int], str] | None:
    """Of a datamodule that knows them, the names of the files or records that test samples were packed from, by the sample's id; else ``None``."""
    name = getattr(data, "sample_name", None)
    return None if name is None else partial(name, "test")


class PredictionsCSV:
    """Rows that are written as they come; the file has its name only when it is complete.

    The first row's keys are the columns; where the data know it, the last is ``source``, the file or record that the sample was packed from. With several ranks each writes its own ``predictions.rankN.csv``.

    Args:
        folder: of the run.
        rank, ranks: which of how many processes this is.
        data: what the samples are of; ``None``: it is not known.
    """

    def __init__(self, folder: Path, rank: int = 0, ranks: int = 1, data: Any = None) -> None:
        self._name = namer(data)
        self.path = folder / ("predictions.csv" if ranks == 1 else f"predictions.rank{rank}.csv")
        self.rows = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._file = open(self._partial, "w", newline="", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._writer: csv.DictWriter[str] | None = None

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows."""
        for row in rows:
            source = "" if self._name is None else self._name(row["index"])
            if self._writer is None and not source:
                self._name = None
            if self._name is not None:
                row = {**row, "source": source}
            if self._writer is None:
                self._writer = csv.DictWriter(self._file, list(row))
                self._writer.writeheader()
            self._writer.writerow(row)
            self.rows += 1

    def close(self) -> None:
        """Close the file, and give it its name."""
        self._file.close()
        os.replace(self._partial, self.path)

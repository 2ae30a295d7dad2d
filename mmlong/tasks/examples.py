"""``examples/`` in a run folder: a few samples of a test as files that people open, and ``examples.csv``, which says of each what was true and what the model said."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mmlong.modalities import Modality
from mmlong.samples import WRITERS, write_samples

FOLDER = "examples"
TABLE = "examples.csv"
COLUMNS = ("file", "index", "truth", "prediction", "probability", "source")


@dataclass(frozen=True)
class Example:
    """A sample of a test.

    Attributes:
        raw: the raw tensor of one sample, without padding.
        index: its id in the split.
        truth, prediction: names of classes; empty where there are none.
        probability: of the prediction, as written.
        source: the file or record that it was packed from, where that is known.
    """

    raw: Tensor
    index: int
    truth: str = ""
    prediction: str = ""
    probability: str = ""
    source: str = ""


def write_examples(modality: Modality, examples: Sequence[Example], run: Path) -> bool:
    """Write ``run/examples``, in place of an earlier test's; it has its name only when it is complete.

    Returns:
        whether there is anything to write: raw tensors of some kinds make no files.
    """
    if modality.kind not in WRITERS or not examples:
        return False
    unfinished, folder = run / f".{FOLDER}.partial", run / FOLDER
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with open(unfinished / TABLE, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for number, example in enumerate(examples):
            (path,) = write_samples(modality, example.raw[None], unfinished, f"{number:02d}")
            table.writerow(
                [path.name, example.index, example.truth, example.prediction, example.probability, example.source]
            )
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
    return True

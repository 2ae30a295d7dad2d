"""ELPV: 2,624 photographs of solar cells, from the installed package's files.

300 x 300 grey PNGs and ``labels.csv``: path, probability of a defect (0, 1/3, 2/3, 1: how sure two experts were), type
of cell. Labels here: ``type`` (mono- or polycrystalline) and ``defect`` (probability at least 1/2); the probability
itself goes into each sample's JSON.

Source: Buerhop-Lutz et al., "A Benchmark for Visual Identification of Defective Solar Cells in Electroluminescence
Imagery", 35th EU PVSEC, 2018. CC BY-NC-SA 4.0.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from .errors import DataError
from .pixels import open_image
from .sources import ImageSource, Item, Known, package_folder

COUNT = 2624
LABELS_SHA256 = "0abe6fe7700aea571717d7d7dfec005a47c6207b4cde26a4556b6807a115483d"
# SHA-256 over, for each image in name order, its name, a zero byte and the SHA-256 of its bytes.
IMAGES_SHA256 = "5962479d6d9c00b23a956d4fc1d1dd99811b069ad2480a2238495652124c4c28"


def load(folder: Path | None = None) -> ImageSource:
    """List the photographs and their labels.

    Args:
        folder: holds ``labels.csv`` and ``images/``; that of the installed package if not given.

    Raises:
        DataError: the package is missing, or a file is not the one that was published.
    """
    folder = folder or package_folder("elpv_dataset", "elpv-dataset") / "data"
    table = folder / "labels.csv"
    _check(table, hashlib.sha256(_bytes(table)).hexdigest(), LABELS_SHA256)
    whole = hashlib.sha256()
    files = sorted((folder / "images").glob("*.png"))
    if len(files) != COUNT:
        raise DataError(
            folder / "images", f"holds {len(files)} photographs, should hold {COUNT}; install elpv-dataset again"
        )
    for file in files:
        whole.update(file.name.encode() + b"\0" + hashlib.sha256(_bytes(file)).digest())
    _check(folder / "images", whole.hexdigest(), IMAGES_SHA256)
    items = []
    for line in table.read_text().splitlines():
        path, probability, kind = line.split()
        items.append(
            Item(
                name=path,
                labels={"type": KNOWN.labels["type"].index(kind), "defect": int(float(probability) >= 0.5)},
                open=partial(open_image, folder / path),
                extra={"defect_probability": float(probability)},
            )
        )
    return ImageSource("elpv", KNOWN.source, KNOWN.licence, KNOWN.labels, "type", items)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(path, "is missing; install elpv-dataset again") from error


def _check(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise DataError(path, f"is not the published file (SHA-256 {found}); install elpv-dataset again")


KNOWN = Known(
    load=lambda size: load(),
    labels={"type": ("mono", "poly"), "defect": ("functional", "defective")},
    size=256,
    channels=1,
    splits={"val": 200, "test": 400},
    source="ELPV: 2,624 electroluminescence photographs of solar cells (Buerhop-Lutz et al. 2018; package elpv-dataset)",
    licence="CC BY-NC-SA 4.0: attribution, non-commercial use only, share alike",
)

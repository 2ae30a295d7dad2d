"""A folder of raw arrays and a JSON that says what they are: written in one step, mapped and never executed when read.

Each array is a file of little-endian numbers, ``NAME.bin``; ``FILE.json`` holds their shapes and dtypes, the format's version, and whatever else the format says. All is written into ``FOLDER.partial``, which takes its name when it is whole and on the disk: what was interrupted, or found the disk full, is
no folder of that name. Opening maps the arrays read-only and holds their sizes against the JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

DTYPES = {"float16": "<f2", "float32": "<f4", "int32": "<i4", "int64": "<i8", "uint8": "|u1"}
"""Names of dtypes in the JSON, and what they are on a disk."""


class BadFolderError(ValueError):
    """A folder that is not what it should be: where, what is wrong, what to do.

    Args:
        where: folder or file.
        reason: what is wrong, and what to do.
    """

    def __init__(self, where: Path, reason: str) -> None:
        super().__init__(f"{where} {reason}")


class FolderWriter:
    """Writes a folder; use it as a context, at whose end the folder is there, or, after an error, nothing is.

    Args:
        folder: where; it must not be there yet.
        file: the JSON's name.
        version: of the format.
        arrays: of each its dtype and the shape of one entry.

    Raises:
        BadFolderError: something of that name is there.
        OSError: it cannot be written.
    """

    def __init__(
        self, folder: str | Path, file: str, version: int, arrays: Mapping[str, tuple[str, tuple[int, ...]]]
    ) -> None:
        self.folder, self.file, self.version = Path(folder), file, version
        self.arrays = {name: (dtype, tuple(shape)) for name, (dtype, shape) in arrays.items()}
        self.counts = dict.fromkeys(arrays, 0)
        self.said: dict[str, Any] = {}
        if self.folder.exists():
            raise BadFolderError(self.folder, "is there already: name another folder, or remove it")
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        # What an interrupted one left.
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> FolderWriter:
        for name in self.arrays:
            self._files[name] = open(self.partial / f"{name}.bin", "wb")
        return self

    def add(self, name: str, entries: np.ndarray) -> None:
        """Append entries ``(n, *shape)`` to an array.

        Raises:
            ValueError: another shape.
        """
        dtype, shape = self.arrays[name]
        if entries.shape[1:] != shape:
            raise ValueError(f"{name} has entries of {shape}, got {entries.shape[1:]}")
        self._files[name].write(np.ascontiguousarray(entries, dtype=DTYPES[dtype]).data)
        self.counts[name] += len(entries)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for file in self._files.values():
                    file.flush()
                    os.fsync(file.fileno())
                self._finish()
        finally:
            for file in self._files.values():
                _close(file)
            # Still there: it was not whole.
            shutil.rmtree(self.partial, ignore_errors=True)

    def _finish(self) -> None:
        arrays = {
            name: {"dtype": dtype, "shape": [self.counts[name], *shape]} for name, (dtype, shape) in self.arrays.items()
        }
        with open(self.partial / self.file, "w", encoding="utf-8") as file:
            json.dump({"version": self.version, "arrays": arrays, **self.said}, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.rename(self.partial, self.folder)


def _close(file: BinaryIO) -> None:
    # What is in its buffer may not fit on the disk; that was said when it was written.
    with contextlib.suppress(OSError):
        file.close()


def open_folder(
    folder: str | Path, file: str, version: int, arrays: Mapping[str, tuple[tuple[str, ...], int]], remake: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a :class:`FolderWriter` wrote.

    Args:
        folder: where.
        file: the JSON's name.
        version: that is understood.
        arrays: those there must be, each with the dtypes that it may have and its number of axes.
        remake: the command that makes such a folder, for errors.

    Returns:
        the JSON, and the arrays, mapped read-only.

    Raises:
        BadFolderError: it is missing, interrupted, of another version, or not whole.
    """
    folder = Path(folder)
    again = f"make it again with `{remake}`"
    if not folder.is_dir():
        raise BadFolderError(folder, f"is no folder; {again}")
    if not (folder / file).is_file():
        raise BadFolderError(folder, f"has no {file}: it is something else, or its making was interrupted; {again}")
    try:
        said = json.loads((folder / file).read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadFolderError(folder / file, f"is no JSON ({error}); {again}") from error
    if not isinstance(said, dict) or said.get("version") != version:
        found = said.get("version") if isinstance(said, dict) else None
        raise BadFolderError(
            folder / file, f"is of version {found!r}; this mmlong reads version {version}: {again}, or take that mmlong"
        )
    mapped = {}
    for name, (dtypes, axes) in arrays.items():
        dtype, shape = _array(folder / file, said, name, dtypes, axes, again)
        mapped[name] = _mapped(folder / f"{name}.bin", dtype, shape, file, again)
    return said, mapped


def _array(
    path: Path, said: dict[str, Any], name: str, dtypes: tuple[str, ...], axes: int, again: str
) -> tuple[str, tuple[int, ...]]:
    entries = said.get("arrays")
    entry = entries.get(name) if isinstance(entries, dict) else None
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if (
        not isinstance(entry, dict)
        or not isinstance(shape, list)
        or len(shape) != axes
        or not all(isinstance(n, int) and n >= 0 for n in shape)
    ):
        raise BadFolderError(path, f"does not say what {name}.bin is; {again}")
    if entry.get("dtype") not in dtypes:
        raise BadFolderError(
            path, f"says that {name}.bin is {entry.get('dtype')!r}; it can be {' or '.join(dtypes)}: {again}"
        )
    return entry["dtype"], tuple(shape)


def _mapped(path: Path, dtype: str, shape: tuple[int, ...], file: str, again: str) -> np.ndarray:
    if not path.is_file():
        raise BadFolderError(path, f"is missing; {again}")
    kind = np.dtype(DTYPES[dtype])
    due, found = int(np.prod(shape, dtype=object)) * kind.itemsize, path.stat().st_size
    if found != due:
        what = "cut short" if found < due else "too long"
        raise BadFolderError(path, f"is {what}: {found:,} bytes, where {file} says {due:,}; {again}")
    if due == 0:
        return np.empty(shape, kind)
    return np.memmap(path, kind, "r", shape=shape)

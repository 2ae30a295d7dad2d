"""Checkpoints that survive a kill in the middle of writing.

A checkpoint is written under another name, synced, and renamed: under its own name it is whole or not there. Reading
is careful as well, since files come from other disks and other writers: the newest one *that loads* is chosen.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

PARTIAL = ".partial"
_STEP = re.compile(r"step=(\d+)")


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; earlier ones are as they were, and nothing half-written is left."""


class BadCheckpointError(ValueError):
    """A file is not a whole checkpoint, or not one that can be loaded without running code."""


class _Watched:
    """A file for ``torch.save`` that remembers the first failed write, which torch reports as a fault of its zip archive."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint plugin for local files, with write, sync and rename."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint to a local path in one step, as far as a reader can tell."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + PARTIAL)
        watched = None
        try:
            with open(partial, "wb") as file:
                watched = _Watched(file)
                torch.save(checkpoint, cast(IO[bytes], watched))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            cause = watched.error if watched is not None and watched.error is not None else error
            if not isinstance(cause, OSError):
                raise
            raise CheckpointWriteError(
                f"cannot write {path}: {cause.strerror or cause}. Nothing half-written is left, and earlier checkpoints are untouched: "
                "make room and go on from the last"
            ) from cause
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU, tensors and plain values only.

    Raises:
        BadCheckpointError: it is not whole, is none of ours, or holds objects that would run code.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BadCheckpointError(
            f"{path} is no checkpoint of mmlong: it is damaged, or holds objects other than tensors and plain values, which are never loaded"
        ) from error
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, zipfile.BadZipFile) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BadCheckpointError(f"{path} is damaged or no checkpoint: {reason}") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise BadCheckpointError(f"{path} is no checkpoint: it holds no state_dict")
    return content


def newest_whole(folder: Path) -> tuple[Path | None, list[Path]]:
    """The checkpoint with the highest ``step=`` in its name that loads, and the ones above it that do not."""
    torn: list[Path] = []
    for path in sorted(folder.glob("*.ckpt"), key=step_of, reverse=True):
        try:
            read_checkpoint(path)
        except BadCheckpointError:
            torn.append(path)
        else:
            return path, torn
    return None, torn


def step_of(path: Path) -> int:
    """The step in a checkpoint's name, or -1."""
    found = _STEP.search(path.name)
    return int(found[1]) if found else -1

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
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

PARTIAL = ".partial"
_STEP = re.compile(r"step=(\d+)")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint plugin for local files, with write, sync and rename."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint to a local path in one step, as far as a reader can tell."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + PARTIAL)
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def newest_whole(folder: Path) -> tuple[Path | None, list[Path]]:
    """The checkpoint with the highest ``step=`` in its name that loads, and the ones above it that do not.

    Loading is with ``weights_only``: a checkpoint that would run code is not whole.
    """
    torn: list[Path] = []
    for path in sorted(folder.glob("*.ckpt"), key=_step, reverse=True):
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError):
            torn.append(path)
        else:
            return path, torn
    return None, torn


def _step(path: Path) -> int:
    found = _STEP.search(path.name)
    return int(found[1]) if found else -1

"""What can be wrong with data, as exceptions that say which file, which member of it, and why.

One shape for all of them: ``file [member]: reason``. The parts stay readable as attributes, so a reader that is told
to skip bad samples can name and count what it skipped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ON_BAD = ("stop", "skip")  # what can be done about a bad sample

log = logging.getLogger(__name__)


class DataError(ValueError):
    """Something about a file is not as it must be.

    Args:
        file: the file or folder at fault.
        reason: what is wrong and, where there is one, what to do about it.
        member: the part of the file at fault (a tar member, a row of a table), if the fault is not the whole file's.
    """

    def __init__(self, file: str | Path, reason: str, member: str | None = None) -> None:
        self.file, self.reason, self.member = str(file), reason, member
        super().__init__(self.file, reason, member)  # these, so that the exception pickles across worker processes

    def __str__(self) -> str:
        place = self.file if self.member is None else f"{self.file} [{self.member}]"
        return f"{place}: {self.reason}"


class BadShardError(DataError):
    """A shard, its index or ``dataset.json`` cannot be trusted as a whole; nothing in it is read."""


class BadSampleError(DataError):
    """One sample is damaged or unusable. Readers stop here, or skip and count, as configured (``on_bad``)."""


class PackError(DataError):
    """Packing could not finish. Nothing that looks like a whole dataset was left behind."""


class AlreadyPackedError(PackError):
    """There is a whole dataset where one was to be made."""


class Skipped:
    """What becomes of the faults met while packing: the first is raised, or each is named in the log and counted.

    Args:
        on_bad: ``"stop"`` or ``"skip"``.

    Raises:
        ValueError: ``on_bad`` is something else.
    """

    def __init__(self, on_bad: str) -> None:
        if on_bad not in ON_BAD:
            raise ValueError(f"on_bad is {on_bad!r}; it can be {' or '.join(ON_BAD)}")
        self.stops = on_bad == "stop"
        self.said: list[str] = []

    def met(self, faults: Iterable[DataError]) -> None:
        """Raise the first, or keep them all."""
        for fault in faults:
            if self.stops:
                raise fault
            self.said.append(str(fault))
            log.warning("skipped a bad sample (%d so far): %s", len(self.said), fault)

    def about(self) -> dict[str, Any]:
        """For ``dataset.json``: how many were skipped, and what was said of them."""
        return {"skipped": len(self.said), **({"skipped_samples": self.said} if self.said else {})}

    def nothing_left(self) -> str:
        """Why there is nothing left for training."""
        if self.said:
            return f"nothing is left for training; {len(self.said)} samples were skipped, the first: {self.said[0]}"
        return "nothing is left for training; ask for smaller splits"

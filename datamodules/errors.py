"""What can be wrong with data, as exceptions that say which file, which member of it, and why.

One shape for all of them: ``file [member]: reason``. The parts stay readable as attributes, so a reader that is told
to skip bad samples can name and count what it skipped.
"""

from __future__ import annotations

from pathlib import Path

ON_BAD = ("stop", "skip")  # what can be done about a bad sample


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

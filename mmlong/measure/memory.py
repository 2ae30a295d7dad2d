"""How much memory this process holds and has held, how much it may have, and a limit that fails in words instead of killing.

Linux tells all of it in ``/proc``. Elsewhere the most that was held comes from ``getrusage``, and cannot be set back.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_KEEP = 256 << 20
"""Left to the rest of the machine by :func:`available_bytes`."""


def _field(file: Path, name: str) -> int | None:
    """A line ``name:  number kB`` of one of the kernel's tables, in bytes."""
    if not file.is_file():
        return None
    for line in file.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return None


def peak_bytes() -> int:
    """Most memory this process has held so far. Not ``getrusage`` where there is better: a child's begins with its parent's."""
    found = _field(_STATUS, "VmHWM")
    if found is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def resident_bytes() -> int:
    """Memory this process holds now; where that is not known, the most it has held."""
    found = _field(_STATUS, "VmRSS")
    return peak_bytes() if found is None else found


def reset_peak() -> bool:
    """Let :func:`peak_bytes` begin anew from what is held now; whether the system allowed it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def available_bytes() -> int | None:
    """What a new process may take without another being killed; ``None`` where that is not known."""
    free = _field(Path("/proc/meminfo"), "MemAvailable")
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit != "max":
            inside = int(limit) - int(used)
            free = inside if free is None else min(free, inside)
    except (OSError, ValueError):
        pass  # not in a group with a limit
    return None if free is None else max(free - _KEEP, 0)


def limit_memory(most: int) -> None:
    """From now on an allocation that would take this process above ``most`` bytes is refused, which torch tells in words. Linux only; elsewhere nothing happens."""
    if sys.platform != "linux":
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))

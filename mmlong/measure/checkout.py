"""Which commit this runs from."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str | None:
    """The commit of the checkout this runs from, with ``+`` where files differ from it; ``None`` when there is none."""
    home = Path(__file__).parents[2]
    if not (home / ".git").exists():
        return None
    try:
        found, changed = (
            subprocess.run(["git", "-C", str(home), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found + ("+" if changed else "")

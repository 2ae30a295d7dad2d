"""Where tables are printed: as wide as the terminal, and where there is none (a pipe, a file) wide enough that no row is folded."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console


def wide_console(width: int, **options: Any) -> Console:
    """Of standard output.

    Args:
        width: in characters, where there is no terminal.
        options: of ``rich.console.Console``.
    """
    return Console(width=None if sys.stdout.isatty() else width, **options)

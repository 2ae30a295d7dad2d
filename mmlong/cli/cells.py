"""What ``mmlong arena`` and ``mmlong diagnose`` have in common: a grid of cells, each kept as soon as it is there, shown as one table, and gone on with where it was stopped."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mmlong.cli.errors import CommandError


class Cells(Protocol):
    """What was found: by key, in a file."""

    cells: dict[Any, Any]

    @classmethod
    def load(cls, path: Path) -> Any:
        """Read what :meth:`save` wrote; a ``ValueError`` where it is something else."""

    def add(self, cell: Any) -> None:
        """Keep a cell, in the place of an earlier one."""

    def save(self, path: Path) -> None:
        """Write the file."""


C = TypeVar("C", bound=Cells)


def grid_parser(command: str, about: str, tasks: Mapping[str, str], done: str, drawn: str) -> argparse.ArgumentParser:
    """A parser with the options that both have: ``--seeds``, ``--json``, ``--markdown``, ``--plot``, ``--show``.

    Args:
        command: behind ``mmlong``.
        about: the command.
        tasks: by name, what each is.
        done: what happens to a cell, e.g. "trained".
        drawn: what ``--plot`` draws.
    """
    width = max(map(len, tasks)) + 2
    parser = argparse.ArgumentParser(
        prog=f"mmlong {command}", description=about, allow_abbrev=False,
        epilog="\n".join(["tasks:", *(f"  {name:<{width}}{what}" for name, what in tasks.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N - 1 (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"keep every cell there; cells that are there already are not {done} again")  # fmt: skip
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help=f"draw {drawn} there")
    parser.add_argument("--show", action="store_true", help=f"nothing is {done}; show what --json holds")
    return parser


def load_cells(kind: type[C], what: str, options: argparse.Namespace) -> C:
    """What an earlier command kept, or none.

    Args:
        kind: what holds cells.
        what: they are, for people.
        options: ``json`` and ``show``.

    Raises:
        CommandError: the file is something else, or there is nothing to show.
    """
    try:
        found = kind.load(options.json) if options.json and options.json.exists() else kind()
    except ValueError as error:
        raise CommandError(str(error)) from error
    if options.show and not found.cells:
        raise CommandError(f"--show: which {what}? --json FILE of an earlier run")
    return found


def keep(found: Cells, cell: Any, path: Path | None) -> None:
    """Add a cell, and write the file if there is one.

    Raises:
        CommandError: it cannot be written.
    """
    found.add(cell)
    if path is None:
        return
    try:
        found.save(path)
    except OSError as error:
        raise CommandError(f"--json {path}: {error.strerror or error}", status=1) from error


def write_pages(options: argparse.Namespace, markdown: Callable[[], str], plot: Callable[[Path], None]) -> None:
    """What ``--plot`` and ``--markdown`` ask for.

    Raises:
        CommandError: it cannot be written, or there is nothing to draw.
    """
    try:
        if options.plot:
            plot(options.plot)
        if options.markdown:
            options.markdown.parent.mkdir(parents=True, exist_ok=True)
            options.markdown.write_text(markdown())
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot write: {error}", status=1) from error


def reason(error: Exception) -> str:
    """Why a cell failed, in a line."""
    return str(error).split("\n")[0] or type(error).__name__

"""Results of a command: kept as JSON, read again, told as Markdown. Whatever a command fills row by row goes this way, so that one that was stopped loses nothing. This file imports nothing of the house."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all, and the folder that it is to lie in.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def read_json(path: Path, what: str, made: Callable[[dict[str, Any]], T], error: type[ValueError], known: int) -> T:
    """What a file of results holds.

    Args:
        path: of JSON with a ``format``.
        what: it holds, for people, e.g. "findings of mmlong diagnose".
        made: makes it of the content; may raise what a wrong content makes it raise.
        error: to raise.
        known: the format that ``made`` reads.

    Raises:
        error: it cannot be read, has another format, or holds something else; the message says which file and why.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != known:
            raise error(f"{path} has format {content['format']}; this reads {known}")
        return made(content)
    except error:
        raise
    except OSError as failed:
        raise error(f"{path} cannot be read: {failed.strerror}") from failed
    except (ValueError, KeyError, TypeError, AttributeError) as failed:
        raise error(f"{path} holds no {what}: {failed}") from failed


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, with a line break at its end; a bar within a cell stays in it."""
    first, *others = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in [head, *rows])
    return "".join([first, "|" + "---|" * len(head) + "\n", *others])

"""HTML that cannot be broken by what it says: text is escaped where it becomes markup, and nowhere else."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TypeAlias

VOID = ("img", "meta", "line", "path", "rect", "circle")
"""Elements that have no end tag, of HTML and (closed by a slash) of SVG."""


class Markup(str):
    """A string that is markup already; every other string is text."""

    __slots__ = ()


Content: TypeAlias = "str | int | float | Iterable[Content] | None"


def join(*content: Content) -> Markup:
    """Markup of content: text escaped, markup as it is, nothing of ``None``."""
    parts: list[str] = []
    for part in content:
        if part is None:
            continue
        if isinstance(part, Markup):
            parts.append(str(part))
        elif isinstance(part, str):
            parts.append(html.escape(printable(part)))
        elif isinstance(part, (int, float)):
            parts.append(html.escape(str(part)))
        else:
            parts.append(join(*part))
    return Markup("".join(parts))


def tag(name: str, /, *content: Content, **attributes: str | int | float | bool | None) -> Markup:
    """An element.

    Args:
        name: of the element.
        content: what is in it.
        attributes: ``class_`` is ``class``, ``aria_label`` is ``aria-label``, ``viewBox`` stays; ``True`` has no value, ``False`` and ``None`` are left out.
    """
    said = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        said.append(f" {key}" if value is True else f' {key}="{html.escape(printable(str(value)))}"')
    opened = f"<{name}{''.join(said)}"
    if name in VOID:
        if content:
            raise ValueError(f"<{name}> holds nothing")
        return Markup(f"{opened}>" if name in ("img", "meta") else f"{opened}/>")
    return Markup(f"{opened}>{join(*content)}</{name}>")


def printable(text: str) -> str:
    """Text without the control characters that HTML forbids: a sample may hold any byte."""
    return "".join(c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f" and not "\ud800" <= c <= "\udfff") else "\N{REPLACEMENT CHARACTER}"
                   for c in text)  # fmt: skip


def table(
    caption: Content, head: Sequence[Content], rows: Sequence[Sequence[Content]], *, first_is_head: bool = True, class_: str | None = None
) -> Markup:  # fmt: skip
    """A table with a caption, in a box of its own that scrolls when the screen is narrower than it.

    Args:
        caption: what it shows.
        head: of the columns; empty for a table of names and values.
        rows: of cells; ``Markup`` of a ``<td>`` or ``<th>`` stays as it is.
        first_is_head: whether the first cell of a row names the row.
        class_: of the table.
    """
    body = []
    for row in rows:
        cells = []
        for place, cell in enumerate(row):
            if isinstance(cell, Markup) and cell.startswith(("<td", "<th ")):
                cells.append(cell)
            elif place == 0 and first_is_head:
                cells.append(tag("th", cell, scope="row"))
            else:
                cells.append(tag("td", cell))
        body.append(tag("tr", cells))
    top = tag("thead", tag("tr", [tag("th", name, scope="col") for name in head])) if head else None
    inner = tag("table", tag("caption", caption), top, tag("tbody", body), class_=class_)
    label = " ".join("".join(_text(caption)).split())
    return tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label=label)


def _text(content: Content) -> Iterable[str]:
    if isinstance(content, Markup):
        raise ValueError("a caption is text")
    if isinstance(content, str):
        yield content
    elif content is not None:
        yield str(content)


def details(summary: Content, *content: Content, open_: bool = False) -> Markup:
    """What is shown when it is asked for."""
    return tag("details", tag("summary", summary), *content, open=open_)

"""The frame of a page: what comes before and after its sections, and a policy by which a browser refuses whatever is not in the page itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmlong.report.elements import Content, Markup, join, tag
from mmlong.report.style import stylesheet

POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        id: unique on the page.
        title: its heading.
        content: what is in it.
    """

    id: str
    title: str
    content: Markup


def document(title: str, opening: Content, sections: Sequence[Section], closing: Content) -> str:
    """A whole page.

    Args:
        title: its first heading.
        opening: what stands below it.
        sections: in order; the page's contents list them.
        closing: the last line.
    """
    contents = tag(
        "nav", tag("ul", [tag("li", tag("a", s.title, href=f"#{s.id}")) for s in sections]), aria_label="Contents"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(stylesheet())),
    )  # fmt: skip
    body = tag(
        "body",
        tag("a", "To the content", href="#content", class_="skip"),
        tag("header", tag("h1", title), opening, contents),
        tag("main", [tag("section", tag("h2", s.title, id=f"{s.id}-title"), s.content, id=s.id, aria_labelledby=f"{s.id}-title")
                     for s in sections], id="content", tabindex=-1),
        tag("footer", tag("p", closing)),
    )  # fmt: skip
    return str(join(Markup("<!DOCTYPE html>\n"), tag("html", head, body, lang="en"), Markup("\n")))

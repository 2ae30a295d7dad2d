"""Parts of pages that are made from the registries when the pages are built, so that they are never out of date.

A page has ``<!-- generated: mixers -->`` on a line of its own where the text goes. Sphinx reads it by the event ``source-read``; the functions themselves need no Sphinx.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

PLACE = re.compile(r"^<!-- generated: (\w+) -->$", re.M)
_CODE = re.compile(r"(``.+?``|`[^`]+`)", re.S)
_ROLE = re.compile(r":\w+:`~?\.?([^`]+)`")


def plain(text: str) -> str:
    """Words of a docstring or note as Markdown: roles become code, and what Markdown would take for markup is escaped outside of code."""
    text = " ".join(_ROLE.sub(r"`\1`", text).split())
    pieces = _CODE.split(text)
    return "".join(p if p.startswith("`") else re.sub(r"([*_<>\[\]{}|])", r"\\\1", p) for p in pieces)


def linked(paper: str) -> str:
    """A paper's name with its arXiv numbers as links."""
    return re.sub(r"arXiv (\d{4}\.\d{4,5})(v\d+)?", r"[arXiv \1\2](https://arxiv.org/abs/\1\2)", plain(paper))


def first_paragraph(what: Any) -> str:
    """The first paragraph of a docstring, or nothing."""
    return plain((inspect.getdoc(what) or "").partition("\n\n")[0])


def options(maker: Callable[..., Any], hidden: tuple[str, ...]) -> str:
    """Keywords that a class or function takes, with their defaults, each as code."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = [p for p in inspect.signature(maker).parameters.values() if p.kind in named and p.name not in hidden]
    return ", ".join(f"`{p.name}`" if p.default is p.empty else f"`{p.name}={p.default!r}`" for p in taken)


def mixers() -> str:
    """Every registered mixer: a table of traits, then a section each."""
    from mmlong.mixers import MIXERS, list_mixers

    rows = ["| mixer | sees | streams | state | cost | reads |", "|---|---|---|---|---|---|"]
    entries = []
    for name in list_mixers():
        cls = MIXERS[name]
        t = cls.traits
        sees = "past, both" if t.causal and t.bidirectional else "past" if t.causal else "both"
        reads = ", ".join(w for w, on in (("lengths", t.padding), ("resets", t.resets), ("grid", t.grid)) if on)
        slug = re.sub(r"[^\w-]", "", name.lower())
        streams = "yes" if t.streaming else "no"
        rows.append(f"| [`{name}`](#{slug}) | {sees} | {streams} | {t.state} | {t.cost} | {reads or '-'} |")
        lines = [f"### {name}", linked(t.paper) + ".", first_paragraph(cls)]
        if t.note:
            lines.append(f"Fidelity: {plain(t.note)}")
        if t.survey:
            lines.append("Of the survey's table: " + "; ".join(plain(" ".join(row).strip()) for row in t.survey) + ".")
        if given := options(cls, ("dim", "causal")):
            lines.append(f"Options: {given}.")
        lines.append(f"`mmlong mixers --draw {name}`")
        entries.append("\n\n".join(line for line in lines if line))
    return "\n".join(rows) + "\n\n" + "\n\n".join(entries)


def forms() -> str:
    """Every published hierarchy that ``backbone.form`` names, with the parts that it writes."""
    import yaml

    from mmlong.backbone.forms import FORMS, write_form

    entries = []
    for name in FORMS.names():
        form = FORMS[name]
        written = yaml.safe_dump(write_form(name, 128), sort_keys=False, default_flow_style=None, width=120)
        entries.append(
            f"### {name}\n\n{linked(form.paper)}. {plain(form.note)}\n\nOptions: {options(form.write, ('dim',)) or 'none'}. "
            f"At dim 128 it writes\n\n```yaml\n{written}```"
        )
    return "\n\n".join(entries)


def recipes() -> str:
    """Every packaged recipe with the first line of its file."""
    from mmlong.cli.recipes import main_recipes, packaged

    known = packaged()
    rows = ["| recipe | what |", "|---|---|"]
    for name in main_recipes():
        first = known[name].read_text(encoding="utf-8").partition("\n")[0]
        rows.append(f"| `{name}` | {plain(first.removeprefix('#')) if first.startswith('#') else ''} |")
    return "\n".join(rows)


GENERATED: dict[str, Callable[[], str]] = {"mixers": mixers, "forms": forms, "recipes": recipes}


def fill(text: str) -> str:
    """A page's text with what is generated in its places."""
    return PLACE.sub(lambda place: GENERATED[place[1]](), text)


def _read(app: Any, docname: str, source: list[str]) -> None:
    source[0] = fill(source[0])


def setup(app: Any) -> dict[str, Any]:
    """What Sphinx calls."""
    app.connect("source-read", _read)
    return {"parallel_read_safe": True}

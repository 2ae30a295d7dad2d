"""Files of a run as parts of a page: pictures and sounds as data URIs, texts and sequences as text, as much as a page should carry."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmlong.report.elements import Content, Markup, join, tag
from mmlong.report.gather import Sample

TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".wav": "audio/wav", ".flac": "audio/flac"}
MAGIC = {".png": b"\x89PNG\r\n\x1a\n", ".jpg": b"\xff\xd8\xff", ".wav": b"RIFF", ".flac": b"fLaC"}
TEXTS = (".txt", ".fa")
LONGEST = 4000
"""Bytes of a text that are shown."""


@dataclass
class Budget:
    """How many bytes of files a page may still carry.

    Attributes:
        file: of one file at most.
        page: of all that are still to come.
        refused: files that were left out, with the reason.
    """

    file: int = 4 << 20
    page: int = 32 << 20
    refused: list[str] = field(default_factory=list)

    def take(self, path: Path) -> bytes | None:
        """A file's bytes, or ``None`` where it is too much."""
        try:
            size = path.stat().st_size
            if size > self.file:
                self.refused.append(f"{path.name} has {size:,} bytes; a file of a page has at most {self.file:,}")
            elif size > self.page:
                self.refused.append(f"{path.name} has {size:,} bytes, and the page is full")
            else:
                data = path.read_bytes()
                self.page -= len(data)
                return data
        except OSError as error:
            self.refused.append(f"{path.name} cannot be read: {error.strerror or error}")
        return None


def data_uri(data: bytes, suffix: str) -> str:
    """Bytes of a known type as an address that holds them."""
    return f"data:{TYPES[suffix]};base64,{base64.b64encode(data).decode('ascii')}"


def shown(sample: Sample, label: str, budget: Budget) -> Markup | None:
    """A file as an element; ``None`` where it is left out (``budget.refused`` says why).

    Args:
        sample: whose file.
        label: what it is, for those who do not see or hear it.
        budget: of the page.
    """
    path, suffix = sample.path, sample.path.suffix.lower()
    if suffix not in TYPES and suffix not in TEXTS:
        budget.refused.append(f"{path.name} is of a kind that is not shown here")
        return None
    if suffix in TEXTS:
        return _text(path, label, budget)
    data = budget.take(path)
    if data is None:
        return None
    if not data.startswith(MAGIC[suffix]):
        budget.refused.append(f"{path.name} is damaged: it is no {TYPES[suffix]}")
        return None
    if TYPES[suffix].startswith("audio"):
        return tag("audio", controls=True, preload="metadata", src=data_uri(data, suffix), aria_label=label)
    return tag("img", src=data_uri(data, suffix), alt=label)


def _text(path: Path, label: str, budget: Budget) -> Markup | None:
    try:
        with open(path, "rb") as file:
            begun = file.read(LONGEST)
        size = path.stat().st_size
    except OSError as error:
        budget.refused.append(f"{path.name} cannot be read: {error.strerror or error}")
        return None
    cut = tag("p", f"the first {LONGEST:,} of {size:,} bytes", class_="soft") if size > len(begun) else None
    body = tag("pre", begun.decode("utf-8", "replace"), tabindex=0, role="region", aria_label=label)
    return join(body, cut)


def gallery(samples: Sequence[Sample], what: str, budget: Budget) -> Markup | None:
    """Samples side by side, each with what was true and what the model said; ``None`` where none can be shown.

    Args:
        samples: files.
        what: one of them is, e.g. ``test sample``.
        budget: of the page.
    """
    items = []
    for place, sample in enumerate(samples):
        named = f"{what} {place + 1 if sample.index is None else sample.index}"
        if sample.source:
            named += f", {sample.source}"
        said = _said(sample)
        element = shown(sample, ": ".join([named, *said]), budget)
        if element is None:
            continue
        lines: list[Content] = [tag("p", named, class_="soft")]
        if said:
            right = sample.truth == sample.prediction
            lines.append(tag("p", "✓ " if right else "✗ ", "; ".join(said), class_="good" if right else "bad"))
        items.append(tag("li", element, lines))
    if not items:
        return None
    wide = any(sample.path.suffix.lower() != ".png" for sample in samples) or len(items) <= 2
    return tag("ul", items, class_="samples wide" if wide else "samples")


def _said(sample: Sample) -> list[str]:
    if not sample.prediction:
        return []
    sure = "" if sample.probability != sample.probability else f", {sample.probability:.0%} sure"
    verdict = "right" if sample.truth == sample.prediction else "wrong"
    return [f"is {sample.truth}", f"{verdict}: said {sample.prediction}{sure}"]

"""What is scaled: a recipe, its sizes, its lengths of the past."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Subject:
    """A modality.

    Attributes:
        recipes: whose data, objective and optimiser; merged left to right.
        unit: what a number of its bits is, for people.
        dims: widths of five sizes and, last, of the sixth that the fit is checked on.
        contexts: five lengths of the past and, last, the sixth.
        options: of ``mmlong fit``, for all sizes.
        ratio: tokens that a size is trained on for each of its parameters.
        width, count: tokens of a stretch whose bits are asked for behind each length of the past, and how many stretches.
    """

    recipes: tuple[str, ...]
    unit: str
    dims: Sequence[int]
    contexts: Sequence[int]
    options: Mapping[str, Any] = field(default_factory=dict)
    ratio: float = 20.0
    width: int = 64
    count: int = 64


_QUIET = {"model.samples": 0, "model.optim.warmup": 20}
_SMALL = {"expand": 1, "d_state": 16, "headdim": 16}

_ALL_WORK = {"model.backbone.front": [], "model.backbone.depth": 4}
"""Without tables, whose parameters cost no compute: sizes are compared by it."""

SUBJECTS: dict[str, Subject] = {
    "text": Subject(
        ("text/stdlib_ar",), "byte", (32, 48, 64, 96, 128, 192), (64, 256, 1024, 4096, 16384, 32768), {**_QUIET, "data.batch_size": 4, **_ALL_WORK}
    ),
    "genome": Subject(
        ("genome/chromosome_ar",), "base", (32, 48, 64, 96, 128, 192), (64, 256, 1024, 4096, 16384, 65536),
        {**_QUIET, "data.batch_size": 2, "model.backbone.mixers": ["s4d", {"name": "mamba2", **_SMALL}]},
    ),
}  # fmt: skip
"""By the name that the command takes. Tokens in proportion to parameters, so that compute grows with the square of the size (Hoffmann et al. 2022, arXiv 2203.15556)."""

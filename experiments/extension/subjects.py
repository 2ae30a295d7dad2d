"""What is trained at one length and used at others, and how it may be used otherwise than it was trained, with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Spec = dict[str, Any]

HEADS = 2
BASE = 10000.0
"""Of rotary positions."""


@dataclass(frozen=True)
class Subject:
    """A mixer.

    Attributes:
        mixer: the mixer's options, for a model of width ``dim`` trained on ``length`` tokens: ``(dim, length)``.
        uses: other options that the same weights are used under, by name: ``(dim, length, factor)``, ``factor`` times ``length`` tokens at use.
    """

    mixer: Callable[[int, int], Spec]
    uses: dict[str, Callable[[int, int, int], Spec]] = field(default_factory=dict)


def _attention(positions: str) -> Callable[[int, int], Spec]:
    return lambda dim, length: {"name": "attention", "heads": HEADS, "positions": positions}


def _window(positions: str) -> Callable[[int, int, int], Spec]:
    """Each token sees as far back as it did in training."""
    return lambda dim, length, factor: {
        "name": "local", "heads": HEADS, "positions": positions, "window": length - 1,
    }  # fmt: skip


def _longer_waves(dim: int, length: int, factor: int) -> Spec:
    """A larger base, by which the slowest pair turns ``factor`` times slower and the fastest as before ("NTK-aware", in Peng et al. 2023, arXiv 2309.00071, section 3.1)."""
    channels = dim // HEADS
    base = BASE * factor ** (channels / (channels - 2))
    return {"name": "attention", "heads": HEADS, "positions": "rope", "position_options": {"base": base}}


SUBJECTS: dict[str, Subject] = {
    "rope": Subject(_attention("rope"), {"window": _window("rope"), "larger base": _longer_waves}),
    "alibi": Subject(_attention("alibi")),
    "nope": Subject(_attention("none"), {"window": _window("none")}),
    "local": Subject(lambda dim, length: {"name": "local", "heads": HEADS, "window": min(256, length // 4)}),
    "mamba2": Subject(lambda dim, length: {"name": "mamba2", "headdim": 32, "d_state": 32}),
    "gated_deltanet": Subject(lambda dim, length: {"name": "gated_deltanet", "heads": HEADS}),
    "s4d": Subject(lambda dim, length: {"name": "s4d"}),
    "hyena": Subject(lambda dim, length: {"name": "hyena"}),
    "hyena, lags of training": Subject(lambda dim, length: {"name": "hyena", "max_length": length}),
}
"""By name: softmax attention with rotary positions, with ALiBi and without any (``nope``), a sliding window, states of one size, a filter whose later lags no training reached, and one that ends there."""

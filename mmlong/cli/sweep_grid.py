"""The grid of ``mmlong sweep``: ``KEY=V1,V2`` to keys with their values, and all of their combinations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmlong.cli.errors import CommandError

_OPEN, _CLOSE = "[{(", "]})"


@dataclass(frozen=True)
class Axis:
    """A key of a recipe and the values to try, as the command line writes them."""

    key: str
    values: tuple[str, ...]


def split_values(text: str) -> list[str]:
    """Values between commas that stand in no bracket and no quotes.

    Raises:
        CommandError: an empty value, or a bracket or quote that is not closed.
    """
    found, here, depth, quote = [""], 0, list[str](), ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in _OPEN:
            depth.append(_CLOSE[_OPEN.index(sign)])
        elif sign in _CLOSE and (not depth or depth.pop() != sign):
            raise CommandError(f"--grid: {text!r} closes a bracket that is not open")
        elif sign == "," and not depth:
            found.append("")
            here += 1
            continue
        found[here] += sign
    if depth or quote:
        raise CommandError(f"--grid: {text!r} lacks a closing {depth[-1] if depth else quote}")
    values = [value.strip() for value in found]
    if not all(values):
        raise CommandError(f"--grid: {text!r} has an empty value; values are written V1,V2")
    return values


def parse_axes(given: Sequence[str]) -> list[Axis]:
    """Every ``KEY=V1,V2``.

    Raises:
        CommandError: one that is not written so, a key or a value that comes twice.
    """
    axes: list[Axis] = []
    for text in given:
        key, equals, rest = text.partition("=")
        key = key.removeprefix("--")
        if not equals or not key:
            raise CommandError(f"--grid {text!r} is not KEY=V1,V2, e.g. --grid model.optim.lr=1e-3,3e-3")
        values = split_values(rest)
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise CommandError(f"--grid {key} has {twice!r} twice")
        if any(axis.key == key for axis in axes):
            raise CommandError(f"--grid {key} comes twice: write all of its values behind one")
        axes.append(Axis(key, tuple(values)))
    return axes


def combinations(axes: Sequence[Axis]) -> Iterator[dict[str, str]]:
    """Every setting: a value of each key; the last key's changes fastest. One empty setting of no axes."""
    for values in itertools.product(*(axis.values for axis in axes)):
        yield dict(zip((axis.key for axis in axes), values, strict=True))


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """As few last parts of each key as tell it from the others: ``model.optim.lr`` to ``lr``."""
    names = {}
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[-count:])
            if not any(other != key and f".{other}".endswith(f".{name}") for other in keys):
                break
        names[key] = name
    return names

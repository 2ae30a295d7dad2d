"""Which configuration keys exist, so that a wrong one is answered with the nearest one in a line, before anything is built."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from mmlong.cli.errors import CommandError

Tree = dict[str, Any]
"""Key to the tree below it, or ``None`` where anything goes (mappings that the model checks itself, lists, values)."""


def class_tree(cls: type) -> Tree:
    """The keys that a class's constructor takes, dataclass arguments with their fields."""
    hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    parameters = list(inspect.signature(cls).parameters.values())
    return {
        p.name: _below(hints.get(p.name)) for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }


def _below(hint: Any) -> Tree | None:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(option, type):
            return class_tree(option)
    return None


def leaves(tree: Tree, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a tree."""
    for key, below in tree.items():
        yield prefix + key
        if below:
            yield from leaves(below, f"{prefix}{key}.")


def check_keys(config: Mapping[str, Any], tree: Tree, where: str) -> None:
    """Refuse keys that do not exist.

    Raises:
        CommandError: naming the key, where it was given, and the nearest one.
    """
    for path in _paths(config, tree):
        check_key(path, tree, where)


def _paths(config: Mapping[str, Any], tree: Tree, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        path = (*prefix, str(key))
        yield path
        below = tree.get(key)
        if below is not None and isinstance(value, Mapping):
            yield from _paths(value, below, path)


def check_key(path: tuple[str, ...], tree: Tree, where: str) -> None:
    """Refuse one dotted key, given as its parts, if it does not exist."""
    here: Tree | None = tree
    for depth, part in enumerate(path):
        if here is None:
            return
        if part not in here:
            prefix = ".".join(path[:depth])
            raise CommandError(
                f"unknown key {'.'.join(path[: depth + 1])!r} in {where}{_suggest(part, prefix, here, tree)}"
            )
        here = here[part]


def _suggest(part: str, prefix: str, here: Tree, tree: Tree) -> str:
    dot = f"{prefix}." if prefix else ""
    # The right word in the wrong place: `max_steps` for `trainer.max_steps`.
    everywhere = {key.rpartition(".")[2]: key for key in reversed(list(leaves(tree)))}
    if part in everywhere:
        return f" (did you mean {everywhere[part]!r}?)"
    if close := difflib.get_close_matches(part, list(here), n=1, cutoff=0.6):
        return f" (did you mean {dot + close[0]!r}?)"
    if close := difflib.get_close_matches(part, list(everywhere), n=1, cutoff=0.75):
        return f" (did you mean {everywhere[close[0]]!r}?)"
    return f"; {prefix or 'a recipe'} has: {', '.join(here)}"

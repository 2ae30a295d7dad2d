"""Parameters chosen by patterns of their names: what is frozen, what gets an adapter.

backbone.stages.0.*        shell's wildcards, over the whole name (``*`` crosses dots)
backbone.norm              the name of a module stands for everything in it
re:\\.(q|k)_proj\\.         a regular expression, found anywhere in the name
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection

from mmlong.registry import nearest

REGEX = "re:"
_WILD = re.compile(r"[*?\[\]]")


def matching(names: Collection[str], pattern: str, what: str) -> list[str]:
    """The names that a pattern chooses, in their order; none if it chooses none.

    Raises:
        ValueError: ``what``, the option, has no regular expression where one was announced.
    """
    if pattern.startswith(REGEX):
        try:
            expression = re.compile(pattern.removeprefix(REGEX))
        except re.error as error:
            raise ValueError(f"{what}: {pattern!r} is no regular expression: {error}") from error
        return [name for name in names if expression.search(name)]
    return [name for name in names if fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")]


def no_match(names: Collection[str], pattern: str, what: str) -> str:
    """What to say of a pattern that chooses nothing: the nearest name of a parameter or module, or of a part of one."""
    word = pattern.removeprefix(REGEX)
    whole = {name.rsplit(".", cut)[0] for name in names for cut in range(name.count(".") + 1)} | set(names)
    near = nearest(_WILD.split(word)[0].rstrip("."), whole)
    if not near:
        literal = max(re.split(r"[^\w]+", word), key=len)
        near = nearest(literal, {part for name in names for part in name.split(".") if not part.isdigit()})
    return f"{what}: no parameter matches {pattern!r}{near}"

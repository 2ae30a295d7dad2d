"""How mixers and their options are named on a command line."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import yaml

from mmlong.cli.errors import CommandError
from mmlong.mixers import MIXERS, list_mixers
from mmlong.registry import nearest


def mixer_names(patterns: Sequence[str], default: Sequence[str]) -> list[str]:
    """Registered mixers by name or shell pattern, in the order given."""
    found: list[str] = []
    for pattern in patterns:
        names = list_mixers(pattern)
        if not names:
            raise CommandError(
                f"no mixer {pattern!r}{nearest(pattern.strip('*'), list_mixers())}; registered: {', '.join(list_mixers())}"
            )
        found += [name for name in names if name not in found]
    return found or list(default)


def mixer_options(given: Sequence[str], mixers: Sequence[str], done: str) -> dict[str, dict[str, Any]]:
    """``KEY=VALUE`` for every mixer named, ``MIXER.KEY=VALUE`` for one; ``done`` says what happens to them, for errors."""
    made: dict[str, dict[str, Any]] = {name: {} for name in mixers}
    for text in given:
        key, equals, value = text.partition("=")
        mixer, dot, name = key.rpartition(".")
        if not equals or not name:
            raise CommandError(f"--option {text}: write KEY=VALUE, or MIXER.KEY=VALUE for one of several mixers")
        if dot and mixer not in made:
            raise CommandError(f"--option {text}: mixer {mixer!r} is not {done}{nearest(mixer, made)}")
        for target in [mixer] if dot else mixers:
            made[target][name] = yaml.safe_load(value)
    return made


def parse_mixer(text: str) -> str | dict[str, Any]:
    """``name`` or ``name:option=value,...`` as a recipe has it; values are YAML.

    Raises:
        CommandError: an option without a value.
    """
    name, colon, rest = text.partition(":")
    if not colon:
        return name
    options = {}
    for part in rest.split(","):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise CommandError(f"{text!r}: options are written NAME:OPTION=VALUE,OPTION=VALUE")
        options[key] = yaml.safe_load(value)
    return {"name": name, **options}


def mixers_of(text: str, known: Sequence[str]) -> list[str | dict[str, Any]]:
    """What a word of a command names, as a recipe has it: ``NAME``, a shell pattern, either with ``:OPTION=VALUE,...``.

    Args:
        text: the word.
        known: mixers that may be named.

    Raises:
        CommandError: it names none of them.
    """
    mixer = parse_mixer(text)
    name = mixer if isinstance(mixer, str) else str(mixer["name"])
    names = fnmatch.filter(known, name)
    if not names:
        why = "has no causal form" if name in MIXERS else f"is no mixer{nearest(name, known)}"
        raise CommandError(f"{name!r} {why}; `mmlong mixers` lists them")
    return [one if isinstance(mixer, str) else {**mixer, "name": one} for one in names]

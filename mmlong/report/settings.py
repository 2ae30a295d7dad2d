"""Configurations as flat settings, and where they differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

NOT_SET = "(not set)"
OF_A_RUN = ("recipe", "runs", "run_dir", "ckpt_path", "config")
"""Keys that say where a run lies and not what it does."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"model": {"init_args": {"dim": 8}}}`` to ``{"model.dim": 8}``; lists are values."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flatten(value, prefix if key == "init_args" else f"{name}.")
        else:
            found[name] = value
    return found


def shown(value: Any) -> str:
    """A setting in one line."""
    return value if isinstance(value, str) and value else json.dumps(value, default=str)


def overridden(arguments: Sequence[str]) -> Iterator[str]:
    """Flat names of the settings that a command line sets."""
    for word in arguments:
        if word.startswith("--"):
            key = word.removeprefix("--").partition("=")[0].rstrip("+")
            yield ".".join(part for part in key.split(".") if part != "init_args")


def changed(recipe: Mapping[str, Any], further: Sequence[Mapping[str, Any]], arguments: Sequence[str], ran: Mapping[str, Any]) -> list[tuple[str, str, str]]:  # fmt: skip
    """What a run did otherwise than its recipe says.

    Args:
        recipe: the first recipe's content.
        further: of recipes put on top of it.
        arguments: of the command line, ``--key value`` or ``--key=value``.
        ran: the whole configuration of the run.

    Returns:
        ``(setting, in the recipe, in the run)``, by name. A setting that only the recipe's parts' defaults decide is not the recipe's.
    """
    base, ended = flatten(recipe), flatten(ran)
    names = dict.fromkeys([*base, *(key for one in further for key in flatten(one)), *overridden(arguments)])
    rows = []
    for name in names:
        below = [key for key in ended if key == name or key.startswith(f"{name}.")]
        for key in below or [name]:
            before, after = base.get(key, NOT_SET), ended.get(key, NOT_SET)
            if name.partition(".")[0] not in OF_A_RUN and not same(before, after):
                rows.append((key, shown(before), shown(after)))
    return sorted(set(rows))


def same(one: Any, other: Any) -> bool:
    """Whether two settings mean the same: 1 and 1.0 do, and so does the ``1e-3`` that YAML takes for a word."""
    return bool(_number(one) == _number(other))


def _number(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, list):
        return [_number(one) for one in value]
    if isinstance(value, dict):
        return {key: _number(one) for key, one in value.items()}
    return value


def differing(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all, with each one's value."""
    flat = [flatten(config) for config in configs]
    names = dict.fromkeys(key for one in flat for key in one)
    rows = []
    for name in sorted(names):
        values = [one.get(name, NOT_SET) for one in flat]
        if name.partition(".")[0] not in OF_A_RUN and any(not same(values[0], value) for value in values[1:]):
            rows.append((name, [shown(value) for value in values]))
    return rows


def read_yaml(text: str) -> dict[str, Any]:
    """The mapping that a file of settings holds.

    Raises:
        ValueError: it is none.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"holds {type(content).__name__}, not settings")
    return content

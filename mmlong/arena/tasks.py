"""The tasks of the arena: which recipe each is, at which sizes, what chance is, and how the user's own copy of the data is named to it.

Sizes: ``cpu`` is the recipe itself, trained for so many CPU minutes (``--minutes``), every mixer for as many; ``debug`` a few steps, to see that it runs; ``paper`` the benchmark's own batch, steps and model shape, for GPUs.

Another mixer takes the place of the recipe's sequence mixer, wherever that stands in its backbone; convolutions beside it, width, depth and pooling stay, so that mixers are compared in one shell.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmlong.backbone.parts import level, name_and_times

SIZES = ("debug", "cpu", "paper")
KEPT = frozenset({"masked_conv2d"})
"""Mixers of a recipe that are no sequence mixer of its kind: they stay where another is tried."""


@dataclass(frozen=True)
class ArenaTask:
    """A task.

    Attributes:
        name: of the task and of its recipe.
        about: in a line.
        chance: accuracy of guessing on the benchmark's data, 0 to 1.
        data: what the recipe reads without the user's files: ``the benchmark's`` where it is drawn after the benchmark's own procedure, otherwise what stands in for it.
        stands_in: whether it is another task than the benchmark's, whose numbers do not compare.
        own: options of the recipe when the user names a copy of the benchmark's data; ``{path}`` is the copy.
        release: what that copy is.
        minutes: CPU minutes of size ``cpu``.
        own_chance: accuracy of guessing on what stands in; ``None``: the same.
    """

    name: str
    about: str
    chance: float
    data: str
    stands_in: bool
    own: Mapping[str, Any]
    release: str
    minutes: float = 20.0
    own_chance: float | None = None
    key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.name.partition("/")[2])

    def is_stand_in(self, data: str) -> bool:
        """Whether what was read is another task than the benchmark's."""
        return self.stands_in and data == self.data

    def chance_on(self, data: str) -> float:
        """Accuracy of guessing on what was read."""
        return self.own_chance if self.own_chance is not None and self.is_stand_in(data) else self.chance

    def recipes(self, size: str) -> list[str]:
        """The recipes that make it up at a size, the later on top."""
        return [self.name] if size == "cpu" else [self.name, f"{self.name}.{size}"]

    def data_options(self, path: str | None) -> dict[str, Any]:
        """Options of ``fit`` for the user's copy; none without."""
        if path is None:
            return {}
        return {key: value.format(path=path) if isinstance(value, str) else value for key, value in self.own.items()}


def _pathfinder(size: int, about: str, minutes: float) -> ArenaTask:
    return ArenaTask(
        f"lra/pathfinder{size}", about, 0.5, "drawn after the published generator", False,
        {"data.source_path": "{path}", "data.train_paddles": None}, f"lra_release, or its folder pathfinder{size}", minutes,
    )  # fmt: skip


TASKS: dict[str, ArenaTask] = {
    task.name: task
    for task in (
        ArenaTask(
            "lra/listops", "the value of nested lists", 0.1, "drawn by the published grammar", False,
            {"data.source_path": "{path}", "data.dataset": "listops-lra", "data.short_first": 0}, "lra_release/listops-1000",
        ),
        ArenaTask(
            "lra/text", "is a film review positive? bytes", 0.5, "BBC news, five topics (stand-in)", True,
            {"data.dataset": "imdb", "data.source_path": "{path}"}, "aclImdb (Maas et al. 2011)", own_chance=1 / 5,
        ),
        ArenaTask(
            "lra/retrieval", "does one paper cite the other? bytes, two towers", 0.5, "stretches of one file or two of Python's library (stand-in)", True,
            {"data.dataset": "aan", "data.source_path": "{path}"}, "lra_release/tsv_data (new_aan_pairs.*.tsv)",
        ),
        ArenaTask(
            "lra/image", "CIFAR-10 in grey levels, pixel by pixel", 0.1, "crops of six photographs, which one (stand-in)", True,
            {"data.dataset": "cifar10-grey", "data.source_path": "{path}"}, "cifar-10-batches-bin, the binary version", own_chance=1 / 6,
        ),
        _pathfinder(32, "are two discs on one dashed path? 1,024 pixels", 20.0),
        _pathfinder(64, "the same, 4,096 pixels", 20.0),
        _pathfinder(128, "the same, 16,384 pixels (Path-X)", 20.0),
        _pathfinder(256, "the same, 65,536 pixels (Path-256, no task of the benchmark)", 20.0),
    )
}  # fmt: skip
"""By name."""


def swap_mixer(backbone: Mapping[str, Any], mixer: Any) -> dict[str, Any]:
    """A backbone's configuration with another sequence mixer.

    Args:
        backbone: with ``mixers`` or ``parts``.
        mixer: a name, or ``{"name": ..., **options}``.

    Raises:
        ValueError: there is none to take the place of.
    """
    changed, count = _swap(backbone, mixer)
    if not count:
        raise ValueError("the recipe's backbone names no sequence mixer whose place another could take")
    return dict(changed)


def _swap(entry: Any, mixer: Any) -> tuple[Any, int]:
    """The entry with every mixer replaced, and how many were."""
    if isinstance(entry, Mapping):
        if "name" in entry:
            if entry["name"] in KEPT:
                return entry, 0
            beside = {key: entry[key] for key in ("repeat", "ffn") if key in entry}
            new = {"name": mixer} if isinstance(mixer, str) else dict(mixer)
            return {**new, **beside}, 1
        found = {
            key: _swap_all(value, mixer) if key in ("mixers", "parts") else (value, 0) for key, value in entry.items()
        }
        return {key: value for key, (value, _) in found.items()}, sum(count for _, count in found.values())
    if isinstance(entry, list):
        if level(entry) is not None:
            inside, count = _swap_all(entry[1], mixer)
            return [entry[0], inside, *entry[2:]], count
        return _swap_all(entry, mixer)
    if isinstance(entry, str):
        name, times = name_and_times(entry)
        if name in KEPT:
            return entry, 0
        if times == 1:
            return copy.deepcopy(mixer), 1
        return {**({"name": mixer} if isinstance(mixer, str) else mixer), "repeat": times}, 1
    return entry, 0


def _swap_all(entries: Any, mixer: Any) -> tuple[list[Any], int]:
    """Entries of a list, which itself is no level."""
    some = [_swap(each, mixer) for each in entries]
    return [value for value, _ in some], sum(count for _, count in some)

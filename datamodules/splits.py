"""Which sample goes to training and which is held out, and what packing writes of each: the same for images and for sequences.

Splits are stratified by all labels together and are a pure function of the seed and the samples' names, labels and
groups, so packing again gives the same test set. Samples of one group never part: held-out data whose twin, or whose
speaker, was trained on is not held out. Within a split samples are shuffled, so that a shard is a fair part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from .errors import DataError

DEFAULT_SPLITS: Mapping[str, float] = {"val": 0.1, "test": 0.1}


class Named(Protocol):
    """What a sample tells before it is read. See `mmlong.datamodules.records.Record`."""

    @property
    def name(self) -> str: ...
    @property
    def labels(self) -> Mapping[str, int]: ...
    @property
    def extra(self) -> Mapping[str, str | int | float]: ...
    @property
    def split(self) -> str | None: ...
    @property
    def group(self) -> str | None: ...


Sample = TypeVar("Sample", bound=Named)


def check_items(source: str, items: Sequence[Named], labels: Mapping[str, tuple[str, ...]]) -> None:
    """Names that are unique, labels that have a class, groups that are in one split.

    Raises:
        DataError: which sample breaks what.
    """
    names: set[str] = set()
    homes: dict[str, tuple[str, str]] = {}
    for item in items:
        if item.name in names:
            raise DataError(source, "comes twice", item.name)
        names.add(item.name)
        for label, classes in labels.items():
            value = item.labels.get(label)
            if value is None:
                raise DataError(source, f"the label {label!r} is missing", item.name)
            if not 0 <= value < len(classes):
                raise DataError(source, f"unknown label {label} = {value}; there are {len(classes)} classes", item.name)
        if item.group is not None and item.split is not None:
            home, first = homes.setdefault(item.group, (item.split, item.name))
            if home != item.split:
                raise DataError(
                    source, f"is in split {item.split!r}, and {first} of the same group {item.group!r} in {home!r}", item.name
                )  # fmt: skip


def split_items(items: Sequence[Sample], splits: Mapping[str, float], seed: int) -> dict[str, list[Sample]]:
    """Divide samples into splits.

    Args:
        items: with a ``split`` of their own, they go there, and their group with them; the others are divided.
        splits: by name, how many samples (1 or more) or which share of them (below 1); ``train`` takes the rest. A
            split that items name themselves is left to them. Groups are not divided, so with groups a number is met as
            nearly as they allow.
        seed: of the division.

    Returns:
        By split, the items in packing order. ``train`` comes first.

    Raises:
        ValueError: more is asked for than there is.
    """
    own = {item.split for item in items if item.split is not None}
    homes = {item.group: item.split for item in items if item.group is not None and item.split is not None}
    chosen: dict[str, list[Sample]] = {"train": []}
    loose: dict[tuple[bool, str], list[Sample]] = defaultdict(list)
    for item in sorted(items, key=lambda item: item.name):
        home = item.split or (None if item.group is None else homes.get(item.group))
        if home is not None:
            chosen.setdefault(home, []).append(item)
        else:
            loose[(item.group is not None, item.name if item.group is None else item.group)].append(item)
    count = sum(map(len, loose.values()))
    asked = {
        name: round(share * count) if share < 1 else int(share)
        for name, share in splits.items()
        if name != "train" and name not in own
    }
    if sum(asked.values()) > count:
        each = ", ".join(f"{name}={number}" for name, number in asked.items())
        raise ValueError(
            f"the splits ({each}) ask for {sum(asked.values())} of {count} samples; ask for fewer, or for shares below 1"
        )
    left = [loose[unit] for unit in sorted(loose, key=lambda unit: _lot(seed, "split", unit[1]))]
    for name, number in asked.items():
        taken = _stratified(left, number)
        chosen[name] = [item for place in sorted(taken) for item in left[place]]
        left = [unit for place, unit in enumerate(left) if place not in taken]
    chosen["train"].extend(item for unit in left for item in unit)
    return {
        name: sorted(part, key=lambda item: _lot(seed, "order", item.name)) for name, part in chosen.items() if part
    }  # fmt: skip


def _lot(seed: int, what: str, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{what}/{name}".encode()).digest()


def _stratified(units: Sequence[Sequence[Named]], count: int) -> set[int]:
    """Places of units that hold ``count`` samples, each combination of labels in proportion (largest remainders)."""
    strata: dict[tuple[tuple[tuple[str, int], ...], ...], list[int]] = defaultdict(list)
    for place, unit in enumerate(units):
        strata[tuple(sorted({tuple(sorted(item.labels.items())) for item in unit}))].append(place)
    weights = {labels: sum(len(units[place]) for place in places) for labels, places in strata.items()}
    total = sum(weights.values())
    exact = {labels: count * weight / total for labels, weight in weights.items()}
    shares = {labels: int(share) for labels, share in exact.items()}
    by_remainder = sorted(exact, key=lambda labels: (shares[labels] - exact[labels], labels))
    # The last sample of a class is held out only where nothing else is left: what is never trained on cannot be tested either.
    spare = {labels: weight - min(len(units[place]) for place in strata[labels]) for labels, weight in weights.items()}
    by_remainder.sort(key=lambda labels: shares[labels] + 1 > spare[labels])
    for labels in by_remainder[: count - sum(shares.values())]:
        shares[labels] += 1
    taken: set[int] = set()
    for labels, places in strata.items():
        missing = shares[labels]
        for place in places:
            if abs(missing - len(units[place])) < abs(missing):  # it brings the number nearer
                taken.add(place)
                missing -= len(units[place])
    return taken


def class_counts(
    parts: Mapping[str, Sequence[Named]], labels: Mapping[str, tuple[str, ...]]
) -> dict[str, dict[str, list[int]]]:
    """By label field and split, how many samples each class has."""
    return {
        field: {
            split: [sum(item.labels[field] == number for item in part) for number in range(len(classes))]
            for split, part in parts.items()
        }
        for field, classes in labels.items()
    }


def sample_json(item: Named, labels: Mapping[str, tuple[str, ...]], numbers: Mapping[str, int] | None = None) -> bytes:
    """The JSON that is packed beside a sample: its name, class ids and names, further facts; what the index repeats wins."""
    names = {f"{field}_name": labels[field][value] for field, value in item.labels.items()}
    record: dict[str, Any] = {"file": item.name, **item.labels, **names, **item.extra, **item.labels, **(numbers or {})}
    return json.dumps(record, separators=(",", ":")).encode()

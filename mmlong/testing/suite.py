"""What the conformance suites share: a list of properties, which of them are wanted, and running them one after another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmlong.registry import nearest
from mmlong.testing.verdicts import Verdicts


@dataclass(frozen=True)
class Property:
    """One thing that a part must do.

    Attributes:
        name: by which failures and ``only=`` know it.
        check: given what is checked, raises :class:`~mmlong.testing.ConformanceError` if it does not hold.
        applies: to whom, by traits.
        every_dim: checked at every width, or only at the first.
    """

    name: str
    check: Callable[[Any], None]
    applies: Callable[[Any], bool] = lambda s: True
    every_dim: bool = True


def wanted_properties(
    only: str | Iterable[str] | None, known: tuple[str, ...], also: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """The names in ``only``, or all that are ``known``; raises ``ValueError`` for one that is neither known nor in ``also``, which must be asked for."""
    if only is None:
        return known
    names, known = (only,) if isinstance(only, str) else tuple(only), known + also
    for name in names:
        if name not in known:
            raise ValueError(f"unknown property {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return names


def run_properties(
    properties: Sequence[Property], wanted: Sequence[str], subjects: Sequence[Verdicts]
) -> tuple[str, ...]:
    """Check the wanted properties, in their own order, and leave the caller's random numbers and threads as they were.

    Args:
        properties: all there are.
        wanted: names.
        subjects: what is checked, the same part at each width.

    Returns:
        names of the properties that were checked.
    """
    ran: list[str] = []
    with torch.random.fork_rng(), torch.enable_grad(), _one_thread():
        for entry in properties:
            if entry.name not in wanted:
                continue
            for subject in subjects if entry.every_dim else subjects[:1]:
                subject.checking = "construction"
                if not entry.applies(subject):
                    continue
                subject.checking = entry.name
                entry.check(subject)
                if entry.name not in ran:
                    ran.append(entry.name)
    return tuple(ran)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The tensors of a check are small: threads would mostly wait for one another, and much longer on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

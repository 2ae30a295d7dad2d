"""Names to classes, with answers that help: the one registry behind mixers, modalities, heads and models.

A registry knows its kind ("mixer"), so that an unknown name or option is answered with the nearest one. Other people's packages add
to it through an entry-point group, loaded the first time a name is asked for. This file imports nothing of the house.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` when something in ``known`` is close to ``word``, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


class Registry(Generic[T]):
    """A mapping from names to makers (classes or functions), filled by decorators.

    Args:
        kind: what is registered, in the singular, for messages.
        group: entry-point group whose entries are loaded before the first look-up; loading one must register something.
    """

    def __init__(self, kind: str, group: str | None = None) -> None:
        self.kind = kind
        self.group = group
        self._entries: dict[str, T] = {}
        self._loaded = group is None

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: ``@registry.register("name")``. Raises ``ValueError`` if the name is taken by something else."""

        def add(entry: T) -> T:
            taken = self._entries.get(name)
            if taken is not None and _identity(taken) != _identity(entry):
                raise ValueError(f"the {self.kind} name {name!r} is taken by {_identity(taken)}")
            self._entries[name] = entry
            return entry

        return add

    def _load_entry_points(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for point in importlib.metadata.entry_points(group=self.group or ""):
            try:
                point.load()
            except (ImportError, AttributeError) as error:
                # One broken package of somebody's must not take every other name down with it.
                warnings.warn(f"{self.kind} plug-in {point.name} ({point.value}) does not load: {error}", stacklevel=2)

    def __getitem__(self, name: str) -> T:
        self._load_entry_points()
        try:
            return self._entries[name]
        except KeyError:
            known = ", ".join(sorted(self._entries)) or "none"
            raise KeyError(f"unknown {self.kind} {name!r}{nearest(name, self._entries)}; registered: {known}") from None

    def __contains__(self, name: object) -> bool:
        self._load_entry_points()
        return name in self._entries

    def names(self, pattern: str = "*") -> list[str]:
        """Registered names that match a shell pattern, sorted."""
        self._load_entry_points()
        return sorted(fnmatch.filter(self._entries, pattern))

    def create(self, name: str, /, *args: Any, **options: Any) -> Any:
        """Call the maker registered under ``name``; an option it does not take raises ``TypeError`` naming the nearest."""
        maker: Any = self[name]
        check_options(f"{self.kind} {name!r}", maker, options)
        return maker(*args, **options)


def check_options(what: str, maker: Callable[..., Any], options: dict[str, Any]) -> None:
    """Raise ``TypeError`` naming the nearest option when ``maker`` has no such keyword."""
    parameters = inspect.signature(maker).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for key in options:
        if key not in known:
            raise TypeError(f"{what} has no option {key!r}{nearest(key, known)}; it takes: {', '.join(known)}")


def _identity(entry: Any) -> str:
    return f"{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', entry)}"
